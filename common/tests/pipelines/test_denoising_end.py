"""A call that ends before its last step, as SDXL's with `denoising_end` < 1, and one that begins where it ended."""

import pytest
import torch

import ertacache
from census_unets import PIPELINES
from helpers import CallCounter, budget_plan

STEPS, ENDS = 10, 7  # denoising_end = 0.7
PROMPTS = ["a red star", "a blue sea", "a green cat", "an old tree"]
sdxl = PIPELINES["StableDiffusionXLPipeline"]


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Plans of a call that ends at step 7 of 10."""
    tiny = sdxl()
    arguments = {name: value for name, value in tiny.arguments.items() if name != "prompt"}
    arguments |= {"num_inference_steps": STEPS, "denoising_end": ENDS / STEPS, "progress": False}
    return ertacache.calibrate(
        tiny.pipe, PROMPTS, [1, 2], effort="quick", work=tmp_path_factory.mktemp("w"), **arguments
    )


def run(tiny, **changes):
    with CallCounter(tiny.pipe.components["unet"]) as calls:
        return tiny.run(STEPS, prompt=PROMPTS[0], **changes), calls.count


def test_a_plan_of_such_a_call(plans):
    tiny = sdxl()
    plain, calls = run(tiny, denoising_end=0.7)
    assert calls == ENDS and (plans[2].begin, plans[2].end, plans[2].nfe, plans[2].speedup) == (0, ENDS, 4, 7 / 4)
    ertacache.enable(tiny.pipe, plans)
    same, calls = run(tiny, denoising_end=0.7)
    assert torch.equal(same, plain) and calls == ENDS
    ertacache.speedup(tiny.pipe, 2)
    found, calls = run(tiny, denoising_end=0.7)
    assert calls == 4 and ertacache.summary(tiny.pipe).calls == 2
    error = (found - plain).square().mean()
    ertacache.disable(tiny.pipe)
    fewer = tiny.run(6, prompt=PROMPTS[0], denoising_end=0.7)  # four steps
    assert error < 0.1 * (fewer - plain).square().mean()


def test_beyond_its_end_every_step_is_computed(plans):
    tiny = sdxl()
    plain, _ = run(tiny)
    ertacache.enable(tiny.pipe, plans[2])
    found, calls = run(tiny)
    assert calls == 4 + STEPS - ENDS and (found - plain).abs().max() < 0.2 * plain.abs().max()


def test_a_plan_of_the_whole_call_serves_both_halves():
    """The first ends on a jump, at its share of it; the second begins there, on the other pipeline's call."""
    tiny, refiner = sdxl(), PIPELINES["StableDiffusionXLImg2ImgPipeline"]()
    refiner.pipe.scheduler = tiny.pipe.scheduler
    refiner.pipe.unet = tiny.pipe.unet

    def both(**changes):
        half = tiny.run(STEPS, prompt=PROMPTS[0], denoising_end=0.7)
        return half, refiner.run(STEPS, prompt=PROMPTS[0], image=half, denoising_start=0.7, **changes)

    plain = both()
    plan = budget_plan(tiny, (0, 2, 4, 6, 8), steps=STEPS)
    ertacache.enable(tiny.pipe, plan)
    ertacache.enable(refiner.pipe, plan)
    with CallCounter(tiny.pipe.components["unet"]._denoiser) as calls:
        found = both()
    assert calls.count == 4 + 2  # steps 0, 2, 4, 6; then 7, where it begins, and 8
    for one, other in zip(found, plain, strict=True):
        assert one.isfinite().all() and (one - other).abs().max() < 0.5 * other.abs().max()
