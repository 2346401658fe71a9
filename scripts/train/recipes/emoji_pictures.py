"""The training pictures of the FLUX demo: Noto Emoji at 64 × 64, from the npm package emoji-datasource-google.

The images are Google's, under the Apache License 2.0. They are read when the demo is trained and never else.
"""

import base64
import hashlib
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ertacache import UserError
from ertacache.demos.emoji import SIZE, all_emoji

PACKAGE = "emoji-datasource-google@16.0.0"
SHA512 = "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="
INSIDE = "package/img/google/64"  # of the package
SIDES = (56, 60)  # least and largest side of a picture in its frame, pixels
SHIFT = 1  # largest distance of a picture from the middle, along each axis, pixels


def fetch(folder: Path) -> None:
    """Put the picture of every emoji into a folder, FILE.png each; needs npm unless they are there.

    Raises:
        UserError: The package cannot be had, or is another than expected.
    """
    missing = {f"{INSIDE}/{e.file}.png" for e in all_emoji() if not (folder / f"{e.file}.png").exists()}
    if not missing:
        return
    remedy = f"put the PNG files of the npm package {PACKAGE}, {INSIDE}, into {folder}"
    with tempfile.TemporaryDirectory() as temporary:
        try:
            subprocess.run(["npm", "pack", PACKAGE], cwd=temporary, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"npm cannot fetch {PACKAGE} ({type(error).__name__}): {remedy}") from error
        package = next(Path(temporary).glob("*.tgz"))
        if base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode() != SHA512:
            raise UserError(f"npm fetched another {PACKAGE} than expected: {remedy}")
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(package) as archive:
            for member in archive:
                if member.name in missing:
                    (folder / Path(member.name).name).write_bytes(archive.extractfile(member).read())


def load(folder: Path) -> list[Image.Image]:
    """Return the pictures of all emoji, RGBA, in the order of `all_emoji`."""
    fetch(folder)
    return [Image.open(folder / f"{e.file}.png").convert("RGBA") for e in all_emoji()]


def on_white(picture: Image.Image, side: int, left: int, top: int) -> np.ndarray:
    """Return a picture at a size and place on a white ground, uint8 [SIZE, SIZE, 3]."""
    ground = Image.new("RGBA", (SIZE, SIZE), "white")
    ground.alpha_composite(picture.resize((side, side), Image.Resampling.LANCZOS), (left, top))
    return np.asarray(ground.convert("RGB"))


def render(pictures: list[Image.Image], index: int, rng: np.random.Generator) -> np.ndarray:
    """Return a training picture of one emoji, uint8 [SIZE, SIZE, 3]: size and place vary, and where right its side."""
    picture = pictures[index]
    if all_emoji()[index].mirrored and rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = int(rng.integers(SIDES[0], SIDES[1] + 1))
    middle = (SIZE - side) // 2
    left, top = (int(np.clip(middle + rng.integers(-SHIFT, SHIFT + 1), 0, SIZE - side)) for _ in range(2))
    return on_white(picture, side, left, top)


def to_model(images: list[np.ndarray]) -> torch.Tensor:
    """Convert pictures: uint8 [H, W, 3] each → float32 in [-1, 1], [B, 3, H, W]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
