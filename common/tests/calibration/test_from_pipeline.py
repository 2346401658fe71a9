"""Plans from a pipeline's own call: the same as from the model folder's loop, and nothing left behind."""

import _thread
import json
import signal
import threading
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import AdaptiveProjectedGuidance, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from PIL import Image

import ertacache
from conftest import open_model_folder
from ertacache.calibration import from_pipeline, paused_call
from ertacache.calibration.budget import BudgetCalibration
from ertacache.calibration.choice import geometric_mean
from ertacache.calibration.paused_call import THREAD
from ertacache.calibration.session import CalibrationSession
from ertacache.numerics.schedulers import first_order
from ertacache.pipelines.scheduler import is_planned
from helpers import PROMPTS, CallCounter, calibrate, fast, refused, with_prompts
from more_tiny_pipelines import (
    chronoedit,
    cosmos2,
    hunyuan15,
    ltx2,
    ltx_condition,
    ltx_condition_image,
    mochi,
    modular,
    skyreels,
    zimage,
)
from more_tiny_pipelines import with_prompts as more_with_prompts
from tiny_pipelines import (
    STEPS,
    cogvideox,
    flux,
    flux_img2img,
    flux_inpaint,
    flux_kontext,
    in_dtype,
    ltx,
    sana,
    sd3,
    sd3_img2img,
    wan,
    wan_i2v,
    wan_v2v,
)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    assert not waiting_calls()


def waiting_calls():
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


def error(tiny, plan, prompts=PROMPTS[:4]):
    """Error of the final latents that the enabled plan leads to, geometric mean over the prompts of its fit."""

    def finals():
        return torch.cat([tiny.run(prompt=[prompt], seed=seed).float() for seed, prompt in enumerate(prompts)])

    ertacache.enable(tiny.pipe, plan)
    found = finals()
    ertacache.disable(tiny.pipe)
    return geometric_mean((found - finals()).square().flatten(1).mean(1).numpy())


# --- the plans ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("key", ["flux", "cogvideox"])
def test_the_plans_are_those_of_the_model_folders_loop(key, empty_folder):
    """Same prompts, seeds and batches: same schedule, weights and errors, whoever owns the loop."""
    model_folder = open_model_folder(key)
    sampler, pipe, prompts = model_folder.sampler, model_folder.pipe, (model_folder.prompts * 3)[:5]
    options = {"batch_size": 2, "work": empty_folder, "progress": False}
    settings = sampler.settings_of(pipe, steps=STEPS)
    session = CalibrationSession(sampler, pipe, prompts, range(7, 12), settings=settings, **options)
    wanted = BudgetCalibration(session).plans([4, 3])
    options |= {"num_inference_steps": STEPS, "guidance_scale": model_folder.guidance, "max_sequence_length": 16}
    found = ertacache.calibrate(pipe, prompts, [2, 8 / 3], seed=7, **options, **model_folder.options)
    for one, other in zip(found.values(), wanted.values(), strict=True):
        assert one.computed == other.computed and one.native_sigmas == other.native_sigmas
        assert np.allclose(one.weights, other.weights, atol=1e-5) and np.allclose(one.scale, other.scale, atol=1e-5)
        assert one.predicted_error == pytest.approx(other.predicted_error, rel=1e-4)
        assert one.held_out_error == pytest.approx(other.held_out_error, rel=1e-4)
        assert one.requirements.model == other.requirements.model
        assert one.requirements.scheduler == other.requirements.scheduler


def first_order_plan(plan, jumps):
    """The same schedule with jumps (a, w) on the newest velocity."""
    gone = ("predictor", "prediction_errors", "repair", "repair_scale", "start_weights", "start_scale")
    scale, weights = zip(*jumps, strict=True)
    return replace(plan, weights=tuple((w,) for w in weights), scale=scale, **dict.fromkeys(gone, ()))


