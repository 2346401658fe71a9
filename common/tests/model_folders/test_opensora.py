"""Open-Sora's loop on a tiny random pipeline: exact without a plan, really skipping calls with one."""

from dataclasses import replace

import pytest
import torch

from conftest import ROOT
from ertacache import BudgetPlan, Requirements, ThresholdPlan
from ertacache.demos.model_folder import load_model_folder
from helpers import CallCounter, refused
from opensora import random_pipeline

PROMPTS, SEEDS, STEPS = ["a red circle", "a red circle moving left"], [3, 4], 6
SIZES = {"height": 48, "width": 64, "frames": 17}


@pytest.fixture(scope="module")
def sampler():
    return load_model_folder(ROOT / "ERTACache4OpenSora1.2")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return random_pipeline(tmp_path_factory.mktemp("tokenizer"))


def prepare(sampler, pipe, prompts=PROMPTS, **settings):
    return sampler.prepare(pipe, prompts, SEEDS[: len(prompts)], **{"steps": STEPS, **SIZES, **settings})


def requirements(sampler, pipe):
    settings = sampler.settings_of(pipe, steps=STEPS, **SIZES)
    return Requirements.of(pipe, settings.pop("steps"), settings)


def stock(pipe, prompts=PROMPTS, guidance=7.0, output_type="latent", frames=17):
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS[: len(prompts)]]
    settings = {"height": 48, "width": 64, "num_frames": frames, "num_inference_steps": STEPS}
    return pipe(prompts, guidance_scale=guidance, generator=generators, output_type=output_type, **settings).frames


@pytest.mark.parametrize("guidance", [7.0, 1.0, 0.0])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
def test_without_a_plan_it_is_the_stock_pipeline_bit_for_bit(sampler, pipe, prompts, guidance):
    inputs = prepare(sampler, pipe, prompts, guidance=guidance)
    assert torch.equal(sampler.denoise(pipe, inputs), stock(pipe, prompts, guidance))


@pytest.mark.parametrize("frames", [1, 20])
def test_images_and_other_lengths_too(sampler, pipe, frames):
    inputs = prepare(sampler, pipe, frames=frames)
    latents = sampler.denoise(pipe, inputs)
    assert torch.equal(latents, stock(pipe, frames=frames))
    assert sampler.decode(pipe, latents, inputs).shape == (2, frames, 48, 64, 3)


@pytest.mark.parametrize("site", ["output", "blocks"])
def test_cached_steps_make_no_model_call(sampler, pipe, site):
    inputs, model = prepare(sampler, pipe), pipe.transformer
    grid = tuple(inputs.sigmas.tolist())
    plan = ThresholdPlan(requirements(sampler, pipe), 0.1, (1, 2, 4), site, grid)
    with CallCounter(model) as whole, CallCounter(model.transformer_blocks[0]) as blocks:
        cached = sampler.denoise(pipe, inputs, plan)
    assert whole.count == blocks.count == plan.nfe == 3 and cached.isfinite().all()
    empty = replace(plan, cached=())
    assert torch.equal(sampler.denoise(pipe, inputs, empty), sampler.denoise(pipe, inputs))


def test_the_residual_of_the_blocks_gives_back_the_models_own_output(sampler, pipe):
    inputs = prepare(sampler, pipe)
    with sampler.open_site(pipe, inputs, "blocks") as site:
        x, t = inputs.latents, inputs.times[2]
        v = sampler.velocity(pipe, inputs, x, t)
        assert torch.allclose(site.reuse(x, t, site.residual(x, v)), v, atol=1e-4)


def test_fewer_euler_steps_as_a_budget_plan(sampler, pipe):
    inputs = prepare(sampler, pipe)
    pairs = [sampler.first_order(pipe, inputs, i, k) for i, k in ((0, 2), (2, 3), (3, 6))]
    assert all(a == 1.0 and w > 0 for a, w in pairs)  # this model's velocity points to the data
    weights, grid = tuple((w,) for _, w in pairs), tuple(inputs.sigmas.tolist())
    plan = BudgetPlan(requirements(sampler, pipe), (0, 2, 3), weights, grid)
    with CallCounter(pipe.transformer) as whole:
        found = sampler.denoise(pipe, inputs, plan)
    coarse = inputs.on(inputs.sigmas[[0, 2, 3, 6]])
    assert whole.count == 3 and torch.allclose(found, sampler.denoise(pipe, coarse), atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"frames": 16}, ("--frames 16", "at least 17")),
        ({"height": 7}, ("--height 7", "from 8")),
        ({"steps": 2}, ("--steps 2", "from 3")),
        ({"guidance": float("nan")}, ("--guidance nan", "from 0")),
    ],
)
def test_bad_settings_are_named(sampler, pipe, settings, words):
    with refused(*words):
        sampler.settings_of(pipe, **settings)


def test_sizes_default_to_the_pipelines_own(sampler, pipe):
    found = sampler.settings_of(pipe)
    assert (found["height"], found["width"], found["frames"]) == (480, 854, 51)
