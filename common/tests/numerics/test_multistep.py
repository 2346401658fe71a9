"""Predicted velocities as jumps: against a solver that is stepped, and against mathematics."""

import numpy as np
import pytest
import torch

from conftest import ROOT
from ertacache.demos.model_folder import load_model_folder
from ertacache.numerics.jump import jump
from ertacache.numerics.multistep import (
    chebyshev_ridge,
    extrapolated,
    first_order_matrix,
    predicted_jumps,
    reused,
    solver_matrix,
)
from toy import Pipe, ToySampler

STEPS = 12


def multistep_matrix(rng):
    """The matrix of a linear solver that uses the last three velocities, with coefficients of its own."""
    matrix = np.zeros((STEPS + 1, STEPS + 1))
    matrix[0, 0] = 1
    for i in range(STEPS):
        matrix[i + 1] = rng.uniform(0.9, 1.1) * matrix[i]
        for j in range(max(0, i - 2), i + 1):
            matrix[i + 1, 1 + j] += rng.normal()
    return matrix


@pytest.mark.parametrize("predictor", [reused, extrapolated])
def test_jumps_are_the_solver_with_predicted_velocities(predictor):
    rng, schedule = np.random.default_rng(0), (0, 1, 3, 4, 8, 10)
    solver, x0 = multistep_matrix(rng), torch.from_numpy(rng.normal(size=5))
    velocities = {c: torch.from_numpy(rng.normal(size=5)) for c in schedule}
    predicted = []
    for t in range(STEPS):
        known = tuple(c for c in schedule if c <= t)
        weights = [0.0] * (len(known) - 1) + [1.0] if t in known else predictor(known, t)
        predicted.append(sum(w * velocities[c] for w, c in zip(weights, known, strict=True)))
    final = solver[-1, 0] * x0 + sum(a * v for a, v in zip(solver[-1, 1:], predicted, strict=True))
    x, history = x0, []
    for c, row, scale in zip(schedule, *predicted_jumps(solver, schedule, predictor), strict=True):
        history = [velocities[c], *history]
        x = jump(x, history, row.tolist(), float(scale))
    assert torch.allclose(x.double(), final, atol=1e-5)


def test_reuse_of_euler_is_euler_on_fewer_steps():
    sigmas = np.linspace(1, 0, STEPS + 1) ** 2
    solver = first_order_matrix([(1.0, d) for d in np.diff(sigmas)])
    weights, scale = predicted_jumps(solver, (0, 2, 5, 9))
    assert np.allclose(weights[:, 0], np.diff(sigmas[[0, 2, 5, 9, 12]])) and weights.shape == (4, 1)
    assert scale.tolist() == [1, 1, 1, 1]


def test_first_order_steps_with_a_coefficient_on_the_latents():
    solver = first_order_matrix([(0.5, 2.0), (0.25, 3.0)])
    assert solver.tolist() == [[1, 0, 0], [0.5, 2, 0], [0.125, 0.5, 3]]
    weights, scale = predicted_jumps(solver, (0,))
    assert weights.tolist() == [[3.5]] and scale.tolist() == [0.125]


def test_the_solver_matrix_is_read_off_the_folders_own_loop():
    sampler, pipe = ToySampler(), Pipe(np.diag([0.3, -0.2]))
    inputs = sampler.prepare(pipe, ["a"], [0], steps=STEPS, warp=2.0)
    expected = first_order_matrix([sampler.first_order(pipe, inputs, i, i + 1) for i in range(STEPS)])
    assert np.allclose(solver_matrix(sampler, pipe, inputs), expected, atol=1e-6)
    low = solver_matrix(ToySampler(rows=1), pipe, ToySampler(rows=1).prepare(pipe, ["a"], [0], steps=STEPS, warp=2.0))
    assert np.allclose(low, expected, atol=1e-6)  # two numbers are too few: by its first-order steps


def test_a_plan_of_unipc_with_all_steps_is_the_uncached_run():
    wan = load_model_folder(ROOT / "ERTACache4Wan2.1")
    pipe = wan.load("demo")
    inputs = wan.prepare(pipe, ["a red circle moving up"], [0], **wan.settings_of(pipe, steps=6))
    solver, velocities = solver_matrix(wan, pipe, inputs), []
    final = wan.denoise(pipe, inputs, None, lambda i, x, v: velocities.append(v))
    weights, scale = predicted_jumps(solver, range(6))
    assert weights.shape[1] > 1 and np.allclose(scale, 1, atol=1e-5)  # of second order
    x, history = inputs.latents, []
    for v, row, a in zip(velocities, weights.tolist(), scale.tolist(), strict=True):
        history = [v, *history]
        x = jump(x, history, row, a)
    assert (x - final).abs().max() < 1e-4


def test_extrapolation_is_exact_for_outputs_linear_in_the_step():
    for computed, t in (((0, 1), 5), ((0, 2, 5), 7), ((0, 1, 2, 6), 9)):
        assert np.dot(extrapolated(computed, t), [3 - 2 * c for c in computed]) == pytest.approx(3 - 2 * t)
    assert extrapolated((0,), 3) == [1.0]


def test_spectrums_weights_are_a_ridge_regression():
    rng, computed = np.random.default_rng(0), (0, 1, 2, 3, 4, 7, 11, 16)
    values, steps, t = rng.normal(size=len(computed)), 20, 18
    powers = np.array(computed)
    for degree in range(5):  # polynomials up to m are reproduced as the ridge vanishes
        weights = chebyshev_ridge(computed, t, steps, 4, 1e-12)
        assert weights @ (powers / steps) ** degree == pytest.approx((t / steps) ** degree, abs=1e-6)
    # A direct solution: least squares with √λ I appended to the rows.
    basis = np.polynomial.chebyshev.chebvander(2 * powers / steps - 1, 4)
    rows, targets = np.vstack([basis, np.sqrt(0.1) * np.eye(5)]), np.append(values, np.zeros(5))
    coefficients = np.linalg.lstsq(rows, targets, rcond=None)[0]
    direct = np.polynomial.chebyshev.chebval(2 * t / steps - 1, coefficients)
    assert chebyshev_ridge(computed, t, steps, 4, 0.1) @ values == pytest.approx(direct)
