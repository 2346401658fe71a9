"""What a run leaves in its output folder: pictures or videos, the comparison, metrics.json."""

import io
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ertacache.utils.files import write_atomically

DIFFERENCE_GAIN = 4  # the difference column shows |cached − baseline| × 4, so that it can be seen at all


def to_uint8(picture: np.ndarray) -> np.ndarray:
    """float in [0, 1], of any shape → uint8, rounded."""
    return np.clip(np.rint(np.asarray(picture, np.float32) * 255), 0, 255).astype(np.uint8)


def save_png(path: Path, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def save_mp4(path: Path, video: np.ndarray, fps: int) -> None:
    """H.264 at nearly lossless quality; heights and widths must be even. video: float [F, H, W, 3] in [0, 1]."""
    import imageio.v2 as imageio

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        imageio.mimwrite(part, to_uint8(video), fps=fps, quality=9, macro_block_size=2, ffmpeg_log_level="error")
        part.replace(path)


def save_results(folder: Path, results: np.ndarray, method: str, fps: int | None) -> None:
    """`000-METHOD.png`, `001-METHOD.png`, … for pictures [N, H, W, 3], or `.mp4` for videos [N, F, H, W, 3]."""
    for number, result in enumerate(results):
        name = folder / f"{number:03d}-{method}"
        if result.ndim == 4:
            save_mp4(name.with_suffix(".mp4"), result, fps)
        else:
            save_png(name.with_suffix(".png"), Image.fromarray(to_uint8(result)))


def first_middle_last(videos: np.ndarray) -> np.ndarray:
    """Three frames of each video side by side, a white line between them: [N, F, H, W, 3] → [N, H, 3W + 2, 3]."""
    frames = videos.shape[1]
    first, middle, last = (videos[:, i] for i in (0, frames // 2, frames - 1))
    line = np.ones_like(first[:, :, :1])
    return np.concatenate([first, line, middle, line, last], axis=2)


def difference(result: np.ndarray, reference: np.ndarray, gain: float) -> np.ndarray:
    """|result − reference| × gain, cut at 1: pictures or videos in [0, 1]."""
    return np.clip(gain * np.abs(result - reference), 0, 1)


def comparison(prompts: list[str], baseline: np.ndarray, cached: np.ndarray, titles: tuple[str, str]) -> Image.Image:
    """One row a prompt: baseline | cached | difference; of videos the first, the middle and the last frame."""
    gain = DIFFERENCE_GAIN
    columns = {titles[0]: baseline, titles[1]: cached, f"difference x{gain}": difference(cached, baseline, gain)}
    return sheet(prompts, columns)


def sheet(prompts: list[str], columns: dict[str, np.ndarray]) -> Image.Image:
    """One row a prompt, one column a title: pictures [N, H, W, 3] in [0, 1], or three frames of each of some videos.

    Small pictures are enlarged by a whole factor, columns wider than 1200 pixels are shrunk.
    """
    columns = {title: first_middle_last(c) if c.ndim == 5 else c for title, c in columns.items()}
    height, width = next(iter(columns.values())).shape[1:3]
    scale = 1200 / width if width > 1200 else max(1, round(min(256 / height, 400 / width)))
    height, width = round(height * scale), round(width * scale)
    gap, line = 8, 26
    font = ImageFont.load_default(size=14)
    across = len(columns) * (width + gap)
    page = Image.new("RGB", (across + gap, line + len(prompts) * (height + line)), "white")
    draw = ImageDraw.Draw(page)
    for c, (title, pictures) in enumerate(columns.items()):
        x = gap + c * (width + gap)
        draw.text((x, 5), title, fill="black", font=font)
        for row, picture in enumerate(pictures):
            how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
            tile = Image.fromarray(to_uint8(picture)).resize((width, height), how)
            page.paste(tile, (x, line + row * (height + line)))
    for row, prompt in enumerate(prompts):
        text = _shorten(prompt, across - 2 * gap, draw, font)
        draw.text((gap, line + row * (height + line) + height + 3), text, fill="black", font=font)
    return page


def _shorten(text: str, width: int, draw: ImageDraw.ImageDraw, font) -> str:
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text + "…"


def save_metrics(folder: Path, metrics: dict) -> None:
    write_atomically(folder / "metrics.json", (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode())
