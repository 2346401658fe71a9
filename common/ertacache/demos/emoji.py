"""The emoji that the FLUX demo draws: captions, and the measure of whether a picture shows what its caption asks for.

The demo is trained on pictures of Noto Emoji (scripts/train/recipes/emoji_pictures.py). A caption names one emoji
("a red apple"), or leaves it open ("a fruit"). The pictures themselves are not needed here: the demo's folder keeps
the latents of one picture per emoji, and a generated picture shows the emoji whose latents are nearest to its own.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from ertacache.utils.errors import UserError

SIZE = 64  # height and width of a picture, pixels
CONTENT = 56  # longest side of what a picture shows once `centred`, pixels
WHITE = 0.94  # a pixel whose every channel is at least this bright, of 1, is ground
PHRASES = ("{}", "a picture of {}", "a drawing of {}", "an emoji of {}", "{} on a white background")
REFERENCES = "pictures.safetensors"  # in the demo's folder: latents [N, C, h, w] of the emoji, centred


@dataclass(frozen=True)
class Emoji:
    """One emoji.

    Attributes:
        file: Name of its picture without the extension: its code points.
        caption: What it shows: "a red apple".
        kind: The open caption that it answers too: "a fruit"; None for none.
        mirrored: Whether its training pictures are mirrored half of the time.
    """

    file: str
    caption: str
    kind: str | None
    mirrored: bool


@cache
def all_emoji() -> tuple[Emoji, ...]:
    """Return every emoji of emoji.txt, in its order."""
    emoji, kind, mirrored = [], None, False
    for line in Path(__file__).with_suffix(".txt").read_text("utf-8").splitlines():
        if line.startswith("["):
            kind, _, flag = line[1:].partition("]")
            kind, mirrored = None if kind == "-" else kind, flag.strip() == "mirrored"
        elif line and not line.startswith("#"):
            file, _, caption = line.partition(" ")
            emoji.append(Emoji(file, caption, kind, mirrored))
    return tuple(emoji)


@cache
def answers() -> dict[str, tuple[int, ...]]:
    """Return for every subject, an emoji's caption or a kind, the indices of the emoji that answer it."""
    subjects: dict[str, tuple[int, ...]] = {}
    for index, emoji in enumerate(all_emoji()):
        for subject in filter(None, (emoji.caption, emoji.kind)):
            subjects[subject] = (*subjects.get(subject, ()), index)
    return subjects


def is_open(subject: str) -> bool:
    """Return whether a subject leaves open which emoji to draw."""
    return len(answers()[subject]) > 1


def bare(subject: str) -> str:
    """Return a subject without its article."""
    return subject.removeprefix("a ").removeprefix("an ")


@cache
def captions() -> dict[str, tuple[int, ...]]:
    """Return the emoji that answer each caption of the grammar: every subject in every phrase, and without article."""
    known = {}
    for subject, indices in answers().items():
        for phrase in PHRASES:
            known[phrase.format(subject)] = indices
        known[bare(subject)] = indices
    return known


def parse(caption: str) -> tuple[int, ...] | None:
    """Return the indices of the emoji that a caption asks for, or None for any other text."""
    return captions().get(" ".join(caption.lower().split()))


def is_held_out(caption: str) -> bool:
    """Return whether plans are never calibrated on a caption: one in two, by its text. Training knows them all."""
    return int(hashlib.sha256(caption.encode()).hexdigest(), 16) % 2 == 0


def sample_captions(count: int, seed: int, held_out: bool = False, leave_open: bool = False) -> list[str]:
    """Return captions of the grammar; they repeat only where there are fewer than `count`.

    Args:
        count: Number of captions.
        seed: Of the choice.
        held_out: Whether to choose from the captions that plans are never calibrated on.
        leave_open: Whether to choose from the captions that leave open which emoji to draw.
    """
    texts = [phrase.format(s) for s in answers() if is_open(s) == leave_open for phrase in PHRASES]
    pool = [text for text in texts if is_held_out(text) == held_out]
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(pool)) for _ in range(-(-count // len(pool)))])
    return [pool[i] for i in order[:count]]


# --- which emoji a picture shows ---------------------------------------------------------------------------------


def centred(image: np.ndarray) -> np.ndarray:
    """Return a picture with what it shows in the middle of a white ground and its longest side CONTENT pixels.

    So pictures are compared without regard to position and size.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        uint8 [SIZE, SIZE, 3].
    """
    from PIL import Image

    shown = np.argwhere((image < 255 * WHITE).any(-1))
    if not len(shown):
        return np.full((SIZE, SIZE, 3), 255, np.uint8)
    (top, left), (bottom, right) = shown.min(0), shown.max(0) + 1
    scale = CONTENT / max(bottom - top, right - left)
    height, width = (max(round(scale * side), 1) for side in (bottom - top, right - left))
    content = Image.fromarray(image[top:bottom, left:right]).resize((width, height), Image.Resampling.LANCZOS)
    ground = np.full((SIZE, SIZE, 3), 255, np.uint8)
    y, x = (SIZE - height) // 2, (SIZE - width) // 2
    ground[y : y + height, x : x + width] = np.asarray(content)
    return ground


@torch.no_grad()
def latents_of(vae, images: Sequence[np.ndarray]) -> torch.Tensor:
    """Return the VAE's latents of pictures after `centred`, [N, C, h, w], float32 on the CPU."""
    weight = next(vae.parameters())
    batches = []
    for begin in range(0, len(images), 64):
        pixels = np.stack([centred(image) for image in images[begin : begin + 64]])
        batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(weight.device, weight.dtype) / 127.5 - 1
        batches.append(vae.encode(batch).latent_dist.mean.float().cpu())
    return torch.cat(batches)


def shown(vae, references: torch.Tensor, images: Sequence[np.ndarray]) -> list[int]:
    """Return the index of the emoji that each picture shows.

    Args:
        vae: Of the demo.
        references: Latents of one centred picture per emoji, [N, C, h, w].
        images: uint8 [H, W, 3] each.
    """
    mirrored = torch.tensor([emoji.mirrored for emoji in all_emoji()])
    flat = references.float().flatten(1)
    as_drawn = torch.cdist(latents_of(vae, images).flatten(1), flat)
    in_mirror = torch.cdist(latents_of(vae, [image[:, ::-1] for image in images]).flatten(1), flat)
    return torch.where(mirrored, torch.minimum(as_drawn, in_mirror), as_drawn).argmin(1).tolist()


def prompt_accuracy(captions: Sequence[str], images: Sequence[np.ndarray], pipe) -> float | None:
    """Return the share of pictures that show an emoji that their caption asks for: retrieval accuracy.

    Args:
        captions: N captions.
        images: N pictures, uint8 [H, W, 3].
        pipe: The demo's pipeline, loaded from its folder.

    Returns:
        In [0, 1]; None when a caption is not of the grammar, because its picture cannot be judged.

    Raises:
        UserError: The demo's folder has no latents of the emoji.
    """
    from safetensors.torch import load_file

    asked = [parse(caption) for caption in captions]
    if not asked or None in asked:
        return None
    path = Path(pipe.config.get("_name_or_path", "")) / REFERENCES
    if not path.is_file():
        raise UserError(f"{path} is missing, so this demo draws no emoji: train one with scripts/train/train_demo.py")
    references = load_file(path)["latents"]
    found = shown(pipe.vae, references, images)
    return float(np.mean([one in those for one, those in zip(found, asked, strict=True)]))
