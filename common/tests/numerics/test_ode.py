"""The exact target on dx/ds = A x, whose solution is a matrix exponential, and on a rotation."""

import math
from itertools import pairwise

import pytest
import torch

from ertacache import BudgetPlan, PlanError
from ertacache.calibration.trajectories import SHIFTS
from ertacache.numerics.ode import candidate_grid, integrate, rate_of, settled_substeps, shifted_grid
from helpers import MATRIX as A
from helpers import TOY_STEPS as STEPS
from helpers import budget_calibration, refused
from toy import Pipe, ToySampler


def toy(seeds=(50, 51), sampler=None):
    sampler, pipe = sampler or ToySampler(), Pipe(A)
    return sampler, pipe, sampler.prepare(pipe, ["p"] * len(seeds), seeds, steps=STEPS)


def solution(inputs):
    """x(0) = exp(−A) x(1) for rows x."""
    return inputs.latents.double() @ torch.linalg.matrix_exp(torch.from_numpy(-A)).T


def error(found, inputs):
    return (found.double() - solution(inputs)).abs().max().item()


def calibration(tmp_path, target="exact", prompts=8):
    return budget_calibration(tmp_path, target, prompts=prompts)


def test_the_integral_is_the_matrix_exponential_to_third_order():
    sampler, pipe, inputs = toy()
    grid = candidate_grid(inputs.sigmas, 6)
    errors = [error(integrate(sampler, pipe, inputs, grid, 1.0, substeps), inputs) for substeps in (1, 2, 4)]
    assert errors[2] < 1e-4
    assert all(6 < coarse / fine < 10 for coarse, fine in pairwise(errors))  # 2³


def test_it_takes_three_calls_a_substep_and_shows_each_point_once():
    sampler, pipe, inputs = toy()
    seen = []
    integrate(sampler, pipe, inputs, candidate_grid(inputs.sigmas, 5), 1.0, 2, lambda i, x, v: seen.append((i, x, v)))
    assert pipe.transformer.calls == 3 * 2 * 5 and [i for i, _, _ in seen] == list(range(5))
    assert all(torch.equal(v, pipe.transformer(x)) for _, x, v in seen) and torch.equal(seen[0][1], inputs.latents)


def test_the_model_is_asked_at_the_times_of_the_stages_and_never_at_the_data():
    class Watching(ToySampler):
        def velocity(self, pipe, inputs, x, t):
            asked.append(t.item())
            return super().velocity(pipe, inputs, x, t)

    asked, (sampler, pipe, inputs) = [], toy(sampler=Watching())
    integrate(sampler, pipe, inputs, torch.tensor([1.0, 0.4, 0.0]), 1.0, 1)
    assert asked == pytest.approx([1, 0.7, 0.55, 0.4, 0.2, 0.1], abs=1e-6)


def test_substeps_double_until_the_solution_settles():
    sampler, pipe, inputs = toy()
    assert settled_substeps(sampler, pipe, inputs, candidate_grid(inputs.sigmas, 24), 1.0) == 1
    assert settled_substeps(sampler, pipe, inputs, candidate_grid(inputs.sigmas, 1), 1.0) > 2

    class Restless(ToySampler):
        def velocity(self, pipe, inputs, x, t):
            return torch.randn(x.shape) * 100

    with refused("64 substeps", "well trained"):
        settled_substeps(Restless(), pipe, inputs, candidate_grid(inputs.sigmas, 2), 1.0)


