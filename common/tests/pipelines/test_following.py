"""The pipeline's T steps with a plan: what a call sees of them is what it sees without one."""

from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import SD3CFGCutoffCallback
from PIL import Image

import ertacache
from ertacache.numerics.jump import adams_bashforth
from ertacache.numerics.schedulers import solver_of
from helpers import HALF, CallCounter, budget_plan, fast, flux_plan, no_warning, refused, threshold_plan
from tiny_pipelines import (
    BUILDERS,
    STEPS,
    cogvideox_v2v,
    flux,
    flux_controlnet,
    flux_controlnet_img2img,
    flux_img2img,
    flux_inpaint,
    qwenimage_img2img,
    qwenimage_inpaint,
    sd3,
    sd3_img2img,
    wan,
    wan_two_models,
    wan_v2v,
)

LATE = [  # pipelines that begin late at strength < 1
    flux_img2img,
    flux_inpaint,
    flux_controlnet_img2img,
    qwenimage_img2img,
    qwenimage_inpaint,
    sd3_img2img,
    wan_v2v,
    cogvideox_v2v,
]


def model_inputs(tiny, module="transformer", **changes):
    """Latents and time of each call of a run."""
    seen = []

    def look(_, args, kwargs):
        latents = args[0] if args else kwargs["hidden_states"]
        seen.append((latents.clone(), kwargs["timestep"].flatten()[0].item()))

    hook = getattr(tiny.pipe, module).register_forward_pre_hook(look, with_kwargs=True)
    tiny.run(**changes)
    hook.remove()
    return seen


def record(tiny, **changes):
    """Step, time and the scheduler's step index at the end of each step of a run."""
    seen = []

    def look(pipe, i, t, tensors):
        seen.append((i, t.item(), getattr(pipe.scheduler, "step_index", None), pipe.num_timesteps))
        return tensors

    tiny.run(callback_on_step_end=look, **changes)
    return seen


# --- steps and noise levels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", fast(BUILDERS, "flux", "wan", "cogvideox", "sana"))
@pytest.mark.parametrize("kind", ["budget", "threshold"])
def test_callbacks_see_the_steps_of_the_uncached_run(name, kind):
    tiny = BUILDERS[name]()
    plan = budget_plan(tiny, HALF) if kind == "budget" else threshold_plan(tiny, (2, 4, 5, 6))
    uncached = record(tiny)
    grid = tiny.pipe.scheduler.timesteps.clone()
    ertacache.enable(tiny.pipe, plan)
    assert record(tiny) == uncached
    assert torch.equal(tiny.pipe.scheduler.timesteps, grid)


@pytest.mark.parametrize("build", fast(LATE, "flux_img2img", "wan_v2v", "cogvideox_v2v"))
@pytest.mark.parametrize("strength", [1.0, 0.75, 0.4])
def test_a_run_begins_where_the_uncached_run_begins(build, strength):
    """With the same latents at the same time; afterwards it computes the plan's steps and no others."""
    tiny = build()
    uncached = model_inputs(tiny, strength=strength)
    begin = STEPS - len(uncached) // tiny.branches
    ertacache.enable(tiny.pipe, budget_plan(tiny, HALF))
    planned = model_inputs(tiny, strength=strength)
    computed = sorted({begin, *(step for step in HALF if step > begin)})
    assert torch.equal(planned[0][0], uncached[0][0])
    times = [t for _, t in uncached[:: tiny.branches]]
    assert [t for _, t in planned[:: tiny.branches]] == [times[step - begin] for step in computed]
    summary = ertacache.summary(tiny.pipe)
    assert (summary.computed, summary.skipped) == (len(computed), STEPS - begin - len(computed))


