"""Drift: exact on numbers that can be checked in the head, then in real pipelines at tiny size."""

import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import ertacache
from ertacache import BudgetPlan, PlanError
from ertacache.calibration.gram import products
from ertacache.calibration.planner import fit_predictor
from ertacache.numerics.jump import jump
from ertacache.plans.drift import LIMITS, Monitor
from helpers import (
    HALF,
    CallCounter,
    all_inputs,
    budget_calibration,
    budget_plan,
    fast,
    no_warning,
    refused,
    threshold_plan,
)
from tiny_pipelines import BUILDERS, STEPS, flux

EVERY, NEVER = 1e-9, 1e4  # errors of the calibration prompts that any run is beyond, and none is


def drifting(tiny, errors, computed=HALF):
    """A plan of first-order jumps that predicts each output to be the one before. errors: [P, N], or [P] for all."""
    ertacache.disable(tiny.pipe)
    plan = budget_plan(tiny, computed, history_length=2)
    errors = np.asarray(errors, float).reshape(len(errors), -1) * np.ones(plan.nfe)
    return replace(
        plan,
        predictor=((0.0,), *[(1.0,)] * (plan.nfe - 1)),
        prediction_errors=tuple(map(tuple, errors.tolist())),
        repair=((0.0, 0.0),) * plan.nfe,
        repair_scale=(1.0,) * plan.nfe,
    )


def enabled(tiny, plan, **options):
    ertacache.enable(tiny.pipe, plan, **options)
    with CallCounter(tiny.pipe.transformer) as calls:
        latents = tiny.run()
    return latents, calls.count / tiny.branches, ertacache.summary(tiny.pipe)


# --- by hand -----------------------------------------------------------------------------------------------------


def test_the_predictor_is_least_squares_over_the_fitted_prompts():
    """v = 2 a + b on the first prompt; on the second, which is not fitted, it misses by (0, 3)."""
    a, b = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    v = torch.tensor([[2.0, 1.0], [2.0, 4.0]])
    weights, squares = fit_predictor(products([v, a, b]), history_length=4, fitted=1)
    assert np.allclose(weights, [2, 1, 0, 0], atol=1e-5) and np.allclose(squares, [0, 9], atol=1e-4)


def test_drift_is_the_geometric_mean_of_the_ratios():
    """Calibration prompts that miss by 1 and by 4: the usual error is 2. A sample misses by 2, then by 8: drift 2."""
    monitor = Monitor(drifting(flux(), [1.0, 4.0], computed=(0, 4, 6)))
    assert np.allclose(monitor.calibrated, [0.5, 2.0])
    assert monitor.limits() == pytest.approx((0.5 / LIMITS["warn"], 2 * LIMITS["warn"]))
    assert monitor.readings() == ()
    one, three = torch.ones(1, 6), torch.full((1, 6), 3.0)
    monitor.see(0, one, [])
    assert monitor.readings() == ()
    monitor.see(1, three, [one])  # misses by 2: the drift so far is 1
    assert monitor.readings()[0].drift == pytest.approx(1.0) and monitor.readings()[0].percentile == 50.0
    assert monitor.beyond(0.4) and not monitor.beyond(0.6)  # the worst prompt misses by 4
    monitor.see(2, three + 8, [three, one])
    assert monitor.readings()[0].drift == pytest.approx(2.0)


def test_a_run_of_the_calibration_prompts_drifts_as_they_did(tmp_path):
    made = budget_calibration(tmp_path)
    plan, session = made.plans([4])[4], made.session
    monitor, history, steps = Monitor(plan), [], iter(range(plan.nfe))

    def see(i, x, v):
        monitor.see(next(steps), v, history)
        history.insert(0, v)

    session.sampler.denoise(session.pipe, all_inputs(session), plan, see)
    found = [reading.drift for reading in monitor.readings()]
    assert len(found) == len(session.prompts) and np.allclose(found, monitor.calibrated, rtol=1e-2)


def test_a_correction_and_the_rest_of_a_jump_are_the_jump():
    """x' = a x + Σ w v is the correction, x̃ = b x + Σ r v, and then what a run does that comes back to the plan."""
    tiny = flux()
    repair = tuple((0.3 * k, -0.2) for k in range(4))
    plan = replace(drifting(tiny, [1.0]), repair=repair, repair_scale=(1.0, 1.1, 0.9, 1.2), scale=(1.0, 0.8, 1.3, 1.0))
    ertacache.enable(tiny.pipe, plan)
    tiny.pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=1.0)
    run, (x, v, earlier) = tiny.pipe.scheduler.run, torch.randn(3, 1, 5, generator=torch.Generator().manual_seed(0))
    run.begin(0)
    for row, (step, end) in enumerate(pairwise([*HALF, STEPS])):
        if row == 0:
            continue
        run.way.history = [(step, v), (HALF[row - 1], earlier)]
        run.course.drifted = False
        scale, weights = run.way.weights(step, end, x)
        straight = jump(x, [v, earlier], weights, scale)
        corrected = jump(x, [v, earlier], plan.repair[row], plan.repair_scale[row])
        run.course.drifted = True
        scale, weights = run.way.weights(step, end, x)
        assert torch.allclose(jump(corrected, [v, earlier], weights, scale), straight, atol=1e-5)