def test_grids():
    native = torch.tensor([1.0, 0.9, 0.5, 0.0])
    assert candidate_grid(native, 4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert shifted_grid(native, 4, 1.0).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert shifted_grid(native, 4, 3.0).tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    assert shifted_grid(torch.tensor([0.8, 0.0]), 2, 3.0).tolist() == pytest.approx([0.8, 0.6, 0.0])


def test_the_rate_of_euler_and_of_a_rotation():
    class Turning(ToySampler):
        def first_order(self, pipe, inputs, i, k):
            turn = (inputs.sigmas[k] - inputs.sigmas[i]).item() * math.pi / 2
            return math.cos(turn), math.sin(turn)

    sampler, pipe, inputs = toy()
    assert rate_of(sampler, pipe, inputs) == pytest.approx(1)
    assert rate_of(Turning(), pipe, inputs) == pytest.approx(math.pi / 2)


def test_plans_are_nearer_to_the_solution_than_the_uncached_run_which_they_do_not_imitate(tmp_path):
    made = calibration(tmp_path)
    plans = made.plans([6, 4])
    sampler, pipe, inputs = toy()
    uncached = error(sampler.denoise(pipe, inputs), inputs)
    for budget, plan in plans.items():
        pipe.transformer.calls = 0
        assert error(sampler.denoise(pipe, inputs, plan), inputs) < uncached / 3
        assert pipe.transformer.calls == budget == plan.nfe
        assert plan.target == "exact" and len(plan.sigmas) == 2 * STEPS + 1 and len(plan.native_sigmas) == STEPS + 1
        assert plan.provenance["calibration"]["substeps"] == 1


def test_both_targets_calibrate_side_by_side(tmp_path):
    exact, reference = (calibration(tmp_path, target).plans([4])[4] for target in ("exact", "reference"))
    assert reference.target == "reference" and reference.sigmas == () and exact.weights != reference.weights
    (tmp_path / "alone").mkdir()
    assert calibration(tmp_path / "alone", "reference").plans([4])[4] == reference


def test_calibrations_of_one_model_at_a_time_do_not_take_each_others_files(tmp_path):
    one, other = calibration(tmp_path), calibration(tmp_path, "reference")
    one.trajectories()
    other.plans([4])
    other.finish()
    assert one.plans([4])[4].nfe == 4
    same = calibration(tmp_path)
    same.trajectories()
    same.finish()
    with refused(same.checkpoints.folder, "start again"):
        one.rollout((0, 5), 3)


def test_the_solution_is_integrated_once_for_all_budgets(tmp_path):
    made = calibration(tmp_path)
    made.trajectories()
    settling, batches = 3 * 2 * STEPS * (1 + 2), 3  # one and two substeps, on the first batch
    assert made.session.pipe.transformer.calls == settling + batches * 3 * 2 * STEPS
    made.trajectories()
    assert made.session.pipe.transformer.calls == settling + batches * 3 * 2 * STEPS


def test_the_tuned_shift_is_the_best_of_those_tried(tmp_path):
    made = calibration(tmp_path)
    shift = made.tuned_shift(6)
    sampler, pipe, inputs = toy(seeds=range(8))
    fewer = sampler.prepare(pipe, made.session.prompts, made.session.seeds, **made.session.settings | {"steps": 6})
    grids = {None: fewer} | {s: inputs.on(shifted_grid(inputs.sigmas, 6, s)) for s in SHIFTS}
    errors = {}
    for candidate, on_grid in grids.items():
        squares = (sampler.denoise(pipe, on_grid) - solution(inputs)).square().flatten(1).mean(1)
        errors[candidate] = squares.sort().values[:6].log().mean()  # the best three quarters of eight
    assert shift == min(errors, key=errors.get)
    one = made.nearest("one wild prompt", (0.0, 1.0), lambda batch, c: wild(made, batch, c))
    assert one == 0.0  # a prompt that tips does not decide


def wild(made, batch, candidate):
    """The target, with an error of 0.1 for all prompts by candidate 1, of 100 for the first one by candidate 0."""
    target = made.target_latents(batch, made.end)
    found = target + 0.1 * candidate
    if not batch and not candidate:
        found[0] += 100
    return found


def test_round_trip_and_an_unknown_target(tmp_path):
    plan = calibration(tmp_path).plans([4])[4]
    assert BudgetPlan.load(plan.save(tmp_path / "plan.json")) == plan and plan.title == "3x, exact"
    with refused("target = 'truth'", "reference", "exact", error=PlanError):
        BudgetPlan(plan.requirements, plan.computed, plan.weights, plan.native_sigmas, target="truth")
