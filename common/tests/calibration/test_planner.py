"""Schedules and weights on problems that can be solved by hand or by trying everything."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from ertacache.calibration.gram import Gram
from ertacache.calibration.planner import (
    START_NOISE,
    adams_bashforth_weights,
    balanced,
    bent_schedule,
    best_schedules,
    candidate_schedules,
    euler_weights,
    fitted_predictor,
    jump_costs,
    late_start_weights,
    neighbours,
    noise_gain,
    offline_weights,
    projection_bound,
    robust_weights,
    solve_weights,
    uniform_schedule,
)
from ertacache.numerics.multistep import first_order_matrix, predicted_jumps


def trajectory(steps, seed=0, batch=3, size=40):
    """An Euler run through random outputs that change slowly, more at the beginning than at the end."""
    rng = np.random.default_rng(seed)
    x, latents, velocities, v = rng.normal(size=(batch, size)), [], [], rng.normal(size=(batch, size))
    for i in range(steps):
        v = v + rng.normal(size=(batch, size)) * 0.5 / (1 + i)
        latents.append(torch.from_numpy(x))
        velocities.append(torch.from_numpy(v))
        x = x - v / steps
    return [*latents, torch.from_numpy(x)], velocities


def gram_of(steps, seed=0):
    return Gram.of(*trajectory(steps, seed))


def residual(latents, velocities, history, target):
    """‖(x_k − x_c) − projection on the outputs of the history‖², by a library's least squares."""
    y = (latents[target] - latents[history[0]]).flatten().numpy()
    basis = np.stack([velocities[c].flatten().numpy() for c in history], 1)
    return np.square(y - basis @ np.linalg.lstsq(basis, y, rcond=None)[0]).sum()


# --- the Gram matrix -----------------------------------------------------------------------------------------------


def test_gram_holds_the_scalar_products():
    latents, velocities = trajectory(4)
    gram = Gram.of(latents, velocities)
    assert gram.steps == 4 and gram.prompts == 3 and gram.elements == 120
    assert gram.matrix[1, gram.v(2)] == pytest.approx((latents[1] * velocities[2]).sum().item(), rel=1e-12)


# --- costs and schedules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history_length", [1, 2, 3])
def test_costs_are_least_squares(history_length):
    latents, velocities = trajectory(6)
    costs = jump_costs(Gram.of(latents, velocities), history_length)
    none = 6
    cases = [(4, 2, 1), (5, 4, 3), (2, 0), (0,)]
    for case in cases:
        history = case[:history_length]
        if len(history) < history_length and history[-1] != 0:
            continue
        place = (*history, *[none] * (history_length - len(history)))
        for target in range(history[0] + 1, 7):
            wanted = residual(latents, velocities, history, target)
            assert costs[(*place, target)] == pytest.approx(wanted, rel=1e-3, abs=1e-6)
        assert np.isinf(costs[(*place, history[0])])


def cost_of(costs, schedule):
    history_length, none = costs.ndim - 1, len(costs) - 1
    jumps = []
    for n, target in enumerate([*schedule[1:], none], start=1):
        history = schedule[max(0, n - history_length) : n][::-1]
        jumps.append(costs[(*history, *[none] * (history_length - len(history)), target)])
    return sum(jumps)


@pytest.mark.parametrize("history_length", [1, 2, 3])
def test_dynamic_programming_equals_trying_everything(history_length):
    costs = jump_costs(gram_of(8, seed=1), history_length)
    found = best_schedules(costs, 8)
    for budget in range(1, 9):
        all_schedules = [(0, *rest) for rest in combinations(range(1, 8), budget - 1)]
        least = min(cost_of(costs, schedule) for schedule in all_schedules)
        assert found[budget] in all_schedules
        assert cost_of(costs, found[budget]) == pytest.approx(least, rel=1e-9, abs=1e-12)


