"""What is particular to ERTACache4FLUX: loading a downloaded checkpoint, and the uniform schedule on its demo."""

from dataclasses import replace

import pytest
import torch
from diffusers import FluxPipeline

from ertacache.algorithm import uniform_cached
from ertacache.demos.emoji import sample_captions
from helpers import shipped_plan

PROMPTS = ["a red apple", "a steam train"]
SEEDS = [3, 4]


def test_a_checkpoint_directory_loads_and_runs_like_the_demo(flux, random_directory):
    pipe = flux.load(str(random_directory))
    inputs = flux.prepare(pipe, PROMPTS, SEEDS, steps=4, height=32, width=48)
    latents = flux.denoise(pipe, inputs)
    assert flux.decode(pipe, latents, inputs).shape == (2, 32, 48, 3)
    stock = FluxPipeline.from_pretrained(random_directory)
    stock.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(s) for s in SEEDS]
    options = {"height": 32, "width": 48, "num_inference_steps": 4, "max_sequence_length": 16}
    assert torch.equal(stock(PROMPTS, **options, generator=generators, output_type="latent").images, latents)


@pytest.mark.slow
@pytest.mark.parametrize("site", ["output", "blocks"])
def test_the_shipped_plan_beats_the_uniform_schedule(flux, demo, site):
    plan = shipped_plan(flux, site)
    inputs = flux.prepare(demo, sample_captions(16, seed=5, held_out=True), range(16), steps=30)
    exact = flux.denoise(demo, inputs)
    bare = {"k": (), "b": (), "rectified": False, "phi": (), "phi_definition": "none"}
    uniform = replace(plan, cached=uniform_cached(30, plan.nfe), **bare)
    errors = [(flux.denoise(demo, inputs, p) - exact).square().mean() for p in (plan, uniform)]
    assert errors[0] < errors[1]
