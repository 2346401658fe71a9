"""The Gram matrix of trajectories: all that schedule planning needs of a model, a few hundred kilobytes.

A trajectory of T steps is z = [x_0 … x_T, v_0 … v_{T−1}], 2T + 1 vectors of one prompt's elements, and G = Σ z zᵀ over
the calibration prompts. Every question of the form "how well can these velocities reproduce that latent" is answered
by G alone. So one pass along the target's trajectory serves every budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

CHUNK = 2**16  # elements per matrix product


@dataclass(frozen=True)
class Gram:
    """The Gram matrix of trajectories of T steps.

    Attributes:
        matrix: G, float64 [2T+1, 2T+1], rows x_0 … x_T, then v_0 … v_{T−1}.
        elements: Elements of a latent x_i, summed over the prompts.
        prompts: Number of trajectories.
    """

    matrix: np.ndarray
    elements: int
    prompts: int

    @classmethod
    def of(cls, latents: Sequence[torch.Tensor], velocities: Sequence[torch.Tensor]) -> "Gram":
        """Return the Gram matrix of a batch.

        Args:
            latents: x_0 … x_T, T+1 tensors [B, …] of any float dtype, on any device.
            velocities: v_0 … v_{T−1}, T tensors of the same shape.

        Raises:
            ValueError: Other numbers of tensors.
        """
        if len(latents) != len(velocities) + 1:
            raise ValueError(f"{len(latents)} latents and {len(velocities)} velocities: T + 1 and T are needed")
        rows = [z.reshape(-1) for z in (*latents, *velocities)]
        matrix = np.zeros((len(rows), len(rows)))
        for start in range(0, rows[0].numel(), CHUNK):
            chunk = torch.stack([row[start : start + CHUNK].to("cpu", torch.float64) for row in rows])
            matrix += (chunk @ chunk.T).numpy()
        return cls(matrix, rows[0].numel(), len(latents[0]))

    @property
    def steps(self) -> int:
        """T."""
        return len(self.matrix) // 2

    def v(self, i: int | np.ndarray) -> int | np.ndarray:
        """Return the row of the velocity v_i; the row of the latents x_i is i itself."""
        return self.steps + 1 + i


def products(tensors: Sequence[torch.Tensor], free: torch.Tensor | None = None) -> np.ndarray:
    """Return all scalar products of R tensors [B, …] of one shape, per prompt, float64 [B, R, R].

    Args:
        tensors: On any device; they are brought to the CPU, since not every device has float64.
        free: The numbers that count, bool [B, …]; None for all.
    """
    rows = torch.stack([z.flatten(1).cpu().double() for z in tensors], 1)  # [B, R, elements]
    if free is not None:
        rows *= free.flatten(1)[:, None]
    return (rows @ rows.mT).numpy()
