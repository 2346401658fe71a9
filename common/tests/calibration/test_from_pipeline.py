"""Plans from a pipeline's own call: the same as from the model folder's loop, and nothing left behind."""

import _thread
import signal
import threading
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

import ertacache
from conftest import open_model_folder
from ertacache.calibration.budget import BudgetCalibration
from ertacache.calibration.paused_call import THREAD
from ertacache.calibration.session import CalibrationSession
from ertacache.numerics.schedulers import first_order
from ertacache.pipelines.scheduler import PlannedScheduler
from helpers import PROMPTS, CallCounter, calibrate, fast, refused, with_prompts
from tiny_pipelines import STEPS, flux, flux_kontext, ltx, sana, sd3, wan_i2v


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
    """Mean squared error of the final latents that the enabled plan leads to, on the prompts that it was fitted on."""

    def finals():
        return torch.cat([tiny.run(prompt=[prompt], seed=seed) for seed, prompt in enumerate(prompts)])

    ertacache.enable(tiny.pipe, plan)
    found = finals()
    ertacache.disable(tiny.pipe)
    return (found - finals()).square().mean().item()


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


@pytest.mark.parametrize("build", fast([sd3, sana, ltx, wan_i2v, flux_kontext], "sd3"))
def test_a_plan_beats_first_order_jumps_over_its_steps(build):
    """And its stored error is that of the enabled pipeline: rollout and run are the same arithmetic."""
    tiny = with_prompts(build())
    plan = calibrate(tiny)[2]
    assert plan.nfe == STEPS // 2
    found = error(tiny, plan)
    jumps = [first_order(tiny.pipe.scheduler, i, k) for i, k in pairwise([*plan.computed, STEPS])]
    plain = replace(plan, weights=tuple((w,) for _, w in jumps), scale=tuple(a for a, _ in jumps))
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
    """One to see the first latents, T per prompt for the uncached run, N per prompt and rollout."""
    tiny = with_prompts(flux())
    with CallCounter(tiny.pipe.transformer) as calls:
        plans = calibrate(tiny, speedups=[2, 8 / 3])
    rollouts = sum(p.nfe * (len(p.provenance["calibration"]["errors"]) - 1) for p in plans.values())
    assert list(plans) == [2, 8 / 3] and calls.count == 1 + len(PROMPTS) * (STEPS + rollouts)


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
    assert again == plan and type(tiny.pipe.scheduler) is PlannedScheduler and tiny.pipe.scheduler.plan is plan


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
    "error", [RuntimeError("out of memory"), pytest.param(None, marks=pytest.mark.slow)], ids=["error", "Ctrl-C"]
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
    with pytest.raises(KeyboardInterrupt if error is None else RuntimeError) as raised:
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
        if prompt == [PROMPTS[2]]:
            raise error
        return encode(prompt, **options)

    tiny.pipe.encode_prompt = encode_prompt
    with pytest.raises(RuntimeError) as raised:
        calibrate(tiny)
    assert raised.value is error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": []}, ("no calibration prompts",)),
        ({"prompts": "a red star"}, ("prompts = 'a red star'", "list")),
        ({"prompts": ["a red star", None]}, ("['a red star', None]", "list")),
        ({"speedups": []}, ("speedups = []", "[2, 3]")),
        ({"speedups": 2}, ("speedups = 2", "[2, 3]")),
        ({"speedups": [0.5]}, ("speedups 0.5", "at least 1")),
        ({"num_inference_steps": None}, ("num_inference_steps = None", "at least 3")),
        ({"num_inference_steps": 2}, ("num_inference_steps = 2", "at least 3")),
        ({"batch_size": 0}, ("batch_size = 0", "at least 1")),
        ({"target": "exact"}, ("target = 'exact'", "'reference'")),
        ({"guidance": 3.5}, ("guidance", "FluxPipeline", "leave it out")),
        ({"generator": None}, ("generator", "leave it out")),
        ({"num_images_per_prompt": 2}, ("num_images_per_prompt", "leave it out")),
        ({"sigmas": [1.0, 0.5, 0.2]}, ("num_inference_steps = 8", "num_inference_steps=3")),
    ],
)
def test_bad_input_is_one_line(changes, words, empty_folder):
    with refused(*words):
        calibrate(with_prompts(flux()), **changes)
    assert not list(empty_folder.iterdir())


def test_a_scheduler_that_no_plan_can_follow_is_refused():
    from diffusers import EulerDiscreteScheduler

    tiny = with_prompts(flux())
    tiny.pipe.scheduler = EulerDiscreteScheduler()
    with refused("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"):
        calibrate(tiny)
