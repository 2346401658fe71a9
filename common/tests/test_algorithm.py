"""Each equation on numbers that can be checked in the head."""

import numpy as np
import pytest
import torch

from ertacache import algorithm as a


def test_eq4_euler_step_moves_by_the_interval_times_the_velocity():
    x, v = torch.tensor([1.0, 2.0]), torch.tensor([4.0, -2.0])
    assert a.euler_step(x, v, torch.tensor(1.0), torch.tensor(0.5)).tolist() == [-1.0, 3.0]


def test_eq4_euler_step_is_the_schedulers_in_bfloat16_too():
    from diffusers import FlowMatchEulerDiscreteScheduler

    for dtype in (torch.float32, torch.bfloat16):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(7)
        x, v = torch.randn(2, 50).to(dtype), torch.randn(2, 50).to(dtype)
        wanted = scheduler.step(v, scheduler.timesteps[0], x, return_dict=False)[0]
        assert torch.equal(a.euler_step(x, v, scheduler.sigmas[0], scheduler.sigmas[1]), wanted)


def test_eq5_and_6_reuse_adds_what_the_network_added():
    r = a.residual(v=torch.tensor([5.0]), x=torch.tensor([2.0]))
    assert r.item() == 3.0
    assert a.reuse(torch.tensor([10.0]), r).item() == 13.0


def test_eq12_relative_l1_of_sums():
    assert a.l1_norm(torch.tensor([[1.0, -2.0], [3.0, 0.0]])) == 6.0
    assert a.relative_l1(3.0, 6.0) == 0.5
    assert np.array_equal(a.relative_l1([1.0, 1.0], [4.0, 0.0]), [0.25, np.inf])


def test_algorithm2_caches_below_the_threshold_and_compares_with_the_newest_computed_step():
    position = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])  # r_i = i, so ‖r_i − r_c‖ = i − c
    distance = np.abs(position[:, None] - position[None])
    norm = np.full(6, 10.0)
    assert a.select_cached(distance, norm, 0.05) == ()
    assert a.select_cached(distance, norm, 0.1) == ()  # the test is "less than λ"
    assert a.select_cached(distance, norm, 0.15) == (1, 3)
    assert a.select_cached(distance, norm, 0.25) == (1, 2, 4)
    assert a.select_cached(distance, norm, 9.0) == (1, 2, 3, 4)  # never the first or the last


def test_uniform_schedule_spends_exactly_the_calls_and_keeps_both_ends():
    assert a.uniform_cached(7, 4) == (1, 3, 5)
    for nfe in range(2, 31):
        cached = a.uniform_cached(30, nfe)
        assert len(cached) == 30 - nfe and not {0, 29} & set(cached)


def test_eq13_phi():
    assert a.step_coefficient(1.0, 4.0) == 0.75
    assert a.step_coefficient(5.0, 4.0) == 0.0
    assert a.step_coefficient(0.0, 0.0) == 1.0


def test_eq13_printed_definition_is_degenerate_on_the_first_cached_step():
    """With velocity reuse ε_i = v_{i−1} − v_i, so error and change have one norm and φ = 0 (the erratum)."""
    v_before, v = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 2.5])
    error, change = a.l1_norm(v_before - v), a.l1_norm(v - v_before)
    assert a.step_coefficient(error, change) == 0.0


def test_eq14_the_budget_that_a_cached_step_leaves_is_spread_over_the_rest():
    uniform = np.array([1.0, 0.75, 0.5, 0.25, 0.0], np.float32)
    # Step 1 takes half of 1/4 = 1/8; the remaining 5/8 are shared by two steps.
    assert np.allclose(a.adjusted_sigmas(uniform, [1, 0.5, 1, 1]), [1, 0.75, 0.625, 0.3125, 0])
    # On a grid that is not uniform the remaining intervals 0.2, 0.4 are scaled by 0.8 / 0.6.
    uneven = np.array([1.0, 0.8, 0.6, 0.4, 0.0], np.float32)
    assert np.allclose(a.adjusted_sigmas(uneven, [1, 0, 1, 1]), [1, 0.8, 0.8, 0.8 - 0.2 * 0.8 / 0.6, 0])


def test_eq14_keeps_the_ends_and_order_and_leaves_a_plain_grid_alone():
    grid = np.linspace(1, 0, 31).astype(np.float32) ** 2
    phi = np.ones(30)
    assert np.array_equal(a.adjusted_sigmas(grid, phi), grid)
    phi[[3, 4, 9, 28]] = [0.2, 0.0, 0.9, 0.5]
    adjusted = a.adjusted_sigmas(grid, phi)
    assert adjusted[0] == 1 and adjusted[-1] == 0 and np.all(np.diff(adjusted) <= 0)
    assert np.isclose(-np.diff(adjusted.astype(float)).sum(), 1.0)


def test_eq17_linear_sigmoid_touches_the_sigmoid_at_zero():
    z = torch.tensor(0.0, requires_grad=True)
    (slope,) = torch.autograd.grad(torch.sigmoid(z), z)
    assert a.linear_sigmoid(0.0) == torch.sigmoid(z).item() and slope.item() == 0.25


def sums(v, e):
    v, e = np.asarray(v, float), np.asarray(e, float)
    return len(v), v.sum(), e.sum(), (v * v).sum(), (v * e).sum()


def test_eq20_21_kb_by_hand():
    # ε = 2 ṽ + 1: slope 2 = K/4, offset 1 = B/4 + 1/2.
    assert a.fit_kb(*sums([0, 1, 2], [1, 3, 5])) == pytest.approx((8.0, 2.0))
    # A constant ṽ has no slope; the offset is the mean error, 3 = B/4 + 1/2.
    assert a.fit_kb(*sums([5, 5], [2, 4])) == pytest.approx((0.0, 10.0))


def test_eq20_21_printed_b_is_not_the_least_squares_solution():
    """The erratum: with B = 4(ε̄ − ½) − 4 K v̄ as printed, the mean error is not even zero."""
    v, e = np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0, 5.0])
    k, b = a.fit_kb(*sums(v, e))
    printed = 4 * (e.mean() - 0.5) - 4 * k * v.mean()
    assert np.allclose(e - a.linear_sigmoid(k * v + b), 0)
    assert abs(np.mean(e - a.linear_sigmoid(k * v + printed))) > 1


def test_eq20_21_rectification_never_raises_the_squared_error_on_its_own_data():
    rng = np.random.default_rng(0)
    for _ in range(50):
        v, e = rng.normal(rng.normal(), 1, 200), rng.normal(rng.normal(), rng.uniform(0.1, 2), 200)
        k, b = a.fit_kb(*sums(v, e))
        best = np.square(e - a.linear_sigmoid(k * v + b)).sum()
        assert best <= np.square(e).sum() * (1 + 1e-12)
        for dk, db in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):  # a minimum, not just an improvement
            assert best <= np.square(e - a.linear_sigmoid((k + dk) * v + b + db)).sum()


def test_eq15_rectify_subtracts_the_linear_form():
    v = torch.tensor([2.0])
    assert a.rectify(v, 4.0, -2.0).item() == 0.0  # σ = (4·2 − 2)/4 + ½ = 2
    assert a.rectify(v, 0.0, -2.0).item() == 2.0  # the neutral pair
    assert a.rectify(v.bfloat16(), 4.0, 2.0).dtype == torch.bfloat16