@pytest.mark.parametrize("build", [flux_inpaint, qwenimage_inpaint])
def test_inpainting_keeps_the_region_outside_of_the_mask(build):
    """At each computed step the model sees there what the uncached run shows it: the image with the same noise."""
    tiny = build()
    tiny.arguments["mask_image"] = Image.new("L", (32, 32))
    tiny.arguments["mask_image"].paste(255, (16, 0, 32, 32))  # the right half
    uncached = model_inputs(tiny)
    final = tiny.run()
    ertacache.enable(tiny.pipe, budget_plan(tiny, HALF))
    planned = dict((t, x) for x, t in model_inputs(tiny))
    known = slice(0, 1)  # the first token lies outside of the mask
    assert len(planned) == 3
    for x, t in uncached:
        if t in planned:
            assert torch.equal(planned[t][0, known], x[0, known])
    assert torch.equal(tiny.run()[0, known], final[0, known])


def test_what_a_callback_changes_between_computed_steps_stays():
    """It adds 1 to the latents at step 3, in the middle of a jump from step 2: all of it is there at the end of it."""
    tiny = sd3()
    plan = budget_plan(tiny, (0, 1, 2, 6))
    ends = []

    def change(add):
        def callback(pipe, i, t, tensors):
            if i == 5:
                ends.append(tensors["latents"].clone())
            return {"latents": tensors["latents"] + (add if i == 3 else 0)}

        return callback

    ertacache.enable(tiny.pipe, plan)
    for add in (0, 1):
        tiny.run(callback_on_step_end=change(add))
    assert torch.allclose(ends[1], ends[0] + 1, atol=1e-5)


@pytest.mark.parametrize("build", fast([sd3, wan, flux], "sd3"))
def test_the_shares_of_a_jump_are_linear_and_add_up_to_it(build):
    tiny = build()
    plan, seen = budget_plan(tiny, (0, 1, 2, 6)), []

    def look(pipe, i, t, tensors):
        seen.append(tensors["latents"].clone())
        return tensors

    ertacache.enable(tiny.pipe, plan)
    tiny.run(callback_on_step_end=look)
    levels = tiny.pipe.scheduler.sigmas
    for i in range(2, 6):
        share = (levels[i + 1] - levels[2]) / (levels[6] - levels[2])
        assert torch.allclose(seen[i], seen[1] + share * (seen[5] - seen[1]), atol=1e-5)


# --- windows ---------------------------------------------------------------------------------------------------------


def calls_by_time(tiny, mark, **changes):
    """{time: marks of its calls}, in the order of the calls."""
    seen = {}

    def look(_, args, kwargs):
        seen.setdefault(round(kwargs["timestep"].flatten()[0].item(), 3), []).append(mark(kwargs))

    hook = tiny.pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    tiny.run(**changes)
    hook.remove()
    return seen


def sd3_of_two_layers():
    tiny = sd3()
    config = {**tiny.pipe.transformer.config, "num_layers": 2}
    torch.manual_seed(0)
    tiny.pipe.transformer = type(tiny.pipe.transformer)(**config).eval()
    return tiny


@pytest.mark.parametrize("computed", [HALF, (0, 4, 6), tuple(range(STEPS))])
def test_skip_layer_guidance_covers_the_same_noise_levels(computed):
    """The window of steps 2 to 5 begins and ends between computed steps: its extra calls are made at those inside."""
    tiny = sd3_of_two_layers()
    window = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.7}
    uncached = calls_by_time(tiny, lambda kwargs: kwargs.get("skip_layers"), guidance_scale=5.0, **window)
    assert [len(calls) for calls in uncached.values()] == [1, 1, 2, 2, 2, 2, 1, 1]
    ertacache.enable(tiny.pipe, budget_plan(tiny, computed))
    planned = calls_by_time(tiny, lambda kwargs: kwargs.get("skip_layers"), guidance_scale=5.0, **window)
    times = list(uncached)
    assert planned == {times[step]: uncached[times[step]] for step in computed}


