"""What people do to pipelines, with a UNet: other weights, other settings, compilation, offload, drift, saving."""

import warnings
from dataclasses import replace

import diffusers
import pytest
import torch

import ertacache
from census_unets import PIPELINES
from ertacache import PlanError
from helpers import CallCounter, budget_plan, no_warning, refused
from tiny_pipelines import STEPS

HALF = (0, 2, 4, 6)
pytestmark = pytest.mark.filterwarnings("ignore:.*__array__", "ignore:.*safety checker")


def sdxl():
    return PIPELINES["StableDiffusionXLPipeline"]()


def drifting(tiny, computed, **changes):
    """A plan of first-order jumps, with a drift that no run keeps within."""
    plan = budget_plan(tiny, computed, history_length=2)
    drift = {"predictor": ((0.0,),) + ((1.0,),) * (plan.nfe - 1), "prediction_errors": ((1e-9,) * plan.nfe,)}
    return replace(plan, **drift, repair=((0.0, 0.0),) * plan.nfe, repair_scale=(1.0,) * plan.nfe, **changes)


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DDIMScheduler", "UniPCMultistepScheduler"])
def test_computing_beyond_the_limit_is_nearly_the_uncached_run(scheduler):
    tiny = sdxl()
    changes = {"clip_sample": False} if scheduler == "DDIMScheduler" else {}
    tiny.pipe.scheduler = getattr(diffusers, scheduler).from_config(tiny.pipe.scheduler.config, **changes)
    plain = tiny.run()
    calls = len(tiny.pipe.scheduler.timesteps)
    plan, errors = drifting(tiny, (0, 1, 4, 6)), {}
    for mode in ("ignore", "compute"):
        ertacache.enable(tiny.pipe, plan, on_drift=mode)
        with CallCounter(tiny.pipe.components["unet"]._denoiser) as made:
            errors[mode] = (tiny.run() - plain).abs().max().item()
        assert made.count == (calls if mode == "compute" else plan.nfe)
        ertacache.disable(tiny.pipe)
    assert errors["compute"] < 0.01 * errors["ignore"]


def test_a_compiled_unet_has_no_other_graph():
    tiny = sdxl()
    plan = budget_plan(tiny, HALF)
    plain = tiny.run()
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    ertacache.enable(tiny.pipe, replace(plan, computed=tuple(range(STEPS)), **rows(plan)))
    tiny.pipe.unet = torch.compile(tiny.pipe.unet, backend=backend, fullgraph=True)
    assert torch.allclose(tiny.run(), plain, atol=1e-5)
    count = len(graphs)
    ertacache.enable(tiny.pipe, plan)
    assert tiny.run().isfinite().all() and ertacache.summary(tiny.pipe).computed == len(HALF) and len(graphs) == count


def rows(plan):
    """As many rows as there are steps."""
    return {name: (getattr(plan, name) * 2)[:STEPS] for name in ("weights", "scale")}


def test_offload_is_the_same_bit_for_bit():
    from accelerate import cpu_offload

    results = []
    for offload in (False, True):
        tiny = sdxl()
        plan = budget_plan(tiny, HALF)
        if offload:
            cpu_offload(tiny.pipe.unet, torch.device("cpu"))
        ertacache.enable(tiny.pipe, plan)
        results.append(tiny.run())
    assert torch.equal(*results)


def test_other_weights_and_settings_are_one_warning_each(tmp_path):
    tiny = sdxl()
    arguments = {name: value for name, value in tiny.arguments.items() if name != "prompt"}
    options = {"num_inference_steps": STEPS, "effort": "quick", "progress": False, "work": tmp_path}
    plan = ertacache.calibrate(tiny.pipe, ["a", "b", "c", "d"], [2], **options, **arguments)[2]
    assert plan.requirements.settings["latents"] == [4, 8, 8] and plan.requirements.settings["guidance_scale"] > 1
    with no_warning():
        ertacache.enable(tiny.pipe, plan, on_drift="ignore")
        tiny.run()
    with pytest.warns(UserWarning, match=r"guidance_scale .*, now 9"):
        tiny.run(guidance_scale=9.0)
    tiny.pipe.components["unet"]._denoiser.conv_out.weight.mul_(1.5)
    with pytest.warns(UserWarning, match="other weights"):
        ertacache.enable(tiny.pipe, plan)
    other = PIPELINES["StableDiffusionPipeline"]()
    with refused("the plan is for another", error=PlanError):
        ertacache.enable(other.pipe, plan)


def test_saved_as_it_was_loaded(tmp_path):
    tiny = sdxl()
    ertacache.enable(tiny.pipe, budget_plan(tiny, HALF))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny.pipe.scheduler.save_pretrained(tmp_path)
    assert type(tiny.pipe.scheduler) == diffusers.EulerDiscreteScheduler  # noqa: E721 (as pipelines compare)
    assert type(diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path)) is diffusers.EulerDiscreteScheduler