@pytest.mark.parametrize("build", fast([sd3, sana, ltx, wan_i2v, flux_kontext], "sd3"))
def test_a_plan_beats_first_order_jumps_over_its_steps(build):
    """And its stored error is that of the enabled pipeline: rollout and run are the same arithmetic."""
    tiny = with_prompts(build())
    plan = calibrate(tiny)[2]
    assert plan.nfe == STEPS // 2
    found = error(tiny, plan)
    jumps = [first_order(tiny.pipe.scheduler, i, k) for i, k in pairwise([*plan.computed, STEPS])]
    plain = first_order_plan(plan, jumps)
    assert found == pytest.approx(plan.predicted_error, rel=1e-3)
    assert found < error(tiny, plain)


@pytest.mark.slow
def test_what_a_plan_says_of_itself():
    tiny = with_prompts(wan_i2v())
    plan = calibrate(tiny, seed=3)[2]
    made, settings = plan.provenance, plan.requirements.settings
    assert made["seeds"] == [3, 4, 5, 6, 7] and made["prompts"]["count"] == 5 and made["prompts"]["fitted"] == 4
    assert made["model"] == "WanImageToVideoPipeline" and plan.steps == STEPS
    assert settings["pipeline"] == "WanImageToVideoPipeline" and settings["guidance_scale"] == 5.0
    assert settings["image"].startswith("Image ") and settings["dtype"] == "float32"


@pytest.mark.slow
def test_the_calls_of_one_calibration():
    """One to see the first latents, T per prompt for the uncached run, N per prompt and rollout, or less."""
    tiny = with_prompts(flux())
    with CallCounter(tiny.pipe.transformer) as calls:
        plans = calibrate(tiny, speedups=[2, 8 / 3])
    rollouts = sum(p.nfe * p.provenance["calibration"]["rollouts"] for p in plans.values())
    assert list(plans) == [2, 8 / 3] and calls.count < 1 + len(PROMPTS) * (STEPS + rollouts)


@pytest.mark.parametrize("build", fast([flux, wan, sana, sd3], "wan"))
def test_rollouts_that_share_calls_make_the_same_plan(build, monkeypatch):
    tiny = with_prompts(build())
    monkeypatch.setattr(BudgetCalibration, "cost", lambda self, schedule, *_: len(schedule))  # as many rollouts in both
    with CallCounter(tiny.pipe.transformer) as shared:
        plan = calibrate(tiny)[2]
    monkeypatch.setattr(paused_call, "stateful", lambda *_, **__: ["something"])
    monkeypatch.setattr(from_pipeline, "stateful", lambda *_, **__: [])
    with CallCounter(tiny.pipe.transformer) as alone:
        assert calibrate(tiny)[2] == plan
    assert shared.count < 0.95 * alone.count


@pytest.mark.slow
def test_batches_make_the_same_plan():
    one, three = (calibrate(with_prompts(flux()), batch_size=size)[2] for size in (1, 3))
    assert one.computed == three.computed and np.allclose(one.weights, three.weights, atol=1e-4)


# --- what stays as it was ----------------------------------------------------------------------------------------


def test_the_pipeline_is_left_as_it_is(empty_folder):
    tiny = with_prompts(flux())
    before, config = dict(vars(tiny.pipe)), dict(tiny.pipe.config)
    scheduler = dict(vars(tiny.pipe.scheduler))
    plan = calibrate(tiny)[2]
    assert vars(tiny.pipe) == before and dict(tiny.pipe.config) == config
    assert vars(tiny.pipe.scheduler).keys() == scheduler.keys()
    assert all(vars(tiny.pipe.scheduler)[name] is value for name, value in scheduler.items())
    assert not list(empty_folder.iterdir())
    ertacache.enable(tiny.pipe, plan)
    again = calibrate(tiny)[2]
    assert again == plan and is_planned(tiny.pipe.scheduler) and tiny.pipe.scheduler.plan is plan


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_torch_is_in_the_threads_as_it_is_outside():
    tiny, seen = with_prompts(flux()), set()

    def look(*_):
        seen.add((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()))

    tiny.pipe.transformer.register_forward_pre_hook(look)
    with torch.autocast("cpu", torch.float16):
        calibrate(tiny)
    assert seen == {(True, torch.float16, False)}


