"""Open-Sora's loop on a tiny random pipeline: exact without a plan, really skipping calls with one."""

from dataclasses import replace

import pytest
import torch

from conftest import ROOT
from ertacache import BudgetPlan, Conditions, ThresholdPlan, UserError
from ertacache.demos.model_folder import load_program
from helpers import CallCounter
from opensora import random_pipeline

PROMPTS, SEEDS, STEPS = ["a red circle", "a red circle moving left"], [3, 4], 6
SIZES = {"height": 48, "width": 64, "frames": 17}


@pytest.fixture(scope="module")
def program():
    return load_program(ROOT / "ERTACache4OpenSora1.2")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return random_pipeline(tmp_path_factory.mktemp("tokenizer"))


def prepare(program, pipe, prompts=PROMPTS, **settings):
    return program.prepare(pipe, prompts, SEEDS[: len(prompts)], **{"steps": STEPS, **SIZES, **settings})


def conditions(program, pipe):
    settings = program.settings_of(pipe, steps=STEPS, **SIZES)
    return Conditions.of(pipe, settings.pop("steps"), settings)


def stock(pipe, prompts=PROMPTS, guidance=7.0, output_type="latent", frames=17):
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS[: len(prompts)]]
    settings = {"height": 48, "width": 64, "num_frames": frames, "num_inference_steps": STEPS}
    return pipe(prompts, guidance_scale=guidance, generator=generators, output_type=output_type, **settings).frames


@pytest.mark.parametrize("guidance", [7.0, 1.0, 0.0])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
def test_without_a_plan_it_is_the_stock_pipeline_bit_for_bit(program, pipe, prompts, guidance):
    inputs = prepare(program, pipe, prompts, guidance=guidance)
    assert torch.equal(program.denoise(pipe, inputs), stock(pipe, prompts, guidance))


@pytest.mark.parametrize("frames", [1, 20])
def test_pictures_and_other_lengths_too(program, pipe, frames):
    inputs = prepare(program, pipe, frames=frames)
    latents = program.denoise(pipe, inputs)
    assert torch.equal(latents, stock(pipe, frames=frames))
    assert program.decode(pipe, latents, inputs).shape == (2, frames, 48, 64, 3)


@pytest.mark.parametrize("site", ["output", "blocks"])
def test_cached_steps_make_no_model_call(program, pipe, site):
    inputs, model = prepare(program, pipe), pipe.transformer
    grid = tuple(inputs.sigmas.tolist())
    plan = ThresholdPlan(conditions(program, pipe), 0.1, (1, 2, 4), site, grid)
    with CallCounter(model) as whole, CallCounter(model.transformer_blocks[0]) as blocks:
        cached = program.denoise(pipe, inputs, plan)
    assert whole.count == blocks.count == plan.nfe == 3 and cached.isfinite().all()
    empty = replace(plan, cached=())
    assert torch.equal(program.denoise(pipe, inputs, empty), program.denoise(pipe, inputs))


def test_the_residual_of_the_blocks_gives_back_the_models_own_output(program, pipe):
    inputs = prepare(program, pipe)
    with program.open_site(pipe, inputs, "blocks") as site:
        x, t = inputs.latents, inputs.times[2]
        v = program.velocity(pipe, inputs, x, t)
        assert torch.allclose(site.reuse(x, t, site.residual(x, v)), v, atol=1e-4)


def test_fewer_euler_steps_as_a_budget_plan(program, pipe):
    inputs = prepare(program, pipe)
    pairs = [program.first_order(pipe, inputs, i, k) for i, k in ((0, 2), (2, 3), (3, 6))]
    assert all(a == 1.0 and w > 0 for a, w in pairs)  # this model's velocity points to the data
    weights, grid = tuple((w,) for _, w in pairs), tuple(inputs.sigmas.tolist())
    plan = BudgetPlan(conditions(program, pipe), (0, 2, 3), weights, grid)
    with CallCounter(pipe.transformer) as whole:
        found = program.denoise(pipe, inputs, plan)
    coarse = inputs.on(inputs.sigmas[[0, 2, 3, 6]])
    assert whole.count == 3 and torch.allclose(found, program.denoise(pipe, coarse), atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"frames": 16}, "--frames 16: give 1 for a picture, or at least 17"),
        ({"height": 7}, "--height 7: give a number of at least 8"),
        ({"steps": 2}, "--steps 2"),
        ({"guidance": float("nan")}, "--guidance nan"),
    ],
)
def test_bad_settings_are_named(program, pipe, settings, words):
    with pytest.raises(UserError, match=words):
        program.settings_of(pipe, **settings)


def test_sizes_default_to_the_pipelines_own(program, pipe):
    found = program.settings_of(pipe)
    assert (found["height"], found["width"], found["frames"]) == (480, 854, 51)
