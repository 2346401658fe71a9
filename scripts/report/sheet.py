"""Put images of several methods side by side, from the rows of scripts/evaluate.py; or those of one method in a grid.

    .venv/bin/python scripts/evaluate.py ERTACache4FLUX --methods all --speedups 3 --samples 12 --json rows.json
    .venv/bin/python scripts/report/sheet.py rows.json --methods none,budget,teacache --asked 3 --out methods.png
    .venv/bin/python scripts/report/sheet.py rows.json --methods none --count 12 --out twelve.png

scripts/report/report.py shows videos too.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ertacache import UserError
from ertacache.cli.arguments import ArgumentParser, check_counts
from ertacache.evaluation.ranking import speedup
from ertacache.evaluation.rows import Row, read_source
from ertacache.utils import media
from ertacache.utils.errors import run_program

SIDE, GAP, LINE = 128, 10, 22  # of a picture in a grid, between two, and of a caption, pixels


def chosen(rows: list[Row], method: str, asked: float | None) -> Row:
    """Return the row of a method with samples; `asked` is its target speed-up, None for any.

    Raises:
        UserError: There is none.
    """
    for row in rows:
        if row["method"] == method and row["samples"] and (method == "none" or asked in (None, row["asked"])):
            return row
    methods = ", ".join(sorted({row["method"] for row in rows if row["samples"]})) or "nothing"
    raise UserError(f"no row of {method} at {asked} has samples: there are {methods}; see evaluate.py --samples")


def title(row: Row) -> str:
    """Return what stands above a column, in ASCII."""
    if row["method"] == "none":
        return f"uncached, {row['steps']} steps"
    return f"{row['method']}, {speedup(row):.2f}x"


def pictures(row: Row, count: int) -> np.ndarray:
    """Return the first images of a row, float [N, H, W, 3] in [0, 1]."""
    if Path(row["samples"][0]).suffix != ".png":
        raise UserError(f"{row['samples'][0]} is a video: sheets are made of images; see report.py")
    return np.stack([imageio.imread(path)[..., :3] for path in row["samples"][:count]]) / np.float32(255)


def grid(captions: list[str], images: np.ndarray, columns: int = 6) -> Image.Image:
    """Return images [N, H, W, 3] with a caption under each, in rows of `columns`."""
    lines, font = -(-len(images) // columns), ImageFont.load_default(size=11)
    page = Image.new("RGB", (columns * (SIDE + GAP) + GAP, lines * (SIDE + LINE + GAP) + GAP), "white")
    draw = ImageDraw.Draw(page)
    for number, (caption, image) in enumerate(zip(captions, images, strict=True)):
        x, y = GAP + number % columns * (SIDE + GAP), GAP + number // columns * (SIDE + LINE + GAP)
        page.paste(Image.fromarray(media.to_uint8(image)).resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
        caption = media.shortened(caption, SIDE + GAP, draw, font)
        draw.text((x + SIDE // 2, y + SIDE + 4), caption, fill="black", font=font, anchor="ma")
    return page


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, help="JSON file of scripts/evaluate.py, with samples")
    parser.add_argument("--methods", default="none,budget", help="methods of the columns (default: none,budget)")
    parser.add_argument("--asked", type=float, help="their target speed-up, where the rows have several")
    parser.add_argument("--count", type=int, default=6, help="number of prompts (default: 6)")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    args = parser.parse_args()
    check_counts(args, "count")
    rows = read_source(args.rows).rows
    columns = [chosen(rows, method, args.asked) for method in args.methods.split(",")]
    captions = columns[0]["sample_prompts"][: args.count]
    images = {title(row): pictures(row, args.count) for row in columns}
    if any(len(column) != len(captions) for column in images.values()):
        raise UserError(f"{args.rows}: the rows have different numbers of samples: measure them with one --samples")
    page = grid(captions, *images.values()) if len(images) == 1 else media.sheet(captions, images)
    media.save_png(args.out, page)
    print(args.out)


if __name__ == "__main__":
    run_program(main)
