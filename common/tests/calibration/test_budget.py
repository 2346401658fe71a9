"""Budget plans on dx/ds = A x, where the best weights are known, and what is refused."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from ertacache import BudgetPlan, Plan, PlanError, Requirements
from ertacache.calibration.budget import BudgetCalibration
from ertacache.calibration.choice import geometric_mean
from ertacache.calibration.effort import EFFORTS, effort_of
from ertacache.calibration.gram import Gram
from ertacache.calibration.planner import euler_weights
from ertacache.calibration.search import Interrupted, Search
from ertacache.calibration.session import CalibrationSession
from ertacache.calibration.threshold import ThresholdCalibration
from ertacache.plans.names import budget_of
from ertacache.utils.checkpoints import has_whole_arrays
from helpers import MATRIX as A
from helpers import TOY_STEPS as STEPS
from helpers import all_inputs, refused, toy_session
from helpers import budget_calibration as calibration
from toy import Pipe, ToySampler


def run(plan, seeds=(50, 51), steps=STEPS, matrix=A):
    """Final latents of the plan and of the uncached loop for new noise, and the calls that the plan made."""
    sampler, pipe = ToySampler(), Pipe(matrix)
    inputs = sampler.prepare(pipe, ["p"] * len(seeds), seeds, steps=steps)
    exact = sampler.denoise(pipe, inputs)
    pipe.transformer.calls = 0
    return sampler.denoise(pipe, inputs, plan), exact, pipe.transformer.calls


def error(plan, **options):
    found, exact, _ = run(plan, **options)
    return geometric_mean((found - exact).square().flatten(1).mean(1).numpy())


@pytest.mark.parametrize("budget", range(2, STEPS + 1))
def test_every_budget_makes_exactly_its_calls_and_beats_fewer_euler_steps(tmp_path, budget):
    plan = calibration(tmp_path).plans([budget])[budget]
    _, _, calls = run(plan)
    assert calls == plan.nfe == budget and plan.computed[0] == 0
    euler = euler_weights(np.array(plan.native_sigmas), plan.computed, plan.history_length)
    fewer = BudgetPlan(plan.requirements, plan.computed, tuple(map(tuple, euler.tolist())), plan.native_sigmas)
    assert error(plan) <= error(fewer) + 1e-12


def test_all_steps_computed_reproduce_the_uncached_run(tmp_path):
    plan = calibration(tmp_path).plans([STEPS])[STEPS]
    found, exact, _ = run(plan)
    assert torch.allclose(found, exact, atol=1e-5) and plan.predicted_error < 1e-12


def test_outputs_in_a_plane_are_fitted_exactly(tmp_path):
    """With v = a x + rotation in two dimensions, the two newest velocities span everything a jump can need."""
    matrix = np.array([[0.5, 2.0], [-2.0, 0.5]])
    plan = calibration(tmp_path, matrix=matrix).plans([4])[4]
    found, exact, _ = run(plan, matrix=matrix)
    assert torch.allclose(found[:, :2], exact[:, :2], atol=1e-4) and plan.held_out_error < 1e-8


def test_more_calls_are_nearer(tmp_path):
    plans = calibration(tmp_path).plans([2, 3, 4, 6])
    errors = [max(error(plans[n]), 1e-14) for n in (2, 3, 4, 6)]  # below that it is rounding
    assert errors == sorted(errors, reverse=True)
    assert plans[3].held_out_error == pytest.approx(error(plans[3], seeds=range(6, 8)), rel=1e-3)


def test_the_reference_is_run_once_for_all_budgets(tmp_path):
    made = calibration(tmp_path)
    made.session.sampler.repeatable = False  # so that no rollout shares calls with another
    plans = made.plans([2, 3, 5])
    rollouts = sum(n * p.provenance["calibration"]["rollouts"] for n, p in plans.items())
    assert made.session.pipe.transformer.calls == made.session.batches * (STEPS + rollouts)


def test_a_second_calibration_resumes_where_the_first_was_killed(tmp_path):
    class Killed(ToySampler):
        def velocity(self, pipe, inputs, x, t):
            if pipe.transformer.calls > 60:
                raise KeyboardInterrupt
            return super().velocity(pipe, inputs, x, t)

    with pytest.raises(KeyboardInterrupt):
        calibration(tmp_path, sampler=Killed()).plans([4])
    again = calibration(tmp_path)
    plan = again.plans([4])[4]
    calls = again.session.pipe.transformer.calls
    (tmp_path / "fresh").mkdir()
    fresh = calibration(tmp_path / "fresh")
    assert fresh.plans([4])[4] == plan and calls < fresh.session.pipe.transformer.calls


def test_a_plan_may_bring_a_grid_of_its_own():
    """Ten Euler steps on a grid of the plan's own are ten Euler steps on that grid, whatever the run's."""
    sampler, grid = ToySampler(), tuple(np.linspace(1, 0, 11).astype(np.float32).tolist())
    native = tuple(np.linspace(1, 0, STEPS + 1).astype(np.float32).tolist())
    weights = tuple(map(tuple, euler_weights(np.array(grid), tuple(range(10)), 1).tolist()))
    plan = BudgetPlan(Requirements(STEPS, {}, {}, {}), tuple(range(10)), weights, native, sigmas=grid)
    found, _, calls = run(plan)
    wanted = sampler.denoise(Pipe(A), sampler.prepare(Pipe(A), ["p"] * 2, (50, 51), steps=10))
    assert calls == 10 and torch.allclose(found, wanted, atol=1e-5)


def test_on_another_grid_a_jump_keeps_its_share_of_the_interval():
    """A plan of Euler jumps, on a grid that the scheduler has shifted: Euler jumps over the same steps of that grid."""
    sampler, pipe, schedule = ToySampler(), Pipe(A), (0, 2, 5, 6, 9)
    native, shifted = (sampler.prepare(pipe, ["p"], [50], steps=STEPS, warp=w).sigmas for w in (1.0, 1.7))
    plans = []
    for grid in (native, shifted):
        weights = tuple(map(tuple, euler_weights(grid.numpy(), schedule, 1).tolist()))
        plans.append(BudgetPlan(Requirements(STEPS, {}, {}, {}), schedule, weights, tuple(grid.tolist())))
    inputs = sampler.prepare(pipe, ["p"], [50], steps=STEPS, warp=1.7)
    found, wanted = (sampler.denoise(pipe, inputs, plan) for plan in plans)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_a_run_keeps_no_more_velocities_than_its_history_length(tmp_path):
    """Memory beyond the uncached run: the H newest velocities, and the latents."""
    import gc
    import weakref

    class Counting(ToySampler):
        def velocity(self, pipe, inputs, x, t):
            alive.append(sum(v() is not None for v in outputs))
            v = super().velocity(pipe, inputs, x, t)
            outputs.append(weakref.ref(v))
            return v

    plan, outputs, alive = calibration(tmp_path).plans([8])[8], [], []
    sampler = Counting()
    inputs = sampler.prepare(Pipe(A), ["p"], [50], steps=STEPS)
    gc.collect()
    sampler.denoise(Pipe(A), inputs, plan)
    assert max(alive) == plan.history_length


def test_local_search_leaves_a_poor_schedule_within_its_calls(tmp_path):
    """From computed steps that crowd at the beginning."""
    made = calibration(tmp_path)
    made.trajectories()
    start, model, limit = (0, 1, 2, 3, 4), made.session.pipe.transformer, 80
    before, search = model.calls, Search(made, {"crowded": start}, limit)
    errors = [search.best.error for _ in search]
    spent = (model.calls - before) / made.session.batches
    assert limit - 5 - len(errors) <= spent <= limit - search.left and search.left < 5  # first steps may be shared too
    assert len(search.tried) == len(errors) > limit / 5 and errors == sorted(errors, reverse=True)
    assert search.best.schedule != start and errors[-1] < 0.5 * errors[0]
    assert search.chosen == "crowded, local search"
    assert search.errors["crowded"] == errors[0] and search.errors[search.chosen] == errors[-1]
    arrays = {name: array.tolist() for name, array in search.best.arrays.items()}
    plan = BudgetPlan(
        made.session.requirements,
        search.best.schedule,
        tuple(map(tuple, arrays["weights"])),
        tuple(made.native_sigmas.tolist()),
        scale=tuple(arrays["scale"]),
    )
    found, exact, _ = run(plan, seeds=range(8))  # by runs that follow the plan
    squares = (found - exact).square().flatten(1).mean(1).numpy()
    assert geometric_mean(squares) == pytest.approx(search.best.error, rel=1e-3)


@pytest.mark.parametrize("history_length", [3, 5])
@pytest.mark.parametrize(
    "schedule", [(0, 2, 4, 6, 8, 11), (0, 2, 5, 6, 8, 11), (0, 1, 2, 3, 4, 5), (0, 2, 4, 6, 8, 10)]
)
def test_rollouts_share_the_calls_of_their_common_beginning(tmp_path, schedule, history_length):
    made = calibration(tmp_path / "shared")
    made.trajectories()
    first, model = made.rollout((0, 2, 4, 6, 8, 10), 5), made.session.pipe.transformer
    before = model.calls
    shared = made.rollout(schedule, history_length, like=first)
    common = next((j for j, pair in enumerate(zip(schedule, first.schedule, strict=True)) if len(set(pair)) > 1), 6)
    common = common if history_length == 5 else min(common, 4)
    assert model.calls - before == made.session.batches * (6 - common)
    alone = calibration(tmp_path / "alone")
    alone.trajectories()
    own = alone.rollout(schedule, history_length)
    assert all(np.array_equal(shared.arrays[name], own.arrays[name]) for name in own.arrays)
    assert np.array_equal(shared.errors, own.errors)


def test_one_prompt_that_tips_does_not_decide(tmp_path):
    """A prompt whose run leads elsewhere: with the mean squared error it would be all that counts."""

    class Tipped(ToySampler):
        def velocity(self, pipe, inputs, x, t):
            v = super().velocity(pipe, inputs, x, t)
            return v + 5 * torch.randn(v.shape, generator=torch.Generator().manual_seed(1)) * inputs.tipped

        def prepare(self, pipe, prompts, seeds, **settings):
            inputs = super().prepare(pipe, prompts, seeds, **settings)
            tipped = torch.tensor([p == "p1" for p in prompts])[:, None, None]
            object.__setattr__(inputs, "tipped", tipped)
            return inputs

    matrix = np.random.default_rng(0).normal(size=(8, 8))
    plain = calibration(tmp_path / "plain", matrix=matrix).plans([5])[5]
    tipped = calibration(tmp_path / "tipped", matrix=matrix, sampler=Tipped()).plans([5])[5]
    assert error(tipped, matrix=matrix) < 2 * error(plain, matrix=matrix)


# --- effort ----------------------------------------------------------------------------------------------------------


def test_quick_costs_little_on_either_route(tmp_path):
    budget = calibration(tmp_path, batch_size=1)
    budget.plans([STEPS // 2], "quick")
    threshold = ThresholdCalibration(toy_session(tmp_path, prompts=4, batch_size=1))
    plan = threshold.plan(0.17, "quick")  # a slow one, which costs most
    assert 0.75 * STEPS < plan.nfe < STEPS and "policy + rectification" in plan.provenance["calibration"]["errors"]
    for made, uncached_runs in ((budget, 24), (threshold, 20)):
        assert made.session.pipe.transformer.calls < uncached_runs * STEPS
    assert effort_of("quick").prompts == 8 and effort_of("quick").threshold_prompts == 4


def test_more_effort_is_never_worse(tmp_path):
    errors = [made_with(tmp_path, effort).provenance["calibration"]["errors"] for effort in EFFORTS]
    best = [min(found.values()) for found in errors]
    assert best == sorted(best, reverse=True) and best[-1] < best[0]


def made_with(work, effort):
    matrix = np.random.default_rng(0).normal(size=(8, 8))
    return calibration(work / effort, matrix=matrix, batch_size=8).plans([4], effort)[4]


def test_what_it_costs_is_said_before_and_after_the_first_calls(tmp_path, capsys):
    class Slow(ToySampler):
        def denoise(self, pipe, inputs, plan=None, on_step=None):
            lines.append(capsys.readouterr().err)
            return super().denoise(pipe, inputs, plan, on_step)

    lines = []
    options = {"settings": {"steps": STEPS}, "batch_size": 3, "work": tmp_path}
    session = CalibrationSession(Slow(), Pipe(A), ["p"] * 8, range(8), **options)
    BudgetCalibration(session).plans([6], "normal")
    bound = 3 * (STEPS + 8 * 6)
    text = f"calibration: at most {bound} model calls with 3 prompts each, the cost of 40 uncached results; "
    assert text in lines[0] and "calibration: at most" in lines[1]
    assert session.pipe.transformer.calls <= bound and session.progress.total == session.pipe.transformer.calls


def test_ctrl_c_keeps_the_best_plan_so_far_and_the_same_call_goes_on(tmp_path):
    class Stopped(ToySampler):
        def velocity(self, pipe, inputs, x, t):
            if pipe.transformer.calls > 80:
                raise KeyboardInterrupt
            return super().velocity(pipe, inputs, x, t)

    with pytest.raises(Interrupted) as stop:
        calibration(tmp_path, sampler=Stopped()).plans([4])
    plan = stop.value.plan
    record = plan.provenance["calibration"]
    assert not record["finished"] and 0 < record["rollouts"] < 8 and plan.nfe == 4
    assert BudgetPlan.load(plan.save(tmp_path / "plan.json")) == plan
    whole = calibration(tmp_path).plans([4])[4]
    assert whole.provenance["calibration"]["finished"] and whole.predicted_error <= plan.predicted_error


def test_a_disk_that_cannot_hold_the_trajectories_is_refused_before_any_call(tmp_path, monkeypatch):
    session = toy_session(tmp_path, prompts=8)
    needed = 8 * (STEPS + 1) * all_inputs(session).latents[0].nbytes
    usage = shutil.disk_usage(tmp_path)

    def left(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))

    left(needed - 1)
    with refused("the calibration keeps", f"in {tmp_path}, where", "are free: make room", "fewer prompts"):
        BudgetCalibration(session)
    assert session.pipe.transformer.calls == 0
    left(needed)
    started = BudgetCalibration(session)
    started.trajectories()
    left(0)
    assert has_whole_arrays(BudgetCalibration(session).trajectory_path(0))  # what is there already takes no more room


def test_no_such_effort():
    with refused("--effort great", "quick, normal, thorough"):
        effort_of("great", "--effort")


def test_held_out_prompts_do_not_enter_the_fit(tmp_path):
    """Their noise is replaced: neither Gram matrix nor weights may change."""

    class Other(ToySampler):
        def prepare(self, pipe, prompts, seeds, **settings):
            return super().prepare(pipe, prompts, [s if s < 6 else s + 100 for s in seeds], **settings)

    found = []
    for name, sampler in (("one", ToySampler()), ("other", Other())):
        made = calibration(tmp_path / name, sampler=sampler)
        found.append((made.trajectories(), made.rollout((0, 3, 6, 9), 5)))
    (gram, one), (same, other) = found
    assert np.array_equal(gram.matrix, same.matrix) and np.array_equal(one.arrays["weights"], other.arrays["weights"])
    assert np.array_equal(one.errors[:6], other.errors[:6]) and np.all(one.errors[6:] != other.errors[6:])


def test_half_calibrations_add_up(tmp_path):
    sampler = ToySampler(rows=20)
    whole = calibration(tmp_path, prompts=3, sampler=sampler).trajectories()
    (tmp_path / "a").mkdir()
    one = calibration(tmp_path / "a", prompts=2, sampler=sampler).trajectories()
    pipe, latents, velocities = Pipe(A), [], []
    inputs = sampler.prepare(pipe, ["p2"], [2], steps=STEPS)

    def watch(i, x, v):
        latents.append(x)
        velocities.append(v)

    latents.append(sampler.denoise(pipe, inputs, None, watch))
    other = Gram.of(latents, velocities)
    assert np.allclose(one.matrix + other.matrix, whole.matrix, rtol=1e-10) and whole.prompts == 3


# --- files and refusals ------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    plan = calibration(tmp_path).plans([4])[4]
    path = plan.save(tmp_path / "plan.json")
    assert BudgetPlan.load(path) == plan == Plan.load(path)


@pytest.mark.parametrize("budget", [1, 0, STEPS + 1])
def test_impossible_budgets(tmp_path, budget):
    with refused(f"--budget {budget}", f"from 2 to {STEPS}"):
        calibration(tmp_path).plans([budget])


def test_a_speedup_becomes_a_budget():
    assert [budget_of(30, s) for s in (1, 2, 3, 15)] == [30, 15, 10, 2]
    with refused("--speedup 15.5", "at most 15 of 30 steps"):
        budget_of(30, 15.5)


def test_too_few_numbers_to_fit(tmp_path):
    with refused("1 calibration prompts", "24 numbers", "more prompts, or larger latents"):
        calibration(tmp_path, prompts=1, sampler=ToySampler(rows=8))


def test_a_non_finite_output_names_prompt_and_step(tmp_path):
    class Broken(ToySampler):
        def denoise(self, pipe, inputs, plan=None, on_step=None):
            def watched(i, x, v):
                broken = torch.where(torch.arange(len(v))[:, None, None] == 1, torch.nan, v)
                return on_step(i, x, broken if i == 5 else v)

            return super().denoise(pipe, inputs, plan, watched)

    with refused("step 5", "'p1'", "--dtype float32"):
        calibration(tmp_path, sampler=Broken()).plans([4])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"computed": (1, 2, 3, 4)}, ("[1, 2, 3, 4]", "from 0")),
        ({"computed": (0, 3, 3, 4)}, ("[0, 3, 3, 4]", "ascend")),
        ({"computed": (0, 3, 4, STEPS)}, (f"[0, 3, 4, {STEPS}]", f"0 … {STEPS - 1}")),
        ({"weights": ((0.1,),)}, ("weights", "[4, H]")),
        ({"weights": ((float("nan"),),) * 4}, ("weights", "finite")),
        ({"scale": (1.0,)}, ("scale", "[4]")),
        ({"native_sigmas": (1.0, 0.0)}, ("native_sigmas", f"[{STEPS + 1}]")),
        ({"sigmas": (1.0, 0.5, 0.6, 0.2, 0.1, 0.0)}, ("sigmas", "fall")),
        ({"sigmas": (1.0, 0.5, 0.0)}, ("computed", "0 … 1")),
    ],
)
def test_a_plan_that_makes_no_sense_is_not_built(tmp_path, changes, words):
    plan = calibration(tmp_path).plans([4])[4]
    with refused("not a valid plan", *words, error=PlanError):
        replace(plan, **changes)
