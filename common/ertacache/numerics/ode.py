"""The ODE's solution by fine integration: what the uncached run approximates, and a budget plan may aim at.

A flow-matching model's v is dx/ds, up to a constant factor; for v-prediction v is dx/dθ, and θ takes the place of the
noise level. So one explicit method serves all models. Ralston's third-order method never evaluates the velocity at the
end of an interval, which matters because models are not trained at the data itself (s = 0).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ertacache.utils.errors import UserError

NODES = (0.0, 0.5, 0.75)  # of k₁, k₂, k₃, as fractions of an interval (Ralston 1962); k₂ starts from k₁, k₃ from k₂
WEIGHTS = (2 / 9, 1 / 3, 4 / 9)  # of k₁, k₂, k₃ in the step
TOLERANCE = 1e-6  # −60 dB: mean square change of the final latents when substeps double, relative to their mean square
MAX_SUBSTEPS = 64
CANDIDATES = 2  # intervals of the candidate grid for each of the T steps
SETTLING_PROMPTS = 2  # number of prompts on which the number of substeps is determined


def candidate_grid(sigmas: torch.Tensor, steps: int) -> torch.Tensor:
    """Return a grid of equal intervals between the ends of a native one, free of the pipeline's shift.

    Args:
        sigmas: The native grid, [T+1].
        steps: M, the number of intervals.

    Returns:
        Sigmas, [M+1], falling.
    """
    grid = np.linspace(sigmas[0].item(), sigmas[-1].item(), steps + 1)
    return torch.from_numpy(grid).to(sigmas)


def shifted_grid(sigmas: torch.Tensor, steps: int, shift: float) -> torch.Tensor:
    """Return the candidate grid with a shift: s → shift · s / (1 + (shift − 1) s).

    Args:
        sigmas: The native grid, [T+1].
        steps: M, the number of intervals.
        shift: Above 1 the grid is denser near the noise.

    Returns:
        Sigmas, [M+1], falling.
    """
    s = candidate_grid(sigmas, steps) / sigmas[0]
    return sigmas[0] * shift * s / (1 + (shift - 1) * s)


def rate_of(sampler, pipe, inputs) -> float:
    """Return the rate in dx/ds = rate · v, from the solver's first-order jump over the first interval.

    For flow matching it is w / Δs of x' = x + w v; for a rotation (a ≠ 1) its angle / Δs.
    """
    a, w = sampler.first_order(pipe, inputs, 0, 1)
    return (np.arctan2(w, a) if a != 1.0 else w) / (inputs.sigmas[1] - inputs.sigmas[0]).item()


@torch.no_grad()
def integrate(
    sampler,
    pipe,
    inputs,
    sigmas: torch.Tensor,
    rate: float,
    substeps: int,
    on_step: Callable[[int, torch.Tensor, torch.Tensor], Any] | None = None,
) -> torch.Tensor:
    """Solve dx/ds = rate · v from sigmas[0] to sigmas[-1], three model calls per substep.

    Args:
        sampler: A model folder's.
        pipe: The pipeline.
        inputs: Initial noise and conditioning, of `sampler.prepare`.
        sigmas: The grid, [M+1], falling.
        rate: Of `rate_of`; +1 for v = noise − data.
        substeps: Substeps per interval of the grid.
        on_step: Called as on_step(i, x, v) with latents and velocity at sigmas[i], for each i < M.

    Returns:
        The final latents [B, …], float32.
    """
    fractions = np.linspace(0, 1, substeps, endpoint=False)
    ends = sigmas.cpu().double().numpy()
    starts = (ends[:-1, None] + np.diff(ends)[:, None] * fractions).reshape(-1)  # [M · substeps]
    lengths = np.diff([*starts, ends[-1]])
    stages = (starts[:, None] + lengths[:, None] * np.array(NODES)).reshape(-1)  # [M · substeps · 3]
    times = inputs.on(torch.from_numpy(np.append(stages, ends[-1])).to(sigmas)).times
    x = inputs.latents.float()
    for n, h in enumerate(rate * lengths):
        total, y = x, x
        for stage, (weight, next_node) in enumerate(zip(WEIGHTS, (*NODES[1:], 0.0), strict=True)):
            v = sampler.velocity(pipe, inputs, y.to(inputs.latents.dtype), times[3 * n + stage]).float()
            if stage == 0 and n % substeps == 0 and on_step is not None:
                on_step(n // substeps, x, v)
            total, y = total + weight * h * v, x + next_node * h * v
        x = total
    return x


def settled_substeps(sampler, pipe, inputs, sigmas: torch.Tensor, rate: float) -> int:
    """Return the first of 1, 2, 4, … substeps at which doubling them changes the final latents by less than −60 dB.

    Args:
        sampler: A model folder's.
        pipe: The pipeline.
        inputs: Of a few prompts; the result serves for the others too.
        sigmas: The grid, [M+1], falling.
        rate: Of `rate_of`.

    Raises:
        UserError: The solution does not settle with `MAX_SUBSTEPS`.
    """
    substeps, coarse = 1, integrate(sampler, pipe, inputs, sigmas, rate, 1)
    while substeps < MAX_SUBSTEPS:
        fine = integrate(sampler, pipe, inputs, sigmas, rate, 2 * substeps)
        if (fine - coarse).square().mean() <= TOLERANCE * fine.square().mean():
            return substeps
        substeps, coarse = 2 * substeps, fine
    raise UserError(f"the trajectory does not settle with {substeps} substeps per interval: is the model well trained?")
