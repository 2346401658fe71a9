"""A denoising problem with an exact solution: it needs no training, and is as hard as one likes.

The data are M points x⁽ᵐ⁾ smoothed by a Gaussian of width b. For x = a x₀ + s n, with a = 1 − s, the flow-matching
velocity E[n − x₀ | x] is known. With var = s² + (a b)²:

    w_m ∝ exp(−‖x − a x⁽ᵐ⁾‖² / (2 var)),   m̄ = Σ_m w_m x⁽ᵐ⁾,   v = ((s − a b²) x − s m̄) / var

A caption asks for some of the points. With w_c over those and w_u over all, guidance g takes w_u + g (w_c − w_u) for
w. A small b makes decisions sudden, a large g overshoots: both make trajectories stiff, as those of real models are.

The points are the first frames of all moving scenes. A caption names colour and shape, or leaves one of them open.
"""

import hashlib
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from ertacache.demos import moving_scenes

SIDE = 16  # height and width of an image, pixels


class ClosedFormDenoiser(torch.nn.Module):
    """The exact velocity of smoothed points.

    Args:
        points: The data, [M, D].
        members: Which points each caption asks for, bool [K, M].
        spread: b, the width of the Gaussian, at least 0.
        name: Of the data, for `config`.
    """

    def __init__(self, points: torch.Tensor, members: torch.Tensor, spread: float, name: str = "points"):
        super().__init__()
        self.points = torch.nn.Parameter(points, requires_grad=False)
        self.register_buffer("norms", points.square().sum(1))
        self.register_buffer("others", ~members)
        self.spread = spread
        self.config = {"data": name, "points": len(points), "size": points.shape[1], "spread": spread}

    @property
    def dtype(self) -> torch.dtype:
        return self.points.dtype

    def forward(self, x: torch.Tensor, s: torch.Tensor, asked: torch.Tensor, guidance: float) -> torch.Tensor:
        """Return v [B, D].

        Args:
            x: Noised data, [B, D].
            s: Noise level, a scalar in [0, 1]; above 0 where b = 0.
            asked: Index of the caption of each row, [B].
            guidance: g; 1 for the caption alone.
        """
        a, b2 = 1 - s, self.spread**2
        var = s**2 + a**2 * b2
        # −‖x − a p‖² / (2 var) up to what is equal for all points.
        logits = (a * (x @ self.points.T) - 0.5 * a**2 * self.norms) / var  # [B, M]
        weights = logits.masked_fill(self.others[asked], -torch.inf).softmax(1)
        if guidance != 1:
            weights = torch.lerp(logits.softmax(1), weights, guidance)
        return ((s - a * b2) * x - s * (weights @ self.points)) / var


@cache
def all_points() -> torch.Tensor:
    """Return the data: images in [−1, 1], float32 [M, 3 · SIDE · SIDE] in the order [C, H, W]."""
    rng = np.random.default_rng(0)
    frames = [moving_scenes.render(scene, rng, 1, SIDE, SIDE)[0] for scene in moving_scenes.all_scenes()]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).flatten(1).float() / 127.5 - 1


@cache
def captions() -> dict[str, tuple[int, ...]]:
    """Return the points that each caption asks for."""
    known: dict[str, list[int]] = {}
    for index, scene in enumerate(moving_scenes.all_scenes()):
        shape = moving_scenes.with_article(f"{scene.colour} {scene.shape}")
        for caption in (shape, f"a {scene.shape}", f"something {scene.colour}"):
            known.setdefault(caption, []).append(index)
    return {caption: tuple(indices) for caption, indices in known.items()}


def is_open(caption: str) -> bool:
    """Return whether a caption leaves colour or shape open."""
    return len(caption.split()) == 2


def is_held_out(caption: str) -> bool:
    """Return whether plans are never calibrated on a caption: one in two, by its text."""
    return int(hashlib.sha256(caption.encode()).hexdigest(), 16) % 2 == 0


def sample_captions(count: int, seed: int, held_out: bool = False, leave_open: bool = False) -> list[str]:
    """Return captions; they repeat where there are fewer than `count`. Arguments: `Grammar` in model_folder.py."""
    pool = [text for text in captions() if is_held_out(text) == held_out and is_open(text) == leave_open]
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(pool)) for _ in range(-(-count // len(pool)))])
    return [pool[i] for i in order[:count]]


def prompt_accuracy(prompts: Sequence[str], images: Sequence[np.ndarray], pipe=None) -> float | None:
    """Return the share of images whose nearest point their caption asks for; None for texts that are no captions."""
    if not prompts or not all(prompt in captions() for prompt in prompts):
        return None
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).flatten(1).float() / 127.5 - 1
    nearest = torch.cdist(pixels, all_points()).argmin(1).tolist()
    return float(np.mean([index in captions()[prompt] for index, prompt in zip(nearest, prompts, strict=True)]))