def test_a_cutoff_callback_ends_guidance_at_the_same_noise_level():
    tiny = sd3()
    cutoff = SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=3)
    options = {"guidance_scale": 5.0, "callback_on_step_end": cutoff}
    tensors = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
    tiny.arguments["callback_on_step_end_tensor_inputs"] = tensors

    def rows(kwargs):
        return len(kwargs["hidden_states"])

    uncached = calls_by_time(tiny, rows, **options)
    assert [calls for calls in uncached.values()] == [[2]] * 4 + [[1]] * 4
    ertacache.enable(tiny.pipe, budget_plan(tiny, HALF))
    times = list(uncached)
    assert calls_by_time(tiny, rows, **options) == {times[step]: uncached[times[step]] for step in HALF}


def test_a_controlnet_is_called_at_computed_steps_and_heard_in_the_same_window():
    tiny = flux_controlnet()
    window = {"control_guidance_start": 0.25, "control_guidance_end": 0.75}
    scales = []
    net = tiny.pipe.controlnet
    hook = net.register_forward_pre_hook(lambda _, a, kw: scales.append(kw["conditioning_scale"]), with_kwargs=True)
    tiny.run(**window)
    uncached = list(scales)
    assert uncached == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    scales.clear()
    ertacache.enable(tiny.pipe, budget_plan(tiny, HALF))
    scales.clear()
    tiny.run(**window)
    hook.remove()
    assert scales == [uncached[step] for step in HALF]


# --- denoisers -------------------------------------------------------------------------------------------------------


def test_a_skipped_step_before_the_second_model_needs_no_call_of_it():
    """The boundary lies between computed steps: what the first model returned stands for the second's."""
    tiny = wan_two_models()
    times = [t for _, t in model_inputs(tiny)]
    below = sum(t >= 800 for t in times) // tiny.branches  # the first step of the second model
    assert 1 < below < STEPS - 1
    ertacache.enable(tiny.pipe, budget_plan(tiny, tuple(i for i in range(STEPS) if i != below)))
    with CallCounter(tiny.pipe.transformer) as first, CallCounter(tiny.pipe.transformer_2) as second:
        tiny.run()
    assert (first.count, second.count) == (2 * below, 2 * (STEPS - below - 1))


def test_a_stand_in_is_its_denoiser_to_all_that_uses_it():
    tiny = flux()
    module = tiny.pipe.transformer
    ertacache.enable(tiny.pipe, flux_plan())
    stand_in = tiny.pipe.transformer
    assert isinstance(stand_in, type(module)) and isinstance(stand_in, torch.nn.Module)
    assert stand_in.config is module.config and stand_in.state_dict().keys() == module.state_dict().keys()
    stand_in.anything = 3
    assert module.anything == 3
    del stand_in.anything
    assert not hasattr(module, "anything") and not hasattr(stand_in, "anything")
    with CallCounter(module) as calls:  # outside of a run
        inputs = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(5, 3), "guidance": torch.ones(1)}
        text = {"encoder_hidden_states": torch.zeros(1, 5, 16), "pooled_projections": torch.zeros(1, 16)}
        with torch.no_grad():
            stand_in(hidden_states=torch.zeros(1, 4, 16), timestep=torch.ones(1), **inputs, **text)
    assert calls.count == 1
    tiny.pipe.to(torch.float64)
    assert module.dtype == torch.float64
    ertacache.disable(tiny.pipe)
    assert tiny.pipe.transformer is module


def test_a_model_that_is_put_in_after_enable_is_skipped_too():
    tiny = flux()
    plan = budget_plan(tiny, HALF)
    ertacache.enable(tiny.pipe, plan)
    wanted = tiny.run()
    tiny.pipe.transformer = flux().pipe.transformer  # the same weights
    with CallCounter(tiny.pipe.transformer) as calls, no_warning():
        assert torch.equal(tiny.run(), wanted)
    assert calls.count == len(HALF)


def test_a_model_call_that_could_not_be_skipped_is_a_warning():
    """A copy of the pipeline whose model nobody stands in for, and which shares the scheduler."""
    import copy

    tiny = flux()
    ertacache.enable(tiny.pipe, budget_plan(tiny, HALF))
    other = replace(tiny, pipe=copy.copy(tiny.pipe))
    other.pipe.transformer = flux().pipe.transformer
    with pytest.warns(UserWarning, match="no model call was skipped at step 2.*ertacache.enable"):
        other.run()


