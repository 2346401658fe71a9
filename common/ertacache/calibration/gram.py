"""The Gram matrix of trajectories: all that planning has to know of a model, a few hundred kilobytes of it.

A trajectory of T steps is z = [x_0 … x_T, v_0 … v_{T−1}], 2T + 1 vectors of one prompt's elements, and G = Σ z zᵀ over
the calibration prompts. Every question of the form "how near can these outputs come to that latent" is answered by G
alone, so one reference pass serves every budget, and matrices of several processes or files are simply added.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save

from ertacache.utils.errors import UserError
from ertacache.utils.files import write_atomically

CHUNK = 2**16  # elements that are multiplied at a time


@dataclass(frozen=True)
class Gram:
    """matrix: [2T+1, 2T+1] in float64, rows x_0 … x_T, then v_0 … v_{T−1}. elements: numbers in all latents x_i summed.

    prompts: how many trajectories are in it.
    """

    matrix: np.ndarray
    elements: int
    prompts: int

    @classmethod
    def of(cls, latents: Sequence[torch.Tensor], velocities: Sequence[torch.Tensor]) -> "Gram":
        """G of a batch. latents: T+1 tensors [B, …], velocities: T of the same shape; any float dtype and device."""
        if len(latents) != len(velocities) + 1:
            raise ValueError(f"{len(latents)} latents and {len(velocities)} velocities: T + 1 and T are needed")
        rows = [z.reshape(-1) for z in (*latents, *velocities)]
        matrix = np.zeros((len(rows), len(rows)))
        for start in range(0, rows[0].numel(), CHUNK):
            part = torch.stack([row[start : start + CHUNK].to("cpu", torch.float64) for row in rows])
            matrix += (part @ part.T).numpy()
        return cls(matrix, rows[0].numel(), len(latents[0]))

    def __add__(self, other: "Gram") -> "Gram":
        if self.matrix.shape != other.matrix.shape:
            raise UserError(f"Gram matrices of {self.steps} and {other.steps} steps: add those of one step count")
        return Gram(self.matrix + other.matrix, self.elements + other.elements, self.prompts + other.prompts)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.matrix) // 2

    def v(self, i):
        """Row of the velocity v_i (of x_i it is i)."""
        return self.steps + 1 + i

    def save(self, path: str | Path) -> None:
        counts = np.array([self.elements, self.prompts], np.int64)
        write_atomically(path, save({"matrix": self.matrix, "counts": counts}))

    @classmethod
    def load(cls, path: str | Path) -> "Gram":
        arrays = load_file(path)
        return cls(arrays["matrix"], *(int(n) for n in arrays["counts"]))


def products(tensors: Sequence[torch.Tensor]) -> np.ndarray:
    """All scalar products of R tensors [B, …] of one shape, in float64 and for each prompt: [B, R, R]."""
    rows = torch.stack([z.flatten(1).double() for z in tensors], 1)  # [B, R, elements]
    return (rows @ rows.mT).cpu().numpy()