# --- interruptions and errors ------------------------------------------------------------------------------------


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal; a shell that starts tests in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize("calls", fast([3, 20, 60], 20))  # at the first prompts of the uncached run; in a rollout
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("of the GPU"), pytest.param(None, marks=pytest.mark.slow)], ids=["error", "Ctrl-C"]
)
def test_it_resumes_where_it_ended(error, calls, empty_folder, interruptible):
    tiny, count = with_prompts(flux()), 0
    own = tiny.pipe.scheduler

    def end(*_):
        nonlocal count
        count += 1
        if count == calls and error is not None:
            raise error
        if count == calls:
            _thread.interrupt_main()

    hook = tiny.pipe.transformer.register_forward_pre_hook(end)
    with pytest.raises(KeyboardInterrupt if error is None else torch.OutOfMemoryError) as raised:
        calibrate(tiny)
    assert (error is None or raised.value is error) and tiny.pipe.scheduler is own
    assert not waiting_calls() and count <= calls + 1
    hook.remove()
    with CallCounter(tiny.pipe.transformer) as second:
        plan = calibrate(tiny)[2]
    assert not list(empty_folder.iterdir())
    with CallCounter(tiny.pipe.transformer) as whole:
        assert calibrate(tiny)[2] == plan
    assert (second.count < whole.count) == (calls > 3)  # after three no prompt was done


def test_an_error_in_one_prompts_call_ends_all():
    tiny, error = with_prompts(flux()), RuntimeError("no such word")
    encode = tiny.pipe.encode_prompt

    def encode_prompt(prompt, **options):
        if prompt == PROMPTS[2]:
            raise error
        return encode(prompt, **options)

    tiny.pipe.encode_prompt = encode_prompt
    with refused("FluxPipeline's call failed (no such word)") as raised:
        calibrate(tiny)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": []}, ("no calibration prompts: give some",)),
        ({"prompts": [" "]}, ("prompts = [' ']", "say what should be seen")),
        ({"prompts": ["a red star", ""]}, ("prompts = ['a red star', '']", "say what should be seen")),
        ({"prompts": "a red star"}, ("prompts = 'a red star'", "list")),
        ({"prompts": ["a red star", None]}, ("['a red star', None]", "list")),
        ({"speedups": []}, ("speedups = []", "[2, 3]")),
        ({"speedups": 2}, ("speedups = 2", "[2, 3]")),
        ({"speedups": [0.5]}, ("speedups 0.5", "at least 1")),
        ({"speedups": ["2"]}, ("speedups '2'", "number")),
        ({"speedups": [None]}, ("speedups None", "number")),
        ({"speedups": [float("nan")]}, ("speedups nan", "number")),
        ({"speedups": [5]}, ("speedups 5", "at most 4 of 8 steps")),
        ({"num_inference_steps": None}, ("num_inference_steps = None", "from 3")),
        ({"num_inference_steps": 2}, ("num_inference_steps = 2", "from 3")),
        ({"num_inference_steps": 100_000}, ("num_inference_steps = 100000", "1000")),
        ({"batch_size": 0}, ("batch_size = 0", "at least 1")),
        ({"batch_size": "a"}, ("batch_size = 'a'", "at least 1")),
        ({"batch_size": 2.5}, ("batch_size = 2.5", "at least 1")),
        ({"seed": 2**64}, ("seed 18446744073709551616", "whole number")),
        ({"seed": 1.5}, ("seed 1.5", "whole number")),
        ({"work": "a\0b"}, ("a\\x00b", "folder")),
        ({"work": ["a"]}, ("work = ['a']", "folder")),
        ({"effort": "great"}, ("effort great", "quick, normal, thorough")),
        ({"effort": ["a"]}, ("effort ['a']", "quick, normal, thorough")),
        ({"effort": None}, ("effort None", "quick, normal, thorough")),
        ({"guidance_scale": float("nan")}, ("guidance_scale = nan", "finite")),
        ({"guidance_scale": np.float32("inf")}, ("guidance_scale = ", "inf", "finite")),
        ({"sigmas": [1.0, float("nan")]}, ("sigmas = [1.0, nan]", "finite numbers")),
        ({"max_sequence_length": -1}, ("max_sequence_length = -1", "not negative")),
        ({"height": -16}, ("height = -16", "of at least 1")),
        ({"height": 0}, ("height = 0", "of at least 1")),
        ({"width": True}, ("width = True", "of at least 1")),
        ({"sigmas": []}, ("sigmas = []", "a number for each step")),
        ({"num_inference_steps": -1}, ("num_inference_steps = -1", "from 3")),
        ({"height": 3}, ("the latents hold no numbers", "height=3", "larger sizes")),
        ({"height": "32"}, ("FluxPipeline's call failed (", "height='32'", "check these arguments")),
        ({"joint_attention_kwargs": 1}, ("FluxPipeline's call failed ('int' object", "joint_attention_kwargs=1")),
        ({"target": "exact"}, ("target = 'exact'", "'reference'")),
        ({"guidance": 3.5}, ("guidance", "FluxPipeline", "leave it out")),
        ({"generator": None}, ("generator", "leave it out")),
        ({"num_images_per_prompt": 2}, ("num_images_per_prompt", "leave it out")),
        ({"sigmas": [1.0, 0.5, 0.2]}, ("3 steps, not 8", "num_inference_steps=3")),
    ],
)
def test_bad_input_is_one_line(changes, words, empty_folder):
    with refused(*words):
        calibrate(with_prompts(flux()), **changes)
    assert not list(empty_folder.iterdir())