def test_steps_go_where_the_outputs_change():
    """Outputs change in the first third only: that is where the steps of least cost belong, all but the newest."""
    rng = np.random.default_rng(0)
    v = [rng.normal(size=(1, 50))]
    for i in range(29):
        v.append(v[-1] + (rng.normal(size=(1, 50)) if i < 9 else 0))
    x = np.cumsum([rng.normal(size=(1, 50)), *(-u / 30 for u in v)], axis=0)
    gram = Gram.of([torch.from_numpy(a) for a in x], [torch.from_numpy(u) for u in v])
    schedules = {name: s for name, s in candidate_schedules(gram, [11])[11].items() if "least cost" in name}
    assert schedules and all(schedule[:10] == tuple(range(10)) for schedule in schedules.values())


def test_candidates_have_the_size_that_was_asked_for_and_differ():
    found = candidate_schedules(gram_of(12), [2, 5, 12])
    for budget, schedules in found.items():
        assert all(len(s) == budget and s[0] == 0 and list(s) == sorted(set(s)) for s in schedules.values())
        assert len(set(schedules.values())) == len(schedules)
    assert set(found[12].values()) == {tuple(range(12))}


def test_neighbours_move_one_step_by_one_or_two_late_ones_first():
    assert neighbours((0, 2, 3), 6) == [(0, 2, 4), (0, 1, 2), (0, 2, 5), (0, 1, 3), (0, 3, 4)]
    assert neighbours((0,), 6) == []


def test_a_prompt_with_larger_errors_does_not_place_the_steps():
    """One prompt whose velocities are 30 times as large and change late: the other five change early."""

    def gram(seed, late, size=1.0):
        rng = np.random.default_rng(seed)
        v = [size * rng.normal(size=(1, 60))]
        for i in range(23):
            v.append(v[-1] + size * rng.normal(size=(1, 60)) * (1.0 if (i < 8) != late else 0.01))
        x = np.cumsum([rng.normal(size=(1, 60)), *(-u / 24 for u in v)], axis=0)
        return Gram.of([torch.from_numpy(a) for a in x], [torch.from_numpy(u) for u in v])

    grams = [gram(seed, late=False) for seed in range(5)] + [gram(5, late=True, size=30.0)]
    assert np.allclose(balanced([grams[0]] * 3).matrix, 3 * grams[0].matrix)
    added = replace(grams[0], matrix=sum(g.matrix for g in grams))
    schedules = [best_schedules(jump_costs(g, 2), 8)[8] for g in (added, balanced(grams))]
    early = [sum(step < 9 for step in schedule) for schedule in schedules]
    assert early[0] <= 3 and early[1] >= 5


def test_uniform_and_bent_schedules_are_among_the_candidates():
    found = set(candidate_schedules(gram_of(12), [4])[4].values())
    assert {(0, 3, 6, 9), (0, 4, 7, 11), bent_schedule(12, 4, 0.75), bent_schedule(12, 4, 1.5)} <= found
    assert uniform_schedule(30, 6) == (0, 5, 10, 15, 20, 25)


def test_bent_schedules():
    assert bent_schedule(30, 6, 1.0) == (0, 6, 12, 17, 23, 29)
    assert bent_schedule(30, 6, 1.5) == (0, 8, 16, 22, 26, 29)  # 29 (1 − (1 − j/5)^1.5) is 0, 8.2, 15.5, 21.7, 26.4, 29
    assert bent_schedule(30, 6, 0.75) == (0, 4, 9, 14, 20, 29)
    for power in (0.5, 0.75, 1.0, 1.5, 4.0):
        for budget in range(2, 31):
            schedule = bent_schedule(30, budget, power)
            assert len(schedule) == budget and list(schedule) == sorted(set(schedule))
            assert schedule[0] == 0 and schedule[-1] == 29


# --- weights -------------------------------------------------------------------------------------------------------


def test_fewer_euler_steps_as_weights():
    weights = euler_weights(np.array([1.0, 0.7, 0.5, 0.2, 0.0]), (0, 2), 3)
    assert np.allclose(weights, [[-0.5, 0, 0], [-0.5, 0, 0]])