# --- pipelines ---------------------------------------------------------------------------------------------------


def test_a_warning_comes_once_and_only_beyond_the_limits():
    tiny = flux()
    usual = enabled(tiny, drifting(tiny, [1.0]), on_drift="ignore")[2].drift[0].drift
    cases = ((1.1, 1.0, 1), (0.9, 1.0, 1), (0.9, None, 0), (0.7, None, 1), (1.1, None, 0), (1.5, None, 1))
    for share, limit, count in cases:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            enabled(tiny, drifting(tiny, [share * usual]), drift_limit=limit)
            tiny.run()
        assert len([w for w in caught if "drift" in str(w.message)]) == count
    with no_warning():
        summary = enabled(tiny, drifting(tiny, [EVERY]), on_drift="ignore")[2]
    assert "drift" in str(summary) and summary.drift[0].percentile == 100.0


def test_each_sample_has_its_own_drift():
    tiny = flux()
    plan = drifting(tiny, [1.0])
    alone = [enabled(replace_prompts(tiny, [j]), plan)[2].drift[0].drift for j in range(2)]
    together = [reading.drift for reading in enabled(replace_prompts(tiny, [0, 1]), plan)[2].drift]
    assert np.allclose(together, alone, rtol=1e-4) and alone[0] != alone[1]


def replace_prompts(tiny, seeds):
    ertacache.disable(tiny.pipe)
    shape = tiny.run().shape[1:]
    latents = [torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    arguments = {"latents": torch.cat(latents), "num_images_per_prompt": len(seeds)}
    return replace(tiny, arguments={**tiny.arguments, **arguments})


@pytest.mark.parametrize("name", fast(BUILDERS, "flux", "flux_img2img", "flux_controlnet", "wan", "cogvideox"))
def test_beyond_the_limit_every_step_is_computed(name):
    """Fallback from the second computed step on. With the solver at first order, as the jumps are, this is the uncached
    run."""
    tiny = BUILDERS[name]()
    begun_late = "strength" in tiny.arguments  # at step 2; the first step with a prediction is the second after it, 5
    latents, calls, summary = enabled(tiny, drifting(tiny, [EVERY]), on_drift="compute")
    assert calls == summary.computed == (5 if begun_late else STEPS) and summary.skipped == (1 if begun_late else 0)
    ertacache.disable(tiny.pipe)
    same = torch.allclose(latents, tiny.run(), atol=1e-4)
    assert (
        same or begun_late or type(tiny.pipe.scheduler) is not FlowMatchEulerDiscreteScheduler
    )  # others are multistep solvers
    assert enabled(tiny, drifting(tiny, [NEVER]), on_drift="compute")[1] == (3 if begun_late else len(HALF))


def test_a_run_returns_to_the_plan_when_the_signal_falls():
    tiny = flux()
    errors = [[1.0, EVERY, NEVER, NEVER]]  # beyond the limit at the second computed step only, which is 1; 3 is next
    plan = drifting(tiny, errors, computed=(0, 1, 3, 5))
    latents, calls, summary = enabled(tiny, plan, on_drift="compute")
    assert calls == 5 and summary.skipped == STEPS - 5
    ertacache.disable(tiny.pipe)
    assert torch.allclose(latents, enabled(tiny, budget_plan(tiny, (0, 1, 2, 3, 5)))[0], atol=1e-5)


# --- plans -------------------------------------------------------------------------------------------------------


def test_drift_is_saved_with_a_plan_and_may_be_missing(tmp_path):
    tiny = flux()
    plan = drifting(tiny, [1.0, 2.0])
    assert BudgetPlan.load(plan.save(tmp_path / "a.json")) == plan
    plain = budget_plan(tiny, HALF)
    assert BudgetPlan.load(plain.save(tmp_path / "b.json")) == plain and enabled(tiny, plain)[2].drift == ()


@pytest.mark.parametrize("change", [{"predictor": ()}, {"repair": ()}, {"prediction_errors": ((1.0,),)}])
def test_half_of_it_is_no_plan(change):
    with refused(*change, error=PlanError):
        replace(drifting(flux(), [1.0]), **change)


def test_bad_arguments_are_one_line():
    tiny = flux()
    for plan in (budget_plan(tiny, HALF), threshold_plan(tiny, (2,))):
        with refused(plan.title, "no drift", "calibrate a budget plan anew", error=PlanError):
            ertacache.enable(tiny.pipe, plan, on_drift="compute")
    for options, words in (
        ({"on_drift": "stop"}, ("'stop'", "'warn'")),
        ({"drift_limit": 0}, ("= 0", "above 0")),
        ({"drift_limit": True}, ("= True", "above 0")),
        ({"drift_limit": float("inf")}, ("= inf", "a finite number")),
        ({"drift_limit": 2, "on_drift": "ignore"}, ("= 2", "'ignore', leave it out")),
    ):
        with refused(*options, *words):
            ertacache.enable(tiny.pipe, drifting(tiny, [1.0]), **options)
