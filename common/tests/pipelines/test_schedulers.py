"""Every scheduler that plans know, in a pipeline around the closed-form denoiser, and those that they refuse."""

import diffusers
import numpy as np
import pytest
import torch

import ertacache
from ertacache.demos import closed_form
from ertacache.numerics.schedulers import SOLVERS, TWINS, WITHOUT_TWIN, check_scheduler, solver_of, steps_of
from ertacache.pipelines.enabled import Enabled
from ertacache.pipelines.run import PlannedRun
from ertacache.plans.schema import REPEATING
from helpers import refused

N = 10  # num_inference_steps
TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
MULTISTEP = {
    "DPMSolverMultistepScheduler": [
        {},
        {"solver_order": 3, "use_exponential_sigmas": True},
        {"use_karras_sigmas": True, "timestep_spacing": "leading", "steps_offset": 1},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ],
    "DPMSolverSinglestepScheduler": [{}, {"use_karras_sigmas": True}],
    "UniPCMultistepScheduler": [{}, {"use_karras_sigmas": True}],
    "DEISMultistepScheduler": [{}],
}
OTHERS = {
    "DDIMScheduler": [
        {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
        {"clip_sample": False, "timestep_spacing": "trailing"},
    ],
    "DDIMParallelScheduler": [{"clip_sample": False}],
    "PNDMScheduler": [{"skip_prk_steps": True, "steps_offset": 1}],
    "EulerDiscreteScheduler": [{}, {"use_karras_sigmas": True, "timestep_spacing": "leading", "steps_offset": 1}],
    "HeunDiscreteScheduler": [{}, {"use_karras_sigmas": True}],
    "LMSDiscreteScheduler": [{}],
}
CASES = [
    *[("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}), ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0})],
    ("HeliosScheduler", {"stages": 1, "stage_range": [0, 1]}),
    *[(name, FLOW) for name in MULTISTEP],
    *[
        (name, {**TABLE, **changes, "prediction_type": prediction})
        for name, variants in {**MULTISTEP, **OTHERS}.items()
        for changes in variants
        for prediction in ("epsilon", "v_prediction", "sample")
        if (name, prediction) != ("PNDMScheduler", "sample")
    ],
    ("CogVideoXDDIMScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
]
IDS = [
    " ".join([name, *(f"{value}" for value in changes.values() if type(value) in (str, bool))])
    for name, changes in CASES
]


def scheduler_of(case):
    name, changes = case
    return getattr(diffusers, name)(**changes)


def first_steps(scheduler) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, a model output, and what the scheduler makes of them in its first step."""
    scheduler.set_timesteps(N)
    generator = torch.Generator().manual_seed(0)
    x, output = (torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    scheduler.scale_model_input(x, scheduler.timesteps[0]) if hasattr(scheduler, "scale_model_input") else None
    return x, output, scheduler.step(output, scheduler.timesteps[0], x, return_dict=False)[0]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_first_step_of_every_solver_is_the_first_order_jump(case):
    x, output, expected = first_steps(scheduler_of(case))
    scheduler = scheduler_of(case)
    scheduler.set_timesteps(N)
    solver = solver_of(scheduler)
    assert len(scheduler.timesteps) == steps_of(scheduler, N) == len(solver.sigmas) - 1
    scale, weight = solver.first_order(*solver.sigmas[:2].tolist())
    assert torch.allclose(scale * x + weight * output, expected, rtol=1e-4, atol=1e-4 * float(x.abs().max()))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_preconditioned_models(name, prediction):
    scheduler = getattr(diffusers, name)(prediction_type=prediction)
    x, output, expected = first_steps(scheduler)
    scheduler.set_timesteps(N)
    solver = solver_of(scheduler)
    scale, weight = solver.first_order(*solver.sigmas[:2].tolist())
    assert torch.allclose(scale * x + weight * output, expected, rtol=1e-4)


@pytest.fixture(scope="module")
def denoiser():
    return closed_form.denoiser_of_width(0.3)


PROMPTS = closed_form.sample_captions(4, seed=0)


def latents(pipe, prompts, seed=0):
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    return pipe(prompts, num_inference_steps=N, guidance_scale=1.0, generator=generators)[0]


@pytest.mark.filterwarnings("ignore:.*prompts that the fit did not use", "ignore:.*level of rounding")
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_all_steps_are_the_uncached_run_and_fewer_have_the_error_that_was_predicted(case, denoiser, tmp_path):
    pipe = closed_form.ClosedFormPipeline(denoiser, scheduler_of(case))
    steps, calls = steps_of(pipe.scheduler, N), []
    pipe.unet.register_forward_hook(lambda *_: calls.append(0))
    plain = latents(pipe, PROMPTS)
    assert len(calls) == steps and plain.isfinite().all()
    arguments = {"num_inference_steps": N, "guidance_scale": 1.0, "batch_size": 4, "work": tmp_path}
    plans = ertacache.calibrate(pipe, PROMPTS, [1, 2], effort="quick", progress=False, **arguments)
    ertacache.enable(pipe, plans)
    assert torch.equal(latents(pipe, PROMPTS), plain)
    ertacache.speedup(pipe, 2)
    calls.clear()
    found = latents(pipe, PROMPTS)
    assert len(calls) == plans[2].nfe == round(steps / 2)
    errors = (found - plain)[:3].double().square().mean(1)
    assert errors.log().mean().exp().item() == pytest.approx(plans[2].predicted_error, rel=0.02)
    ertacache.disable(pipe)
    fewer = closed_form.ClosedFormPipeline(denoiser, scheduler_of(case))
    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    fewer = fewer(PROMPTS, num_inference_steps=N // 2, guidance_scale=1.0, generator=generators)[0]
    assert (found - plain).square().mean() < (fewer - plain).square().mean()


@pytest.mark.parametrize("name", sorted(TWINS))
def test_the_line_of_code_in_a_refusal_loads_a_scheduler_that_plans_follow(name):
    pipe = type("Pipe", (), {})()
    try:
        changes = {"prediction_type": "v_prediction"} if name.startswith("CogVideoX") else {}
        pipe.scheduler = getattr(diffusers, name)(**changes)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])
    with refused(name, "no plan can follow", TWINS[name][1]) as error:
        check_scheduler(pipe.scheduler)
    exec(str(error.value).rpartition(": ")[2], {"pipe": pipe, "diffusers": diffusers})
    check_scheduler(pipe.scheduler)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("DDIMScheduler", {"clip_sample": True}),
        ("DDIMScheduler", {"clip_sample": False, "rescale_betas_zero_snr": True}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistepScheduler", {"thresholding": True}),
        ("PNDMScheduler", {"skip_prk_steps": False}),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ],
)
def test_a_setting_that_no_plan_can_follow_is_refused_with_the_line_that_mends_it(name, changes):
    pipe = type("Pipe", (), {"scheduler": getattr(diffusers, name)(**changes)})()
    with refused(f"diffusers.{name}.from_config(pipe.scheduler.config") as error:
        check_scheduler(pipe.scheduler)
    exec(str(error.value).rpartition(": ")[2], {"pipe": pipe, "diffusers": diffusers})
    check_scheduler(pipe.scheduler)


@pytest.mark.parametrize("name", WITHOUT_TWIN)
def test_schedulers_that_models_are_made_for_are_refused_by_name(name):
    scheduler = type(name, (), {"config": {}})()
    with refused(name, WITHOUT_TWIN[name], "without one"):
        check_scheduler(scheduler)


def test_every_scheduler_of_diffusers_is_known_refused_by_name_or_unknown():
    """A new release may bring one; those that are not known here make other things than latents, or invert them."""
    names = {name for name in dir(diffusers) if name.endswith("Scheduler")}
    unknown = names - SOLVERS.keys() - TWINS.keys() - set(WITHOUT_TWIN)
    assert unknown <= {
        *("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler", "IPNDMScheduler"),
        *("BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler"),
        *("MiniMaxH3Scheduler", "RFD4ProteinaScheduler"),
    }


def test_two_calls_at_a_level_are_counted_as_steps(denoiser):
    """Heun's plan for 10 steps is one for 19 calls, and says so in terms of num_inference_steps."""
    scheduler = diffusers.HeunDiscreteScheduler(**TABLE)
    pipe = closed_form.ClosedFormPipeline(denoiser, scheduler)
    plan = ertacache.calibrate(pipe, PROMPTS, [2], num_inference_steps=N, guidance_scale=1.0, progress=False)[2]
    assert (plan.steps, plan.nfe) == (2 * N - 1, N) and np.diff(plan.native_sigmas).max() == 0
    ertacache.enable(pipe, plan)
    with refused("num_inference_steps=10", "num_inference_steps=12)"):
        pipe(PROMPTS[0], num_inference_steps=12, generator=torch.Generator().manual_seed(0))


# --- equal noise levels ----------------------------------------------------------------------------------------------


def run_on(scheduler, **options):
    """A run of the scheduler on these steps."""
    scheduler.set_timesteps(**options)
    return PlannedRun(scheduler, Enabled(None))


PAIR = "the noise levels of this run must fall from noise to data (step 1 leads from 0.7 to 0.7), and are 0.9, 0.7, 0.7"


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler"])
def test_two_equal_noise_levels_are_refused_where_the_scheduler_does_not_repeat_them(name):
    with refused(PAIR, "give the call another size, or other sigmas"):
        run_on(getattr(diffusers, name)(), sigmas=[0.9, 0.7, 0.7, 0.2])
    run_on(getattr(diffusers, name)(), sigmas=[0.9, 0.7, 0.2, 0.0])  # and 0 at the end, as some pipelines have it


@pytest.mark.parametrize("name", REPEATING)
def test_schedulers_that_repeat_their_noise_levels_may_do_so(name):
    scheduler = getattr(diffusers, name)(**({"skip_prk_steps": True} if name == "PNDMScheduler" else {}))
    lengths = np.diff(run_on(scheduler, num_inference_steps=N).native[:-1])
    assert (lengths == 0).any() and (lengths <= 0).all()


def test_they_are_those_that_make_more_calls_than_steps():
    assert set(REPEATING) == {name for name, known in SOLVERS.items() if known.calls != (1, 0)}