def test_fitted_weights_are_never_worse_than_the_prior():
    rng = np.random.default_rng(0)
    for rank in (1, 3):  # also with velocities that are nearly equal
        basis = rng.normal(size=(100, rank)) @ rng.normal(size=(rank, 3)) + 1e-9 * rng.normal(size=(100, 3))
        y, prior = rng.normal(size=100), np.array([-0.3, 0.0, 0.0])
        weights = solve_weights(basis.T @ basis, basis.T @ y, prior)
        assert np.square(y - basis @ weights).sum() <= np.square(y - basis @ prior).sum() * (1 + 1e-12)
        assert np.abs(weights).max() < 1e3


def problems(prompts, noisy=()):
    """VᵀV, Vᵀy and ‖y‖² of prompts with one solution, up to little noise; in `noisy` ones y is noise alone."""
    rng, right = np.random.default_rng(0), np.array([-0.4, 0.1, 0.05])
    basis = rng.normal(size=(prompts, 200, 3))
    y = basis @ right + 1e-3 * rng.normal(size=(prompts, 200))
    for p in noisy:
        y[p] = 20 * rng.normal(size=200)
    arrays = (np.einsum("pna,pnb->pab", basis, basis), np.einsum("pna,pn->pa", basis, y), np.square(y).sum(1))
    return arrays, right, lambda w: np.square(y - basis @ w).sum(1)


def test_robust_weights_are_least_squares_where_prompts_agree():
    (normals, moments, squares), right, _ = problems(1)
    prior = np.array([-0.3, 0.0, 0.0])
    assert np.allclose(
        robust_weights(normals, moments, squares, prior), solve_weights(normals[0], moments[0], prior), atol=1e-9
    )
    assert np.allclose(robust_weights(*problems(6)[0], prior), right, atol=1e-3)


def test_robust_weights_do_not_follow_one_prompt_that_tips():
    arrays, right, errors = problems(6, noisy=[2])
    prior = np.array([-0.3, 0.0, 0.0])
    least, robust = solve_weights(arrays[0].sum(0), arrays[1].sum(0), prior), robust_weights(*arrays, prior)
    assert np.abs(robust - right).max() < 1e-3 < 10 * np.abs(least - right).max()
    assert np.log(errors(robust)).sum() < min(np.log(errors(w)).sum() for w in (least, prior, right))


def test_the_noise_gain_is_that_of_noisy_velocities():
    sigmas = np.array([1.0, 0.6, 0.5, 0.2, 0.0])
    euler = euler_weights(sigmas, (0, 1, 2, 3), 2)
    assert noise_gain(euler, np.ones(4)) == pytest.approx(np.sqrt(np.square(np.diff(sigmas)).sum()))
    rng = np.random.default_rng(0)
    weights, scale, noise = rng.normal(size=(5, 3)), rng.uniform(0.5, 1.5, 5), rng.normal(size=(5, 200_000))
    x = np.zeros(200_000)
    for k in range(5):
        x = scale[k] * x + sum(weights[k, j] * noise[k - j] for j in range(min(3, k + 1)))
    assert noise_gain(weights, scale) == pytest.approx(x.std(), rel=1e-2)


def test_the_bound_is_the_projection_on_all_outputs():
    latents, velocities = trajectory(6)
    gram = Gram.of(latents, velocities)
    wanted = residual([latents[0]] * 6 + [latents[6]], velocities, (0, 3, 5), 6) / gram.elements
    assert projection_bound(gram, (0, 3, 5)) == pytest.approx(wanted, rel=1e-6)
    assert projection_bound(gram, tuple(range(6))) < 1e-12


def test_adams_bashforth_is_exact_for_linear_outputs():
    """∫ s ds from 1 to 0 on an uneven grid, from the second step on."""
    sigmas = np.array([1.0, 0.8, 0.35, 0.1, 0.0])
    weights = adams_bashforth_weights(sigmas)
    for k in range(1, 4):
        jump = weights[k, 0] * sigmas[k] + weights[k, 1] * sigmas[k - 1]
        assert jump == pytest.approx((sigmas[k + 1] ** 2 - sigmas[k] ** 2) / 2, abs=1e-12)
    assert np.allclose(weights.sum(1), np.diff(sigmas))