# --- calls that begin late, or change the latents ----------------------------------------------------------------


def finals(tiny, prompts=PROMPTS[:4], **changes):
    return torch.cat([tiny.run(prompt=[prompt], seed=seed, **changes) for seed, prompt in enumerate(prompts)])


@pytest.mark.parametrize("build", fast([flux_img2img, sd3_img2img, wan_v2v], "flux_img2img"))
@pytest.mark.parametrize("strength", [0.75, 0.5])
def test_a_call_that_begins_late_is_calibrated_from_there(build, strength):
    """Its plan begins at the same step, predicts its error, and is nearer to the uncached run than Euler steps."""
    tiny = with_prompts(build())
    plan = calibrate(tiny, strength=strength)[2]
    begin = round(STEPS * (1 - strength))
    left = STEPS - begin
    assert (plan.begin, plan.computed[0], plan.nfe, plan.speedup) == (begin, begin, left // 2, 2)
    assert len(plan.native_sigmas) == STEPS + 1 and plan.steps == STEPS
    found = error(replace(tiny, arguments={**tiny.arguments, "strength": strength}), plan)
    assert found == pytest.approx(plan.predicted_error, rel=1e-3)
    jumps = [first_order(tiny.pipe.scheduler, i, k) for i, k in pairwise([*plan.computed, STEPS])]
    plain = first_order_plan(plan, jumps)
    assert found < error(replace(tiny, arguments={**tiny.arguments, "strength": strength}), plain)


def test_a_late_begin_is_kept_in_the_file(tmp_path):
    plan = calibrate(with_prompts(flux_img2img()), strength=0.5)[2]
    path = plan.save(tmp_path / "plan.json")
    fields = json.loads(path.read_text())
    assert (fields["version"], fields["begin"], fields["computed"][0]) == (2, 4, 4)
    assert ertacache.Plan.load(path) == plan


def test_inpainting_is_calibrated_on_what_it_leaves_to_the_solver():
    """The predicted error is that of the run: the region outside of the mask has none."""
    tiny = with_prompts(flux_inpaint())
    tiny.arguments["mask_image"] = Image.new("L", (32, 32))
    tiny.arguments["mask_image"].paste(255, (16, 0, 32, 32))  # the right half
    plan = calibrate(tiny)[2]
    found = error(tiny, plan)
    assert plan.begin == 2 and found == pytest.approx(plan.predicted_error, rel=1e-2)
    jumps = [first_order(tiny.pipe.scheduler, i, k) for i, k in pairwise([*plan.computed, STEPS])]
    assert found < error(tiny, first_order_plan(plan, jumps))


def test_a_call_that_changes_all_latents_between_its_steps_is_refused():
    def noise(pipe, i, t, tensors):
        return {"latents": tensors["latents"] + 0.1}

    with refused("changes all of the latents", "callbacks"):
        calibrate(with_prompts(flux()), callback_on_step_end=noise)


@pytest.mark.parametrize("build", [cogvideox, mochi])
def test_rounding_between_the_steps_is_no_change(build):
    """In bfloat16 CogVideoX rounds what its solver makes; Mochi does, and hands it on in float32 again."""
    tiny = in_dtype(more_with_prompts(build()), torch.bfloat16)
    plan = calibrate(tiny)[2]
    assert plan.nfe == 4 and error(tiny, plan) == pytest.approx(plan.predicted_error, rel=0.1)


def test_too_few_steps_left_are_refused():
    with refused("2 of 8 steps", "larger strength"):
        calibrate(with_prompts(flux_img2img()), strength=0.25)
    with refused("speedups 4: at most 2 of 4 steps"):
        calibrate(with_prompts(flux_img2img()), speedups=[4], strength=0.5)


@pytest.mark.parametrize(
    ("build", "late"), [(flux, flux_img2img), pytest.param(wan_v2v, wan_v2v, marks=pytest.mark.slow)]
)
def test_a_plan_serves_runs_that_begin_later(build, late):
    """Its weights for a short history are nearer to the uncached run than plain steps."""
    settings = {"strength": 1.0} if build is late else {}
    plan = calibrate(with_prompts(build()), **settings)[2]
    assert np.shape(plan.start_weights) == (STEPS, plan.history_length, plan.history_length)
    tiny = with_prompts(late())
    fitted = error(tiny, plan)
    count = 1 + sum(step > 2 for step in plan.computed)  # it begins at step 2 of 8
    fewer = next(steps for steps in range(count, STEPS + 1) if int(steps * 0.75) == count)
    plain = geometric_mean((finals(tiny, steps=fewer) - finals(tiny)).square().flatten(1).mean(1).numpy())
    assert fitted < plain


# --- what pipelines keep from step to step -------------------------------------------------------------------------


def state_error(tiny, **options):
    """How far the found error is from the predicted one, relative to it, at all steps computed and at half of them."""
    plans = calibrate(tiny, PROMPTS[:4], [1, 2], **options)
    return [(plan.predicted_error, error_of(tiny, plan)) for plan in plans.values()]


def error_of(tiny, plan):
    return error(tiny, plan, PROMPTS[:3])  # of four the last one is held out


def test_diffusers_caches_keep_the_prompts_apart():
    tiny = with_prompts(wan())
    config = {**tiny.pipe.transformer.config, "num_layers": 3}
    torch.manual_seed(0)
    tiny.pipe.transformer = type(tiny.pipe.transformer)(**config).eval()
    tiny.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    (_, exact), (predicted, found) = state_error(tiny)
    assert exact < 1e-300 and found == pytest.approx(predicted, rel=1e-2)


def test_a_cache_that_knows_no_contexts_is_refused_but_for_a_single_batch():
    tiny = with_prompts(wan())
    options = {"spatial_attention_block_skip_range": 2, "current_timestep_callback": lambda: 500}
    tiny.pipe.transformer.enable_cache(PyramidAttentionBroadcastConfig(**options))
    with CallCounter(tiny.pipe.transformer) as calls, refused("PyramidAttentionBroadcast", "batch_size=5"):
        calibrate(tiny)
    assert calls.count == 0
    calibrate(tiny, batch_size=5)
    tiny.pipe.transformer.disable_cache()
    calibrate(tiny)


@pytest.mark.parametrize("build", fast([hunyuan15, modular], "hunyuan15"))
def test_a_guider_with_momentum_keeps_the_prompts_apart(build):
    tiny = more_with_prompts(build(guider=AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.75)))
    (_, exact), (predicted, found) = state_error(tiny)
    assert exact < 1e-300 and found == pytest.approx(predicted, rel=1e-2)


