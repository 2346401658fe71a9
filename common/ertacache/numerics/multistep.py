"""A solver with some of its velocities predicted, written as the jumps of a budget plan.

Schedulers are linear in the first latents and the velocities that they are given:

    x_k = A_{k,0} x_0 + Σ_i A_{k,1+i} v_i                                                            (solver matrix)

A cache that predicts the velocity of a skipped step as a weighted sum of computed ones, v_t = Σ_j p_{t,j} v_{c_j}, and
lets the solver make all its T steps is linear too. From one computed step to the next it makes the jump

    x_{c_{k+1}} = a x_{c_k} + Σ_j w_j v_{c_j}.

So whatever reuses or extrapolates outputs on a fixed schedule is a budget plan. Everything is numpy in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

NEGLIGIBLE = 1e-7  # of the largest weight of a plan: rounding of a solver that computes in float32
SMALLEST = 1e-6  # least coefficient of the first latents that the next jump is expressed by

Predictor = Callable[[tuple[int, ...], int], Sequence[float]]
"""predictor(computed, t): weights of the velocities of all steps computed so far, oldest first, that predict v_t."""


# --- the solver ------------------------------------------------------------------------------------------------------


def first_order_matrix(steps: Sequence[tuple[float, float]]) -> np.ndarray:
    """Return the solver matrix [T+1, 1+T] of first-order steps x_{i+1} = a x_i + w v_i.

    Args:
        steps: (a, w), T pairs.
    """
    matrix = np.zeros((len(steps) + 1, len(steps) + 1))
    matrix[0, 0] = 1.0
    for i, (a, w) in enumerate(steps):
        matrix[i + 1] = a * matrix[i]
        matrix[i + 1, 1 + i] += w
    return matrix


@torch.no_grad()
def solver_matrix(sampler, pipe, inputs) -> np.ndarray:
    """Return the solver matrix [T+1, 1+T] of a model folder's own solver, whatever its order.

    Its loop runs once, T model calls whose results are thrown away: the numbers of the latents do not see each other in
    a solver, so one number stands for x_0 and one for each velocity. Where the latents are of low precision or fewer
    than that, and where the solver is not linear (it draws noise), the matrix is that of first-order steps.

    Args:
        sampler: The model folder.
        pipe: The pipeline.
        inputs: Of one prompt.
    """
    steps, latents = len(inputs.times), inputs.latents
    if latents.dtype == torch.float32 and latents.numel() >= steps + 2:
        rows: list[np.ndarray] = []

        def basis(number: int) -> torch.Tensor:
            values = torch.zeros(latents.numel())
            values[number] = 1.0
            return values.view(latents.shape).to(latents)

        def on_step(i: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            rows.append(x.flatten()[: steps + 2].double().cpu().numpy())
            return basis(1 + i).to(v)

        final = sampler.denoise(pipe, replace(inputs, latents=basis(0)), None, on_step)
        rows.append(final.flatten()[: steps + 2].double().cpu().numpy())
        matrix = np.stack(rows)
        if np.isfinite(matrix).all() and not matrix[:, -1].any():  # a number that nothing was put into stays 0
            return matrix[:, :-1]
    return first_order_matrix([sampler.first_order(pipe, inputs, i, i + 1) for i in range(steps)])


# --- predictions -----------------------------------------------------------------------------------------------------


def reused(computed: tuple[int, ...], t: int) -> list[float]:
    """Return the weights of the last computed velocity: reuse, of order zero."""
    return [0.0] * (len(computed) - 1) + [1.0]


def extrapolated(computed: tuple[int, ...], t: int) -> list[float]:
    """Return the weights of v_j + (v_j − v_i) / (j − i) · (t − j), i < j the last two computed steps; reuse of one."""
    if len(computed) == 1:
        return [1.0]
    i, j = computed[-2:]
    slope = (t - j) / (j - i)
    return [0.0] * (len(computed) - 2) + [-slope, 1 + slope]


def chebyshev_ridge(computed: Sequence[int], t: int, steps: int, degree: int, ridge: float) -> np.ndarray:
    """Return the weights of velocities in the prediction of v_t by ridge regression on Chebyshev polynomials.

    With τ = 2 i / T − 1, Φ_{ij} = T_j(τ_i) for j = 0 … m and φ the same at t: φ (ΦᵀΦ + λ I)⁻¹ Φᵀ.

    Args:
        computed: Steps i of the velocities.
        t: The step to predict.
        steps: T.
        degree: m.
        ridge: λ.
    """
    tau = 2 * np.array([*computed, t], float) / steps - 1
    basis = np.polynomial.chebyshev.chebvander(tau, degree)
    known, wanted = basis[:-1], basis[-1]
    return np.linalg.solve(known.T @ known + ridge * np.eye(degree + 1), wanted) @ known.T


# --- jumps -----------------------------------------------------------------------------------------------------------


def predicted_jumps(
    solver: np.ndarray, schedule: Sequence[int], predictor: Predictor = reused
) -> tuple[np.ndarray, np.ndarray]:
    """Return the jumps of a solver that is given predicted velocities on skipped steps.

    Args:
        solver: Solver matrix, [T+1, 1+T].
        schedule: N computed steps, ascending from 0.
        predictor: Of the skipped velocities.

    Returns:
        Weights [N, H], newest velocity first, with the least H that holds them all, and scales [N].
    """
    steps, count = len(solver) - 1, len(schedule)
    predictions = np.zeros((steps, count))
    for j, (c, end) in enumerate(zip(schedule, [*schedule[1:], steps], strict=True)):
        predictions[c, j] = 1.0
        for t in range(c + 1, end):
            predictions[t, : j + 1] = predictor(tuple(schedule[: j + 1]), t)
    latents = solver[:, 1:] @ predictions  # [T+1, N], of the velocities in the latents at each step
    ends = [*schedule, steps]
    scale, rows = np.ones(count), np.zeros((count, count))
    for k in range(count):
        now, after = ends[k], ends[k + 1]
        if abs(solver[now, 0]) < SMALLEST:
            raise ValueError(f"the latents at step {now} do not contain the first ones: no jump begins there")
        scale[k] = solver[after, 0] / solver[now, 0]
        rows[k, : k + 1] = (latents[after] - scale[k] * latents[now])[k::-1]
    used = np.abs(rows).max(0) > NEGLIGIBLE * np.abs(rows).max()
    return rows[:, : int(used.nonzero()[0].max()) + 1], np.where(np.abs(scale - 1) < NEGLIGIBLE, 1.0, scale)
