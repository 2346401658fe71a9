"""The finely integrated solution: what the T steps of the uncached run approximate, and a budget plan may aim at.

A flow model's v is dx/ds, up to a constant factor; for v-prediction it is dx/dθ, and θ is the noise level that the
folder counts in. So one explicit method serves all: Ralston's third-order one, which never asks the model for a
velocity at the end of an interval, because models are not trained at the data itself (s = 0).
"""

import numpy as np
import torch

from ertacache.utils.errors import UserError

STAGES = (0.0, 0.5, 0.75)  # of an interval (Ralston 1962): k₂ starts from k₁, k₃ from k₂
SHARES = (2 / 9, 1 / 3, 4 / 9)  # of k₁, k₂, k₃ in the step
SETTLED = 1e-6  # −60 dB: how little the final latents may move, relative to their mean square, when substeps double
MOST_SUBSTEPS = 64
CANDIDATES = 2  # intervals of the candidate grid for each of the T steps
SETTLING_PROMPTS = 2  # that the number of substeps is found on


def candidate_grid(sigmas: torch.Tensor, steps: int) -> torch.Tensor:
    """`steps` equal intervals of the noise level between the ends of a native grid: free of the pipeline's shift."""
    grid = np.linspace(sigmas[0].item(), sigmas[-1].item(), steps + 1)
    return torch.from_numpy(grid).to(sigmas)


def shifted_grid(sigmas: torch.Tensor, steps: int, shift: float) -> torch.Tensor:
    """The same with a shift: s → shift · s / (1 + (shift − 1) s), denser near the noise for shift > 1."""
    s = candidate_grid(sigmas, steps) / sigmas[0]
    return sigmas[0] * shift * s / (1 + (shift - 1) * s)


def rate_of(program, pipe, inputs) -> float:
    """dx/ds = rate · v: the solver's own w over the interval, or for a rotation (a ≠ 1) its angle."""
    a, w = program.first_order(pipe, inputs, 0, 1)
    return (np.arctan2(w, a) if a != 1.0 else w) / (inputs.sigmas[1] - inputs.sigmas[0]).item()


@torch.no_grad()
def integrate(program, pipe, inputs, sigmas: torch.Tensor, rate: float, substeps: int, on_step=None) -> torch.Tensor:
    """Solve dx/ds = rate · v from sigmas[0] to sigmas[-1], each interval in `substeps` parts of three model calls.

    sigmas: [M+1], falling. rate: +1 for v = noise − data. on_step(i, x, v): sees latents and velocity at sigmas[i] for
    each i < M. Returns the final latents, float32.
    """
    parts = np.linspace(0, 1, substeps, endpoint=False)
    ends = sigmas.double().cpu().numpy()
    starts = (ends[:-1, None] + np.diff(ends)[:, None] * parts).reshape(-1)  # [M · substeps]
    lengths = np.diff([*starts, ends[-1]])
    stages = (starts[:, None] + lengths[:, None] * np.array(STAGES)).reshape(-1)
    times = inputs.on(torch.from_numpy(np.append(stages, ends[-1])).to(sigmas)).times
    x = inputs.latents.float()
    for place, h in enumerate(rate * lengths):
        total, y = x, x
        for stage, (share, following) in enumerate(zip(SHARES, (*STAGES[1:], 0.0), strict=True)):
            v = program.velocity(pipe, inputs, y.to(inputs.latents.dtype), times[3 * place + stage]).float()
            if stage == 0 and place % substeps == 0 and on_step is not None:
                on_step(place // substeps, x, v)
            total, y = total + share * h * v, x + following * h * v
        x = total
    return x


def settled_substeps(program, pipe, inputs, sigmas: torch.Tensor, rate: float) -> int:
    """The first of 1, 2, 4, … substeps that twice as many move by less than −60 dB of the latents' mean square.

    inputs: of a few prompts; the others are then integrated with as many substeps.
    """
    substeps, coarse = 1, integrate(program, pipe, inputs, sigmas, rate, 1)
    while substeps < MOST_SUBSTEPS:
        fine = integrate(program, pipe, inputs, sigmas, rate, 2 * substeps)
        if (fine - coarse).square().mean() <= SETTLED * fine.square().mean():
            return substeps
        substeps, coarse = 2 * substeps, fine
    raise UserError(f"the trajectory does not settle with {substeps} substeps an interval: is the model well trained?")
