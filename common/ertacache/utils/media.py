"""The files in a run's output folder: images or videos, the comparison, metrics.json."""

import bisect
import contextlib
import functools
import io
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ertacache.utils.files import unwritable, write_atomically


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Return an image or video in [0, 1], of any shape, as uint8, rounded."""
    return np.clip(np.rint(np.asarray(image, np.float32) * 255), 0, 255).astype(np.uint8)


def save_png(path: Path, image: Image.Image) -> None:
    """Write an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def save_mp4(path: Path, video: np.ndarray, fps: int) -> None:
    """Write a video as H.264 at nearly lossless quality.

    Args:
        path: The file, .mp4.
        video: float [F, H, W, 3] in [0, 1], H and W even.
        fps: Frames per second.
    """
    import imageio.v2 as imageio

    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            options = {"fps": fps, "quality": 9, "macro_block_size": 2, "ffmpeg_log_level": "error"}
            imageio.mimwrite(temporary, to_uint8(video), **options)
            temporary.replace(path)
    except OSError as error:  # also where ffmpeg ends early
        raise unwritable(path, error) from error


def save_results(folder: Path, results: np.ndarray, method: str, fps: int | None, first: int = 0) -> None:
    """Write images as `000-METHOD.png`, `001-METHOD.png`, …, or videos as `.mp4`.

    Args:
        folder: The output folder.
        results: Images [N, H, W, 3] or videos [N, F, H, W, 3] in [0, 1].
        method: Of the file names.
        fps: Frames per second of videos; None for images.
        first: Number of the first file.
    """
    for number, result in enumerate(results, first):
        name = folder / f"{number:03d}-{method}"
        if result.ndim == 4:
            save_mp4(name.with_suffix(".mp4"), result, fps)
        else:
            save_png(name.with_suffix(".png"), Image.fromarray(to_uint8(result)))


def first_middle_last(videos: np.ndarray) -> np.ndarray:
    """Return three frames of each video side by side, with white lines: [N, F, H, W, 3] → [N, H, 3W + 2, 3]."""
    frames = videos.shape[1]
    first, middle, last = (videos[:, i] for i in (0, frames // 2, frames - 1))
    line = np.ones_like(first[:, :, :1])
    return np.concatenate([first, line, middle, line, last], axis=2)


def difference(result: np.ndarray, reference: np.ndarray, gain: float) -> np.ndarray:
    """Return |result − reference| × gain, clipped to 1, of images or videos in [0, 1]."""
    return np.clip(gain * np.abs(result - reference), 0, 1)


def sheet(prompts: list[str], columns: dict[str, np.ndarray]) -> Image.Image:
    """Return a sheet with one row per prompt and one column per title; of a video it shows three frames.

    Small images are enlarged by an integer factor; columns wider than 1200 pixels are shrunk.

    Args:
        prompts: N texts.
        columns: Images [N, H, W, 3] or videos [N, F, H, W, 3] in [0, 1], by title.
    """
    columns = {title: first_middle_last(column) if column.ndim == 5 else column for title, column in columns.items()}
    height, width = next(iter(columns.values())).shape[1:3]
    scale = 1200 / width if width > 1200 else max(1, round(min(256 / height, 400 / width)))
    height, width = round(height * scale), round(width * scale)
    gap, line_height = 8, 26
    font = ImageFont.load_default(size=14)
    row_width = len(columns) * (width + gap)
    page_height = line_height + len(prompts) * (height + line_height)
    page = Image.new("RGB", (row_width + gap, page_height), "white")
    draw = ImageDraw.Draw(page)
    resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    for column, (title, images) in enumerate(columns.items()):
        x = gap + column * (width + gap)
        draw.text((x, 5), shortened(title, page.width - x, draw, font), fill="black", font=font)
        for row, image in enumerate(images):
            tile = Image.fromarray(to_uint8(image)).resize((width, height), resampling)
            page.paste(tile, (x, line_height + row * (height + line_height)))
    for row, prompt in enumerate(prompts):
        font = _font_for(prompt)
        text = shortened(prompt, row_width - 2 * gap, draw, font)
        y = line_height + row * (height + line_height) + height + 3
        draw.text((gap, y), text, fill="black", font=font)
    return page


def shortened(text: str, width: int, draw: ImageDraw.ImageDraw, font) -> str:
    """Return a text that fits into a width in pixels, with … at its end where it was cut.

    Letters that the font lacks, and what is no letter at all, are written as escapes.
    """
    text = "".join(c if _draws(font, c) else c.encode("unicode_escape", "surrogatepass").decode() for c in text[:width])
    if draw.textlength(text, font=font) <= width:
        return text
    kept = bisect.bisect(range(len(text)), width, key=lambda n: draw.textlength(text[:n] + "…", font=font)) - 1
    return text[: max(0, kept)] + "…"


def _font_for(text: str):
    """Return the first font here that has all letters of a text; the default font where none has."""
    fonts = [ImageFont.load_default(size=14), *_other_fonts()]
    return next((font for font in fonts if all(_draws(font, letter) for letter in set(text[:200]))), fonts[0])


@functools.cache
def _other_fonts() -> list:
    """Return common fonts of the system, as far as they are there."""
    fonts = []
    for name in ("DejaVuSans.ttf", "arial.ttf", "Arial Unicode.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc"):
        with contextlib.suppress(OSError):
            fonts.append(ImageFont.truetype(name, 14))
    return fonts


@functools.cache
def _draws(font, letter: str) -> bool:
    """Return whether a font has a letter: others all look like the one that no font has."""
    if not letter.isprintable():
        return False
    return letter == " " or bytes(font.getmask(letter)) != bytes(font.getmask("\U0010fffe"))


def save_metrics(folder: Path, metrics: dict) -> None:
    """Write metrics.json; JSON has no NaN and no infinity."""
    write_atomically(folder / "metrics.json", (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode())
