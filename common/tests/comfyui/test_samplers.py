"""Sampler functions: the library's own loop bit for bit, exact calls, late starts, refusals."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, LMSDiscreteScheduler

import ertacache
from closed_form_models import CALLS, PIPE, STEPS, FlowModel, SigmaModel, calibrated, folder, prompts_and_seeds
from ertacache import ThresholdPlan
from ertacache.comfyui import grid, models
from ertacache.comfyui.samplers import sample_plan, sample_uncached
from ertacache.demos import closed_form
from ertacache.numerics.jump import follow
from ertacache.plans.requirements import Requirements
from helpers import refused


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return calibrated(4, tmp_path_factory.mktemp("work"))


def test_a_plan_is_followed_as_by_the_library_bit_for_bit(plan):
    inputs = folder.prepare(PIPE, *prompts_and_seeds(3, 100), steps=STEPS)
    model, seen = FlowModel(inputs), []
    sigmas = torch.tensor(grid.sigmas_of(plan))
    result = sample_plan(model, inputs.latents, sigmas, callback=seen.append, disable=True, plan=plan)
    assert model.calls == len(seen) == CALLS == len(sigmas) - 1
    assert [step["i"] for step in seen] == list(range(CALLS))
    assert [step["sigma"].item() for step in seen] == [inputs.sigmas[i].item() for i in plan.computed]
    assert torch.equal(result, follow(model.velocity, inputs, plan))
    assert result.dtype == torch.float32


def test_the_uncached_run_is_eulers(plan):
    inputs = folder.prepare(PIPE, *prompts_and_seeds(2, 100), steps=STEPS)
    model, steps = FlowModel(inputs), []
    result = sample_uncached(
        model, inputs.latents, inputs.sigmas, disable=True, on_step=lambda i, x, v: steps.append(i)
    )
    assert steps == list(range(STEPS)) and model.calls == STEPS
    torch.testing.assert_close(result, folder.denoise(PIPE, inputs), rtol=0, atol=1e-5)


class LatePipeline(closed_form.ClosedFormPipeline):
    """Begins at a later step, from an image and noise, as image-to-image does."""

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=STEPS, generator=None, output_type="latent", begin=0, latents=None):
        asked = torch.tensor([list(closed_form.captions()).index(prompt)])
        self.scheduler.set_timesteps(num_inference_steps)
        self.scheduler.set_begin_index(begin)
        if latents is None:
            latents = torch.randn(1, 768, generator=generator) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        for t in self.scheduler.timesteps[begin:]:
            scale = getattr(self.scheduler, "scale_model_input", None)
            output = self.unet(latents if scale is None else scale(latents, t), t, asked, 3.5)[0]
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return (latents,)


SPACES = {
    "flow": (FlowModel, lambda: FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "sigma": (SigmaModel, lambda: EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading")),
}


@pytest.mark.parametrize("space", SPACES)
def test_plans_of_diffusers_give_the_pipelines_result_from_any_beginning(space, tmp_path):
    kind, scheduler = SPACES[space]
    pipe = LatePipeline(closed_form.denoiser_of_width(0.1), scheduler())
    prompts = closed_form.sample_captions(4, 0)
    options = {"num_inference_steps": STEPS, "effort": "quick", "work": tmp_path, "progress": False}
    plan = ertacache.calibrate(pipe, prompts, [STEPS / CALLS], **options)[STEPS / CALLS]
    assert models.space_of_plan(plan) == space
    ertacache.enable(pipe, plan, on_drift="ignore")
    inputs = folder.prepare(PIPE, prompts[:1], [0], steps=STEPS)
    data, noise = closed_form.all_points()[:1], torch.randn(1, 768, generator=torch.Generator().manual_seed(1))
    for begin in (0, 3, plan.computed[1], STEPS - 1):
        sigma = plan.calibrated_levels()[begin]
        latents = (1 - sigma) * data + sigma * noise if space == "flow" else data + sigma * noise
        expected = pipe(prompts[0], begin=begin, latents=latents)[0]
        model = kind(inputs)
        sigmas = torch.tensor(grid.sigmas_of(plan, 1 - begin / STEPS))
        result = sample_plan(model, latents.view(1, 3, 16, 16), sigmas, disable=True, plan=plan)
        assert model.calls == len(sigmas) - 1 == sum(step > begin for step in plan.computed) + 1
        torch.testing.assert_close(result.flatten(1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, LMSDiscreteScheduler])
def test_noise_is_scaled_as_by_diffusers(kind, spacing, plan):
    scheduler = kind(beta_schedule="scaled_linear", timestep_spacing=spacing)
    scheduler.set_timesteps(STEPS)
    begun = replace(plan, requirements=Requirements.of_scheduler(scheduler, STEPS))
    sigma = scheduler.sigmas[0]
    scale = (1 + sigma**2) ** 0.5 if models.scales_noise(begun, 0) else sigma
    assert float(scheduler.init_noise_sigma) == pytest.approx(float(scale), rel=1e-6)
    assert not models.scales_noise(begun, 1)


def test_sigmas_tell_where_a_run_begins(plan):
    for begin in range(STEPS):
        assert grid.begin_of(plan, grid.sigmas_of(plan, 1 - begin / STEPS)) == begin


def test_what_does_not_fit_is_refused(plan):
    sigmas = grid.sigmas_of(plan)
    with refused("12 steps", "computes 4 of 12", "Sigmas (ERTACache)"):
        grid.begin_of(plan, plan.native_sigmas)
    with refused("sigma 0.5", "step 1", "Sigmas (ERTACache)"):
        grid.begin_of(plan, [sigmas[0], 0.5, *sigmas[2:]])
    for denoise in (0.0, 1.5, float("nan")):
        with refused("denoise", "above 0 and at most 1"):
            grid.sigmas_of(plan, denoise)
    late = replace(plan, computed=(3, 5, 7, 9), begin=3, start_weights=(), start_scale=())
    with refused("denoise = 0.9", "begins at step 3 of 12", "give at most 0.75"):
        grid.sigmas_of(late, 0.9)
    assert len(grid.sigmas_of(late)) == 5
    with refused("the steps from 0 to 11 of 12", "a whole run"):
        grid.check_kind(replace(plan, computed=(0, 4, 7, 10), end=11))
    threshold = object.__new__(ThresholdPlan)
    with refused("a threshold plan", "give a budget plan"):
        grid.check_kind(threshold)


# --- models of ComfyUI, read off their attributes ------------------------------------------------------------------


class CONST:
    pass


class EPS:
    pass


class IMG_TO_IMG(EPS):
    pass


def comfy_model(name, sampling, config, largest=1.0, base=object):
    kind = type("ModelSampling", (sampling,), {"sigma_max": torch.tensor(largest)})
    parts = {"model_sampling": kind(), "model_config": SimpleNamespace(unet_config=config)}
    return type(name, (base,), parts)()


def required(plan, scheduler, model):
    return replace(plan, requirements=replace(plan.requirements, scheduler=scheduler, model=model))


def test_models_are_compared_with_what_the_plan_requires(plan):
    euler = {"class": "FlowMatchEulerDiscreteScheduler"}
    flux = {"class": "FluxTransformer2DModel", "num_layers": 19, "guidance_embeds": True}
    of_flux = required(plan, euler, flux)
    config = {"depth": 19, "guidance_embed": True, "dtype": torch.float32}
    models.check_model(of_flux, comfy_model("Flux", CONST, config))
    derived = {"base": type("Flux", (), {})}
    models.check_model(of_flux, comfy_model("FluxFill", CONST, config, **derived))
    with refused("a FluxTransformer2DModel, the model is a Chroma"):
        models.check_model(of_flux, comfy_model("Chroma", CONST, config, **derived))
    with refused("flow matching", "sigma space", "Learn plan"):
        models.check_model(of_flux, comfy_model("SDXL", EPS, {}))
    with refused("a FluxTransformer2DModel, the model is a WAN21"):
        models.check_model(of_flux, comfy_model("WAN21", CONST, {}))
    with refused("guidance_embeds True ≠ False"):
        models.check_model(of_flux, comfy_model("Flux", CONST, config | {"guidance_embed": False}))
    with refused("IMG_TO_IMG", "use another sampler"):
        models.check_model(of_flux, comfy_model("Lotus", IMG_TO_IMG, {}))
    with refused("sigma 1,", "largest is 0.5"):
        models.check_model(of_flux, comfy_model("Flux", CONST, config, largest=0.5))
    with refused("DDIMScheduler with epsilon prediction", "Learn plan"):
        models.space_of_plan(required(plan, {"class": "DDIMScheduler", "prediction_type": "epsilon"}, flux))
    own = required(plan, {"class": "ComfyUI", "space": "flow"}, {"class": "Flux", "depth": 19})
    models.check_model(own, comfy_model("Flux", CONST, config))
    with refused("depth 19 ≠ 2"):
        models.check_model(own, comfy_model("Flux", CONST, {"depth": 2}))