def test_weights_without_a_rollout_are_least_squares_on_the_uncached_run():
    latents, velocities = trajectory(8)
    gram, schedule = Gram.of(latents, velocities), (0, 2, 5)
    weights, _ = offline_weights(gram, schedule, 2)
    found = latents[8] - latents[5] - weights[2, 0] * velocities[5] - weights[2, 1] * velocities[2]
    assert found.square().sum().item() == pytest.approx(residual(latents, velocities, (5, 2), 8), rel=1e-3)


def test_late_starts_trust_their_first_velocity_less():
    """The first jump is least squares on one velocity, later ones on two; in the second, the very first velocity has an
    error of its own."""
    latents, velocities = trajectory(8)
    gram, schedule = Gram.of(latents, velocities), (2, 4, 5, 7)
    weights, scale = late_start_weights(gram, schedule, 3)
    assert weights.shape == (3, 3) and np.array_equal(scale, np.ones(3)) and not weights[2, 2]
    for j, history, target in ((0, (2,), 4), (2, (5, 4), 7)):
        jumped = sum(w * velocities[c] for w, c in zip(weights[j], history, strict=False))
        error = (latents[target] - latents[history[0]] - jumped).square().sum().item()
        assert error == pytest.approx(residual(latents, velocities, history, target), rel=1e-3)
    noise = START_NOISE * (velocities[3] - velocities[2]).square().sum().item()
    basis = np.stack([velocities[c].flatten().numpy() for c in (4, 2)], 1)
    y = (latents[5] - latents[4]).flatten().numpy()
    extended = np.concatenate([basis, [[0, noise**0.5]]])  # as a row of data that says that the weight is 0
    wanted = np.linalg.lstsq(extended, np.append(y, 0.0), rcond=None)[0]
    assert np.allclose(weights[1, :2], wanted, atol=1e-4)


def test_late_starts_of_solvers_with_a_coefficient_on_the_latents():
    latents, velocities = trajectory(6)
    weights, scale = late_start_weights(Gram.of(latents, velocities), (4,), 2, scaled=True)
    jump = scale[0] * latents[4] + weights[0, 0] * velocities[4]
    alone, _ = late_start_weights(Gram.of(latents, velocities), (4,), 2)
    assert (jump - latents[6]).norm() <= (latents[4] + alone[0, 0] * velocities[4] - latents[6]).norm()
    assert not weights[1].any() and scale[1] == 1


def test_fitted_prediction_is_exact_where_velocities_are_combinations_of_the_last():
    """Velocities that change linearly, with Euler and with Adams–Bashforth 2: five steps give the latents of eight."""
    x, v = torch.randn(1, 40, dtype=torch.float64), torch.randn(2, 1, 40, dtype=torch.float64)
    velocities = [v[0] + i * v[1] for i in range(8)]
    for second in (0.0, 0.5):
        matrix, latents = np.eye(9), [x]
        for i in range(8):
            older = second if i else 0.0
            matrix[i + 1] = matrix[i]
            matrix[i + 1, [1 + i, i]] -= [(1 + older) / 8, -older / 8]
            latents.append(sum(a * z for a, z in zip(matrix[i + 1].tolist(), [x, *velocities], strict=True)))
        schedule = (0, 1, 2, 4, 6)
        predictor = fitted_predictor(Gram.of(latents, velocities), 2)
        weights, scale = predicted_jumps(matrix, schedule, predictor)
        found = x
        for k, row in enumerate(weights):
            jumps = zip(row, schedule[k::-1], strict=False)
            found = scale[k] * found + sum(w * velocities[c] for w, c in jumps)
        assert torch.allclose(found, latents[-1], atol=1e-3)  # but for the ridge


def test_prediction_follows_the_solvers_own_steps():
    """With x' = a x + w v and the same output at every step, a jump over n steps is a^n x + w (1 + a + … ) v."""
    v = torch.ones(1, 5, dtype=torch.float64)
    gram = Gram.of([v * i for i in range(5)], [v] * 4)
    weights, scale = predicted_jumps(first_order_matrix([(0.5, 0.3)] * 4), (0, 1), fitted_predictor(gram, 1))
    assert scale == pytest.approx([0.5, 0.125]) and weights[:, 0] == pytest.approx([0.3, 0.3 * 1.75], rel=1e-5)