# --- short histories -------------------------------------------------------------------------------------------------


def test_adams_bashforth_is_exact_where_the_velocity_is_linear_in_the_noise_level():
    """dx/ds = 2s: from s = 0.8 to 0.3 with velocities at 0.8 and 1 the change is 0.3² − 0.8²."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.3])
    levels = [1.0, 0.8, 0.3, 0.0]
    scale, weights = adams_bashforth(solver_of(scheduler).first_order, levels, [1, 0], 2)
    assert scale == 1 and sum(w * 2 * s for w, s in zip(weights, (0.8, 1.0), strict=True)) == pytest.approx(
        0.3**2 - 0.8**2
    )
    assert adams_bashforth(solver_of(scheduler).first_order, levels, [1], 2) == (1.0, [pytest.approx(-0.5)])


def test_a_jump_that_lacks_outputs_uses_the_weights_for_a_short_history():
    """From step 2 on, which is none of the plan's; every row of the plan needs two outputs of its own steps."""
    tiny = flux_img2img()
    first_order = budget_plan(tiny, HALF, history_length=2)
    levels = first_order.native_sigmas
    rows = list(first_order.weights)
    plan = replace(first_order, weights=(rows[0], *((9.0, 9.0),) * 2, rows[3]))  # 9: must not be used from 2 on
    starts = [((0.0, 0.0), (0.0, 0.0))] * STEPS
    starts[2] = ((levels[3] - levels[2], 0.0), (levels[5] - levels[3], 0.0))  # of first order too
    fitted = replace(plan, start_weights=tuple(starts), start_scale=((1.0, 1.0),) * STEPS)
    results = []
    for each in (first_order, fitted):
        ertacache.enable(tiny.pipe, each)
        results.append(tiny.run())
    times = tiny.pipe.scheduler.timesteps.tolist()
    assert torch.allclose(*results, atol=1e-5)
    seen = [t for _, t in model_inputs(tiny)]
    assert [round(1000 * t) for t in seen] == [round(times[step]) for step in (2, 3, 5)]


def test_a_plan_that_begins_late_computes_all_steps_before(tmp_path):
    """It was calibrated at strength 0.5, and the call begins at step 2 of 8."""
    tiny = flux_img2img()
    whole = budget_plan(tiny, HALF)
    levels = whole.native_sigmas
    jumps = ((levels[6] - levels[4],), (-levels[6],))
    plan = replace(whole, computed=(4, 6), begin=4, weights=jumps, scale=(1.0, 1.0))
    assert plan.version == 2 and plan.speedup == 2 and ertacache.Plan.load(plan.save(tmp_path / "p.json")) == plan
    ertacache.enable(tiny.pipe, plan)
    found = model_inputs(tiny)
    ertacache.disable(tiny.pipe)
    uncached = model_inputs(tiny)
    assert [t for _, t in found] == [uncached[k][1] for k in (0, 1, 2, 4)]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(found[:3], uncached[:3], strict=True))
    with refused("from 4 to 8", "ertacache.enable", error=ertacache.PlanError):
        from ertacache.numerics.jump import follow

        follow(None, None, plan)


def test_schedulers_of_two_plans_may_be_exchanged():
    """The model's stand-in goes with them."""
    tiny, parts = sd3(), {}
    for computed in (HALF, (0, 4)):
        ertacache.disable(tiny.pipe)
        ertacache.enable(tiny.pipe, budget_plan(sd3(), computed))
        parts[computed] = tiny.pipe.scheduler, tiny.run()
    for computed in (HALF, (0, 4), HALF):
        tiny.pipe.scheduler, wanted = parts[computed]
        with CallCounter(tiny.pipe.transformer) as calls, no_warning():
            assert torch.equal(tiny.run(), wanted)
        assert calls.count == len(computed)