# --- calls of other shapes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build", fast([modular, ltx2, ltx_condition, ltx_condition_image, zimage, mochi, cosmos2], "modular")
)
def test_calls_of_other_shapes_are_calibrated(build):
    tiny = more_with_prompts(build())
    plan = calibrate(tiny, PROMPTS[:4])[2]
    assert plan.nfe == STEPS // 2
    assert error_of(tiny, plan) == pytest.approx(plan.predicted_error, rel=2e-2)


def test_a_call_that_hides_its_arguments():
    tiny = with_prompts(flux())

    class Wrapped(type(tiny.pipe)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    wanted = calibrate(tiny)[2]
    Wrapped.__module__ = type(tiny.pipe).__module__
    tiny.pipe.__class__ = Wrapped
    assert calibrate(tiny)[2].weights == wanted.weights
    assert calibrate(tiny, num_inference_steps=6)[2].steps == 6
    with refused("guidance", "Wrapped", "leave it out"):
        calibrate(tiny, guidance=3.5)


@pytest.mark.parametrize("build", [skyreels, chronoedit])
def test_what_no_plan_can_follow_is_refused_before_a_model_call(build):
    tiny = more_with_prompts(build())
    with CallCounter(tiny.pipe.transformer) as calls, refused(type(tiny.pipe).__name__):
        calibrate(tiny)
    assert calls.count == 0


@pytest.mark.parametrize("changes", [{"solver_type": "bh1"}, {"lower_order_final": False}])
def test_an_uncached_run_that_is_not_finite_is_named(changes):
    tiny = with_prompts(wan())
    tiny.pipe.scheduler = type(tiny.pipe.scheduler).from_config(tiny.pipe.scheduler.config, **changes)
    with refused("the uncached run comes to a non-finite value at step 8", repr(PROMPTS[0]), "scheduler"):
        calibrate(tiny)


def test_an_error_before_the_call_ends_the_calibration():
    with pytest.raises((ValueError, RuntimeError, OverflowError)):
        calibrate(with_prompts(flux()), seed=2**64)


def test_a_lack_of_memory_stays_what_it_is():
    tiny = with_prompts(flux())
    tiny.pipe.transformer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        calibrate(tiny)


@pytest.mark.parametrize("prompts", [["", ""], [[]], [0, 1]])
def test_what_takes_no_texts_takes_any_values(prompts):
    """Images and class labels are no texts that say something."""

    class Pipeline:
        def __call__(self, image, num_inference_steps=8):
            pass

    assert from_pipeline.calibration_prompts(Pipeline(), prompts) == prompts


def test_a_scheduler_that_no_plan_can_follow_is_refused():
    from diffusers import IPNDMScheduler

    tiny = with_prompts(flux())
    tiny.pipe.scheduler = IPNDMScheduler()
    with refused("IPNDMScheduler", "FlowMatchEulerDiscreteScheduler"):
        calibrate(tiny)
