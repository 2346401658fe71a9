"""The loop on dx/ds = A x in two dimensions, where every answer is a product of matrices."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ertacache import Requirements, ThresholdPlan
from toy import Pipe, ToySampler

A = np.array([[0.8, 0.5], [-0.7, 0.3]])
EYE = np.eye(2)


def exponential(matrix):
    values, vectors = np.linalg.eig(matrix)
    return (vectors @ np.diag(np.exp(values)) @ np.linalg.inv(vectors)).real


def run(steps, plan=None):
    """Start and end of the loop, [rows, 2] in float64."""
    sampler, pipe = ToySampler(), Pipe(A)
    inputs = sampler.prepare(pipe, ["p"], [0], steps=steps)
    end = sampler.denoise(pipe, inputs, plan)
    return inputs.latents[0].double().numpy(), end[0].double().numpy()


def make_plan(steps, cached, **changes):
    requirements = Requirements(steps, {}, {}, {})
    native = tuple(np.linspace(1, 0, steps + 1).astype(np.float32).tolist())
    return ThresholdPlan(requirements, 0.1, cached, "output", native, **changes)


def test_uncached_steps_are_the_product_of_euler_matrices():
    start, end = run(4)
    wanted = np.linalg.matrix_power(EYE - A / 4, 4)
    assert np.allclose(end, start @ wanted.T, atol=1e-6)


def test_more_steps_come_nearer_to_the_exact_solution_at_first_order():
    errors = []
    for steps in (10, 20, 40, 80):
        start, end = run(steps)
        errors.append(np.abs(end - start @ exponential(-A).T).max())  # x(0) = exp(−A) x(1)
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    assert np.all((ratios > 1.8) & (ratios < 2.2))


def test_a_cached_step_is_the_matrix_that_eq_6_says():
    """Step 1 of 4 uses ṽ = x_1 + (A − 1) x_0, so x_2 = x_1 − (x_1 + (A − 1) x_0)/4."""
    start, end = run(4, make_plan(4, (1,)))
    x1 = EYE - A / 4
    x2 = x1 - (x1 + A - EYE) / 4
    assert np.allclose(end, start @ (np.linalg.matrix_power(EYE - A / 4, 2) @ x2).T, atol=1e-6)


def test_an_adjusted_grid_moves_the_steps():
    """φ_1 = ½ on T = 4: intervals 1/4, 1/8 and twice 5/16."""
    phi = (1.0, 0.5, 1.0, 1.0)
    start, end = run(4, make_plan(4, (1,), phi=phi, phi_definition="velocity"))
    x1 = EYE - A / 4
    x2 = x1 - (x1 + A - EYE) / 8
    assert np.allclose(end, start @ (np.linalg.matrix_power(EYE - A * 5 / 16, 2) @ x2).T, atol=1e-6)


def test_rectification_subtracts_the_line_that_the_plan_holds():
    """K = 0.4, B = −2: ṽ loses a tenth of itself."""
    plan = make_plan(4, (1,))
    plan = replace(plan, k=(0.0, 0.4, 0.0, 0.0), b=(-2.0,) * 4, rectified=True)
    start, end = run(4, plan)
    x1 = EYE - A / 4
    x2 = x1 - 0.9 * (x1 + A - EYE) / 4
    assert np.allclose(end, start @ (np.linalg.matrix_power(EYE - A / 4, 2) @ x2).T, atol=1e-6)


@pytest.mark.parametrize("steps", [3, 7, 30])
def test_an_empty_plan_equals_no_plan_exactly(steps):
    sampler, pipe = ToySampler(), Pipe(A)
    inputs = sampler.prepare(pipe, ["p"], [0], steps=steps)
    assert torch.equal(sampler.denoise(pipe, inputs, make_plan(steps, ())), sampler.denoise(pipe, inputs))
