"""What a run leaves in its output folder: pictures, the comparison, metrics.json."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ertacache.files import write_atomically

DIFFERENCE_GAIN = 4  # the difference column shows |cached − baseline| × 4, so that it can be seen at all


def to_uint8(picture: np.ndarray) -> np.ndarray:
    """float [H, W, 3] in [0, 1] → uint8, rounded."""
    return np.clip(np.rint(np.asarray(picture, np.float32) * 255), 0, 255).astype(np.uint8)


def save_png(path: Path, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def save_pictures(folder: Path, pictures: np.ndarray, method: str) -> None:
    """`000-METHOD.png`, `001-METHOD.png`, … for pictures [N, H, W, 3]."""
    for number, picture in enumerate(pictures):
        save_png(folder / f"{number:03d}-{method}.png", Image.fromarray(to_uint8(picture)))


def comparison(prompts: list[str], baseline: np.ndarray, cached: np.ndarray, titles: tuple[str, str]) -> Image.Image:
    """One row a prompt: baseline | cached | difference. Small pictures are enlarged by a whole factor."""
    difference = np.clip(DIFFERENCE_GAIN * np.abs(cached - baseline), 0, 1)
    scale = max(1, round(256 / baseline.shape[1]))
    height, width = baseline.shape[1] * scale, baseline.shape[2] * scale
    gap, line = 8, 26
    font = ImageFont.load_default(size=14)
    sheet = Image.new("RGB", (3 * width + 4 * gap, line + len(prompts) * (height + line)), "white")
    draw = ImageDraw.Draw(sheet)
    columns = [(titles[0], baseline), (titles[1], cached), (f"difference x{DIFFERENCE_GAIN}", difference)]
    for c, (title, pictures) in enumerate(columns):
        x = gap + c * (width + gap)
        draw.text((x, 5), title, fill="black", font=font)
        for row, picture in enumerate(pictures):
            tile = Image.fromarray(to_uint8(picture)).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (x, line + row * (height + line)))
    for row, prompt in enumerate(prompts):
        text = _shorten(prompt, 3 * width, draw, font)
        draw.text((gap, line + row * (height + line) + height + 3), text, fill="black", font=font)
    return sheet


def _shorten(text: str, width: int, draw: ImageDraw.ImageDraw, font) -> str:
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text + "…"


def save_metrics(folder: Path, metrics: dict) -> None:
    write_atomically(folder / "metrics.json", (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode())
