"""Plans in pipelines that step, guide or keep their parts in ways of their own."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import AdaptiveProjectedGuidance, ClassifierFreeGuidance

import ertacache
from ertacache import PlanError
from ertacache.numerics.schedulers import first_order
from ertacache.pipelines.enable import originals
from ertacache.utils.denoisers import denoiser_of
from helpers import HALF, CallCounter, budget_plan, fast, refused, threshold_plan
from more_tiny_pipelines import (
    MORE,
    audio_of,
    chronoedit,
    cosmos2,
    hunyuan15,
    ltx2,
    ltx_condition,
    ltx_condition_image,
    lumina2,
    modular,
    skyreels,
    zimage,
)
from tiny_pipelines import STEPS, flux_controlnet, wan

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast", "ignore:__array__")
REFUSED = [skyreels, chronoedit]
PER_TOKEN = [ltx_condition, ltx_condition_image]
FOLLOWED = [build for build in MORE.values() if build not in REFUSED + PER_TOKEN]


def calls_of(tiny, **changes):
    """Final latents of a run, and the number of model calls."""
    with CallCounter(denoiser_of(tiny.pipe)) as calls:
        return tiny.run(**changes), calls.count


def for_pipeline(plan, tiny):
    """The plan as if it was calibrated on this pipeline."""
    return replace(plan, requirements=replace(plan.requirements, settings={"pipeline": type(tiny.pipe).__name__}))


def first_order_plan(tiny, computed, **changes):
    """A plan of first-order jumps, with a drift that no run keeps within."""
    plan = budget_plan(tiny, computed, history_length=2)
    drift = {"predictor": ((0.0,),) + ((1.0,),) * (plan.nfe - 1), "prediction_errors": ((1e-9,) * plan.nfe,)}
    return replace(plan, **drift, repair=((0.0, 0.0),) * plan.nfe, repair_scale=(1.0,) * plan.nfe, **changes)


# --- every pipeline ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", fast(FOLLOWED + PER_TOKEN, "zimage", "ltx2", "mochi", "modular"))
@pytest.mark.parametrize("kind", ["budget", "threshold"])
def test_all_steps_computed_is_the_uncached_run(build, kind):
    if (build, kind) == (cosmos2, "threshold"):
        pytest.skip("its last two noise levels are equal, which threshold plans refuse")
    tiny = build()
    plain, calls = calls_of(tiny)
    plan = budget_plan(tiny, range(STEPS)) if kind == "budget" else threshold_plan(tiny, ())
    ertacache.enable(tiny.pipe, for_pipeline(plan, tiny))
    found, again = calls_of(tiny)
    assert torch.equal(found, plain) and calls == again


@pytest.mark.parametrize("build", fast(FOLLOWED + PER_TOKEN, "zimage", "ltx2", "mochi", "modular", "ltx_condition"))
def test_model_calls_are_made_at_computed_steps_only(build):
    """And the result is that of as many first-order steps between those noise levels."""
    tiny = build()
    plain, _ = calls_of(tiny)
    extra = 1 if build.__name__ == "sd3_skip_layers" else 0  # its window holds step 1
    ertacache.enable(tiny.pipe, for_pipeline(budget_plan(tiny, HALF), tiny))
    found, calls = calls_of(tiny)
    assert calls == len(HALF) * tiny.branches + extra
    assert found.isfinite().all() and not torch.equal(found, plain)
    summary = ertacache.summary(tiny.pipe)
    assert (summary.calls, summary.computed, summary.skipped) == (1, 4, 4)
    ertacache.disable(tiny.pipe)
    assert torch.equal(tiny.run(), plain)


@pytest.mark.parametrize("build", REFUSED)
def test_what_no_plan_can_follow_is_refused_by_name_before_a_call(build):
    tiny = build()
    plan = budget_plan(tiny, HALF)
    with CallCounter(tiny.pipe.transformer) as calls, refused(type(tiny.pipe).__name__, "without one"):
        ertacache.enable(tiny.pipe, plan)
    assert calls.count == 0


@pytest.mark.parametrize("build", PER_TOKEN)
def test_a_time_for_each_token_needs_a_plan_of_that_pipeline(build):
    tiny = build()
    with refused(type(tiny.pipe).__name__, "ertacache.calibrate(", error=PlanError):
        ertacache.enable(tiny.pipe, budget_plan(tiny, HALF))


def test_times_for_each_token_that_only_the_model_is_given():
    """Wan2.2 TI2V: its scheduler steps as always, so any plan of the model is followed."""
    tiny = wan()
    tiny.pipe.register_to_config(expand_timesteps=True)
    plain, calls = calls_of(tiny)
    whole, half = budget_plan(tiny, range(STEPS)), budget_plan(tiny, HALF)
    ertacache.enable(tiny.pipe, whole)
    found, again = calls_of(tiny)
    assert torch.equal(found, plain) and calls == again
    ertacache.enable(tiny.pipe, half)
    assert calls_of(tiny)[1] == len(HALF) * tiny.branches


def test_tokens_that_are_given_stay_as_they_are():
    """The first frame is an image: its tokens have time 0, and no step moves them."""
    tiny = ltx_condition_image()
    plain = tiny.run()
    ertacache.enable(tiny.pipe, for_pipeline(budget_plan(tiny, HALF), tiny))
    planned = tiny.run()
    assert torch.allclose(planned[:, :, 0], plain[:, :, 0], atol=1e-6)
    assert not torch.allclose(planned[:, :, 1:], plain[:, :, 1:], atol=1e-3)


# --- drift -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [lumina2, zimage, hunyuan15, flux_controlnet, modular])
def test_computing_beyond_the_limit_guides_to_the_end(build):
    """Every step from the second on is computed as the uncached run makes it: no list overflows, no guidance ends."""
    tiny = build()
    plain, calls = calls_of(tiny)
    plan, errors = first_order_plan(tiny, HALF), {}
    for mode in ("ignore", "compute"):
        ertacache.enable(tiny.pipe, plan, on_drift=mode)
        found, made = calls_of(tiny)
        errors[mode] = (found - plain).abs().max().item()
        assert made == (calls if mode == "compute" else len(HALF) * tiny.branches)
    assert errors["compute"] < 0.5 * errors["ignore"]


# --- guiders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [hunyuan15, modular])
def test_a_guiders_window_covers_the_same_noise_levels(build):
    """From step 2 to step 5 of 8: two calls there, one elsewhere."""
    tiny = build(guider=ClassifierFreeGuidance(guidance_scale=5.0, start=0.25, stop=0.75))
    times = []
    hook = tiny.pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: times.append(kwargs["timestep"].flatten()[0].item()), with_kwargs=True
    )
    tiny.run()
    uncached, steps = list(times), sorted(set(times), reverse=True)
    assert [uncached.count(t) for t in steps] == [1, 1, 2, 2, 2, 2, 1, 1]
    plan = budget_plan(tiny, (0, 1, 3, 5, 6))
    times.clear()
    ertacache.enable(tiny.pipe, plan)
    tiny.run()
    hook.remove()
    assert times == [t for t in uncached if steps.index(t) in plan.computed]


@pytest.mark.parametrize("build", [hunyuan15, modular])
def test_a_guider_with_momentum_starts_anew_in_each_call(build):
    guider = AdaptiveProjectedGuidance(guidance_scale=5.0, adaptive_projected_guidance_momentum=-0.75)
    tiny = build(guider=guider)
    ertacache.enable(tiny.pipe, budget_plan(tiny, HALF))
    first = tiny.run()
    assert first.isfinite().all() and torch.equal(tiny.run(), first)


# --- several schedulers in a call ----------------------------------------------------------------------------------


def test_sound_follows_the_steps_of_the_picture():
    """LTX-2 steps a copy of the scheduler for its audio: all steps computed is the uncached run there too, and with
    first-order jumps both are that of as many Euler steps."""
    tiny = ltx2()
    plain = audio_of(tiny)
    ertacache.enable(tiny.pipe, budget_plan(tiny, range(STEPS)))
    assert torch.equal(audio_of(tiny), plain)
    ertacache.disable(tiny.pipe)
    ertacache.enable(tiny.pipe, budget_plan(tiny, HALF))
    found = audio_of(tiny)
    assert found.isfinite().all() and not torch.equal(found, plain)
    ertacache.disable(tiny.pipe)
    ertacache.enable(tiny.pipe, first_order_plan(tiny, HALF), on_drift="compute")
    with CallCounter(originals(tiny.pipe)["transformer"]) as calls:
        assert torch.allclose(audio_of(tiny), plain, atol=1e-4)
    assert calls.count == STEPS


def test_schedulers_that_are_copied_after_set_timesteps_share_one_course():
    """As Cosmos 3 Omni and Kandinsky 6 do: each of the two takes the jumps of the plan."""
    import copy

    from tiny_pipelines import sd3

    tiny = sd3()
    plan = budget_plan(tiny, HALF)
    ertacache.enable(tiny.pipe, plan)
    scheduler = tiny.pipe.scheduler
    scheduler.set_timesteps(STEPS)
    other = copy.deepcopy(scheduler)
    one, two = torch.ones(1, 4), torch.ones(1, 9)
    with pytest.warns(UserWarning, match="no model call was skipped"):  # there is no model here
        for t in scheduler.timesteps:
            one = scheduler.step(0.5 * one, t, one, return_dict=False)[0]
            two = other.step(0.5 * two, t, two, return_dict=False)[0]
    x = 1.0
    for i, k in pairwise([*HALF, STEPS]):
        x = x + first_order(scheduler.own, i, k)[1] * 0.5 * x
    assert torch.allclose(one, torch.full((1, 4), x), atol=1e-6)
    assert torch.allclose(two, torch.full((1, 9), x), atol=1e-6)
    assert ertacache.summary(tiny.pipe).calls == 1


# --- noise levels that the pipeline edits ----------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_min", [0.002, 0.5])
def test_a_last_noise_level_that_the_pipeline_moves_is_followed(sigma_min):
    """Cosmos-Predict2 sets it to the one before, so that the last step stays where it is."""
    tiny = cosmos2()
    tiny.pipe.scheduler.register_to_config(sigma_min=sigma_min)
    plan = budget_plan(tiny, (0, 2, 4, STEPS - 1))
    assert plan.native_sigmas[-1] == plan.native_sigmas[-2] and plan.weights[-1][0] == 0
    seen = []

    def look(pipe, i, t, tensors):
        seen.append(tensors["latents"].clone())
        return tensors

    ertacache.enable(tiny.pipe, plan)
    tiny.run(callback_on_step_end=look)
    assert seen[-1].isfinite().all() and torch.equal(seen[-1], seen[-2])
