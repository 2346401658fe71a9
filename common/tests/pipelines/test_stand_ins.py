"""The scheduler's stand-in: what code sets on it, hooks, changes after enable; and devices and models with habits."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch.overrides import TorchFunctionMode

import ertacache
from ertacache import PlanError
from ertacache.numerics.schedulers import check_scheduler
from ertacache.pipelines.enable import originals
from helpers import HALF, CallCounter, budget_plan, calibrate, no_warning, refused, threshold_plan, with_prompts
from tiny_pipelines import STEPS, flux, sana, sd3, wan

# --- attributes and hooks ----------------------------------------------------------------------------------------


def test_what_code_sets_on_the_scheduler_reaches_it():
    """A pipeline that sets sigma_min before each call: all steps computed is still its uncached run."""
    tiny = sd3()

    class Community(type(tiny.pipe)):
        def __call__(self, *args, **kwargs):
            self.scheduler.sigma_min = 0.0
            return super().__call__(*args, **kwargs)

    tiny.pipe.__class__ = Community
    plain, own = tiny.run(), tiny.pipe.scheduler
    ertacache.enable(tiny.pipe, budget_plan(tiny, range(STEPS)))
    own.sigma_min = 0.5
    assert torch.equal(tiny.run(), plain)
    assert own.sigma_min == tiny.pipe.scheduler.sigma_min == 0.0
    tiny.pipe.scheduler.set_timesteps(STEPS)
    tiny.pipe.scheduler.timesteps = own.timesteps + 1
    assert tiny.pipe.scheduler.timesteps is own.timesteps
    del tiny.pipe.scheduler.sigma_min
    assert not hasattr(own, "sigma_min")


@pytest.mark.parametrize("first", ["hook", "enable"])
def test_a_hook_on_the_schedulers_step_is_called_at_every_step_and_changes_the_latents(first):
    tiny, calls = sd3(), []
    plan = budget_plan(tiny, HALF)
    ertacache.enable(tiny.pipe, plan)
    wanted = tiny.run()
    ertacache.disable(tiny.pipe)

    def hook_on(scheduler):
        step = scheduler.step

        def hook(model_output, timestep, sample, **options):
            calls.append(float(timestep))
            x = step(model_output, timestep, sample, **options)[0]
            return (x + 1.0 if len(calls) % STEPS == 0 else x,)

        scheduler.step = hook

    if first == "hook":
        hook_on(tiny.pipe.scheduler)
        ertacache.enable(tiny.pipe, plan)
    else:
        ertacache.enable(tiny.pipe, plan)
        hook_on(tiny.pipe.scheduler)
    found = tiny.run()
    assert calls == tiny.pipe.scheduler.timesteps.tolist()
    assert torch.allclose(found, wanted + 1.0, atol=1e-5)
    if first == "enable":
        del tiny.pipe.scheduler.step
        assert torch.equal(tiny.run(), wanted)


def test_a_hook_that_a_multistep_solvers_jumps_could_not_call_is_refused():
    tiny = wan()
    plan = budget_plan(tiny, HALF)
    step = tiny.pipe.scheduler.step
    tiny.pipe.scheduler.step = lambda *args, **options: step(*args, **options)
    with refused("UniPCMultistepScheduler", "del pipe.scheduler.step"):
        ertacache.enable(tiny.pipe, plan)


# --- changes after enable ----------------------------------------------------------------------------------------


def test_a_changed_config_is_refused_and_another_shift_is_one_warning():
    tiny = sd3()
    plan = budget_plan(tiny, HALF)
    ertacache.enable(tiny.pipe, plan)
    with no_warning():
        tiny.run()
    tiny.pipe.scheduler.set_shift(9.0)
    with pytest.warns(UserWarning, match=r"other noise levels.*step \d is at .*, in the calibration at"):
        found = tiny.run()
    assert found.isfinite().all()
    with no_warning():
        tiny.run()
    tiny.pipe.scheduler.register_to_config(use_karras_sigmas=True)
    with CallCounter(tiny.pipe.transformer) as calls, refused("use_karras_sigmas False ≠ True", error=PlanError):
        tiny.run()
    assert calls.count == 0


def test_noise_levels_that_follow_the_images_size_are_no_warning():
    tiny = flux()
    ertacache.enable(tiny.pipe, budget_plan(tiny, HALF))
    with no_warning():
        assert tiny.run(height=64, width=64).isfinite().all()


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, thresholding=True), "thresh"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling"),
    ],
)
def test_options_that_change_a_step_are_refused_by_name(scheduler, words):
    with refused(words, "= True", "=False)"):
        check_scheduler(scheduler)


@pytest.mark.parametrize("kind", ["budget", "threshold"])
def test_an_option_of_the_step_that_no_plan_follows_is_named(kind):
    """CogVideoX with eta > 0 draws noise; at all steps computed that is the pipeline's own affair."""
    from tiny_pipelines import cogvideox

    tiny = cogvideox()
    plan = budget_plan(tiny, HALF) if kind == "budget" else threshold_plan(tiny, (2, 4))
    plain = tiny.run(eta=0.5)
    ertacache.enable(tiny.pipe, plan)
    with refused("eta = 0.5", "leave it out"):
        tiny.run(eta=0.5)
    ertacache.disable(tiny.pipe)
    ertacache.enable(tiny.pipe, budget_plan(tiny, range(STEPS)))
    assert torch.equal(tiny.run(eta=0.5), plain)


# --- equal noise levels, and values that are not finite ------------------------------------------------------------


