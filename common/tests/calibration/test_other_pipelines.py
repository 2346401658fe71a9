"""Calibration of pipelines that take no prompt, no lists of one, or remember the steps before."""

import pytest
import torch

import census_images
import census_unets
import ertacache
from ertacache.calibration.paused_call import has_memory, prompt_argument
from helpers import CallCounter, refused

STEPS = 6
BUILDERS = census_images.PIPELINES | census_unets.PIPELINES


def calibrate(tiny, prompts, work, **changes):
    left_out = (prompt_argument(tiny.pipe), "image")
    arguments = {name: value for name, value in tiny.arguments.items() if name not in left_out} | changes
    options = {"effort": "quick", "progress": False, "work": work, "num_inference_steps": STEPS}
    return ertacache.calibrate(tiny.pipe, prompts, [2], **options, **arguments)[2]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_classes_stand_for_prompts(tmp_path, batch_size):
    tiny = BUILDERS["DiTPipeline"]()
    plan = calibrate(tiny, [1, 2, 5, 7], tmp_path, batch_size=batch_size)
    assert plan.nfe == 3 and plan.provenance["prompts"]["count"] == 4
    ertacache.enable(tiny.pipe, plan)
    with CallCounter(tiny.pipe.components["transformer"]._denoiser) as calls:
        tiny.pipe(class_labels=[3], num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
    assert calls.count == 3


def test_images_stand_for_prompts(tmp_path):
    tiny = BUILDERS["StableVideoDiffusionPipeline"]()
    image = tiny.arguments["image"]
    plan = calibrate(tiny, [image, image.rotate(90), image.rotate(180), image.rotate(270)], tmp_path)
    again = calibrate(tiny, [image] * 4, tmp_path)
    assert plan.provenance["prompts"]["sha256"] != again.provenance["prompts"]["sha256"]
    ertacache.enable(tiny.pipe, plan)
    with CallCounter(tiny.pipe.components["unet"]._denoiser) as calls:
        assert tiny.run(STEPS).isfinite().all()
    assert calls.count == 3


def test_without_a_prompt_the_shipped_texts_say_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ERTACACHE_HOME", str(tmp_path))
    tiny = BUILDERS["DiTPipeline"]()
    with refused("DiTPipeline takes no prompt", "values of class_labels"):
        ertacache.accelerate(tiny.pipe, num_inference_steps=STEPS)
    with refused("class_labels is set by calibrate"):
        ertacache.calibrate(tiny.pipe, [1, 2, 3, 4], class_labels=[1], num_inference_steps=STEPS)


def test_a_momentum_of_the_pipelines_own_is_seen():
    """AceStep's guidance depends on the steps before: velocities that are known cannot stand for model calls."""
    assert has_memory(BUILDERS["AceStepPipeline"]().pipe)
    assert not has_memory(BUILDERS["StableDiffusionPipeline"]().pipe)