def test_a_jump_between_equal_noise_levels_stays_where_it_is(tmp_path):
    tiny = with_prompts(sd3())
    sigmas = np.linspace(1, 0, STEPS).tolist()  # the scheduler appends another 0
    plans = calibrate(tiny, speedups=[1, 2], work=tmp_path, sigmas=sigmas)
    for plan in plans.values():
        ertacache.enable(tiny.pipe, plan)
        assert tiny.run(prompt=["a red star"], sigmas=sigmas).isfinite().all()
        ertacache.disable(tiny.pipe)
    every = replace(plans[2], computed=(*range(STEPS - 2), STEPS - 1), **rows(plans[2], STEPS - 1))
    ertacache.enable(tiny.pipe, every)
    assert tiny.run(prompt=["a red star"], sigmas=sigmas).isfinite().all()


def test_sigmas_with_an_equal_pair_are_one_line_in_a_call_and_in_a_calibration(tmp_path):
    tiny = with_prompts(sd3())
    plan, sigmas = calibrate(tiny, work=tmp_path)[2], np.linspace(1, 1 / STEPS, STEPS).tolist()
    sigmas[4] = sigmas[3]
    ertacache.enable(tiny.pipe, plan)
    words = "must fall from noise to data (step 3 leads from 0.833 to 0.833)", "other sigmas"
    with CallCounter(originals(tiny.pipe)["transformer"]) as calls, refused(*words):
        tiny.run(prompt=["a red star"], sigmas=sigmas)
    with refused(*words):
        calibrate(tiny, work=tmp_path, sigmas=sigmas)
    assert calls.count == 0


def rows(plan, count):
    """So many first rows of each of the plan's arrays, over again."""
    names = ("weights", "scale", "predictor", "repair", "repair_scale")
    changes = {name: (getattr(plan, name) * count)[:count] for name in names}
    return changes | {"prediction_errors": tuple((row * count)[:count] for row in plan.prediction_errors)}


@pytest.mark.parametrize(("plan_of", "steps_of_plan", "broken"), [(budget_plan, HALF, 3), (threshold_plan, (1, 3), 4)])
def test_a_run_that_ends_in_no_numbers_is_an_error_that_names_the_step(plan_of, steps_of_plan, broken):
    tiny, steps = sd3(), []
    ertacache.enable(tiny.pipe, plan_of(tiny, steps_of_plan))

    def break_the_model(pipe, i, t, tensors):
        steps.append(i)
        if i == 2:
            with torch.no_grad():
                pipe.transformer.proj_out.bias.fill_(torch.nan)
        return tensors

    with refused(f"at step {broken}", "not finite", "ertacache.disable"):
        tiny.run(callback_on_step_end=break_the_model)
    assert steps[-1] == STEPS - 2  # nothing is handed out


# --- models and devices with habits --------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [flux, wan])
def test_outputs_that_the_model_overwrites_at_its_next_call_are_copied(build, tmp_path):
    """As CUDA graphs and TensorRT engines with static bindings do."""
    tiny = with_prompts(build())
    plain = calibrate(tiny, work=tmp_path)[2]
    ertacache.enable(tiny.pipe, plain)
    wanted = tiny.run(prompt=["a red star"])
    drift = ertacache.summary(tiny.pipe).drift
    forward, buffers = tiny.pipe.transformer.forward, {}

    def static(*args, **kwargs):
        text = kwargs["encoder_hidden_states"]  # one buffer for each guidance branch
        buffer = buffers.setdefault(float(text.sum()), [])
        output = forward(*args, **kwargs)[0]
        buffer[:] = buffer or [torch.empty_like(output)]
        return (buffer[0].copy_(output),)

    tiny.pipe.transformer.forward = static
    assert torch.equal(tiny.run(prompt=["a red star"]), wanted)
    assert ertacache.summary(tiny.pipe).drift == drift
    ertacache.disable(tiny.pipe)
    assert calibrate(tiny, work=tmp_path)[2].weights == plain.weights


class WithoutFloat64(TorchFunctionMode):
    """As on Apple's GPUs: only tensors on the CPU can be converted to float64."""

    class OnCPU(torch.Tensor):
        pass

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.double and not isinstance(args[0], self.OnCPU):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        output = func(*args, **(kwargs or {}))
        return output.clone().as_subclass(self.OnCPU) if func is torch.Tensor.cpu else output


def test_a_device_without_float64_runs_to_the_end_and_calibrates(tmp_path):
    tiny = with_prompts(sd3())
    plan = calibrate(tiny, work=tmp_path)[2]
    plain = tiny.run(prompt=["a red star"])
    with WithoutFloat64():
        for mode in ("warn", "compute", "ignore"):
            ertacache.enable(tiny.pipe, plan, on_drift=mode)
            assert (tiny.run(prompt=["a red star"]) - plain).abs().max() < 0.1
            assert ertacache.summary(tiny.pipe).drift
            ertacache.disable(tiny.pipe)
        assert np.allclose(calibrate(tiny, work=tmp_path)[2].weights, plan.weights)


def test_warnings_name_the_line_that_called_the_pipeline():
    tiny = sana()
    plan = budget_plan(tiny, HALF)
    plan = replace(plan, native_sigmas=tuple(0.5 * s for s in plan.native_sigmas))
    ertacache.enable(tiny.pipe, plan)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny.run()
    (warning,) = [w for w in caught if "noise levels" in str(w.message)]
    assert "ertacache" not in warning.filename
