"""ERTACache4FLUX on the trained demo: exact where it must be, and really skipping calls."""

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import FluxPipeline

from ertacache.plan import Conditions, ThresholdPlan

PROMPTS = ["a big red star at the left on a plain white background", "a small blue ring in the centre"]
SEEDS = [3, 4]
STEPS = 8


@pytest.fixture(scope="module")
def inputs(flux, demo):
    return flux.prepare(demo, PROMPTS, SEEDS, steps=STEPS)


def make_plan(flux, pipe, inputs, cached, **changes):
    settings = flux.settings_of(pipe, STEPS)
    conditions = Conditions.of(pipe, settings.pop("steps"), settings)
    native = tuple(inputs.sigmas.tolist())
    return ThresholdPlan(conditions, 0.1, cached, changes.pop("site", "output"), native, **changes)


class CallCounter:
    """Counts the transformer's calls through a hook."""

    def __init__(self, module):
        self.count = 0
        self.handle = module.register_forward_hook(self.add)

    def add(self, *_):
        self.count += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


def hooks_of(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [8, 30])
def test_without_a_plan_it_is_the_stock_pipeline_bit_for_bit(flux, steps, dtype):
    pipe = flux.load("demo", dtype=dtype)
    inputs = flux.prepare(pipe, PROMPTS, SEEDS, steps=steps)
    ours = flux.denoise(pipe, inputs)
    stock = pipe(
        PROMPTS,
        height=64,
        width=64,
        num_inference_steps=steps,
        guidance_scale=3.5,
        max_sequence_length=16,
        generator=[torch.Generator().manual_seed(s) for s in SEEDS],
        output_type="latent",
    ).images
    assert torch.equal(ours, stock)


def test_decoding_is_the_stock_pipelines(flux, demo, inputs):
    latents = flux.denoise(demo, inputs)
    generators = [torch.Generator().manual_seed(s) for s in SEEDS]
    options = {"height": 64, "width": 64, "num_inference_steps": STEPS, "max_sequence_length": 16}
    stock = demo(PROMPTS, **options, generator=generators, output_type="np").images
    assert np.array_equal(flux.decode(demo, latents, inputs), stock)


@pytest.mark.parametrize("site", ["output", "blocks"])
def test_an_empty_plan_is_no_plan_exactly(flux, demo, inputs, site):
    empty = make_plan(flux, demo, inputs, (), site=site)
    assert torch.equal(flux.denoise(demo, inputs, empty), flux.denoise(demo, inputs))


@pytest.mark.parametrize("site", ["output", "blocks"])
def test_cached_steps_make_no_model_call(flux, demo, inputs, site):
    plan = make_plan(flux, demo, inputs, (1, 2, 5), site=site)
    with CallCounter(demo.transformer) as whole, CallCounter(demo.transformer.transformer_blocks[0]) as blocks:
        flux.denoise(demo, inputs, plan)
    assert whole.count == blocks.count == plan.nfe == STEPS - 3


def test_output_site_is_eq_5_and_6(flux, demo, inputs):
    seen = []
    flux.denoise(demo, inputs, make_plan(flux, demo, inputs, (2, 3)), lambda i, x, v: seen.append((x, v)))
    (x1, v1), (x2, v2), (x3, v3) = seen[1:4]
    assert torch.equal(v2, x2 + (v1 - x1)) and torch.equal(v3, x3 + (v1 - x1))


def test_blocks_site_reuses_nothing_but_the_residual_of_the_blocks(flux, demo, inputs):
    """With the residual of this very step, the model without its blocks gives the model's own output."""
    with flux.open_site(demo, inputs, "blocks") as site:
        x, s = inputs.latents, inputs.sigmas[2]
        v = flux.velocity(demo, inputs, x, s)
        assert torch.allclose(site.reuse(x, s, site.residual(x, v)), v, atol=1e-5)


def test_rectification_and_grid_of_the_plan_are_used(flux, demo, inputs):
    plain = make_plan(flux, demo, inputs, (2, 3))
    k, b = [0.0] * STEPS, [-2.0] * STEPS
    k[2], b[2] = 0.4, -1.96
    rectified = replace(plain, k=tuple(k), b=tuple(b), rectified=True)
    seen = {}
    flux.denoise(demo, inputs, rectified, lambda i, x, v: seen.update({i: (x, v)}))
    raw = seen[2][0] + (seen[1][1] - seen[1][0])
    assert torch.allclose(seen[2][1], raw - (0.1 * raw + 0.01), atol=1e-6)
    phi = tuple(0.5 if i == 2 else 1.0 for i in range(STEPS))
    adjusted = replace(plain, phi=phi, phi_definition="velocity")
    assert not torch.equal(flux.denoise(demo, inputs, adjusted), flux.denoise(demo, inputs, plain))


@pytest.mark.parametrize("site", ["output", "blocks"])
def test_a_batch_gives_what_single_prompts_give(flux, demo, inputs, site):
    plan = make_plan(flux, demo, inputs, (1, 2, 4), site=site)
    together = flux.denoise(demo, inputs, plan)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = flux.denoise(demo, flux.prepare(demo, [prompt], [seed], steps=STEPS), plan)
        assert torch.allclose(alone[0], together[row], atol=2e-4)


@pytest.mark.parametrize("site", ["output", "blocks"])
def test_no_state_is_left_after_a_run_or_an_interrupted_one(flux, demo, inputs, site):
    plan = make_plan(flux, demo, inputs, (1, 2, 4), site=site)
    before = hooks_of(demo.transformer)
    first = flux.denoise(demo, inputs, plan)

    def interrupt(i, x, v):
        if i == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flux.denoise(demo, inputs, plan, interrupt)
    assert hooks_of(demo.transformer) == before
    assert torch.equal(flux.denoise(demo, inputs, plan), first)
    assert torch.equal(flux.denoise(demo, inputs), flux.denoise(demo, inputs))


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


def test_the_shipped_plans_belong_to_the_shipped_demo(flux, demo):
    paths = sorted((flux.FOLDER / "cache").glob("demo-*.json"))
    assert len(paths) >= 6
    settings = flux.settings_of(demo)
    run = Conditions.of(demo, settings.pop("steps"), settings | {"dtype": "float32"})
    for path in paths:
        plan = ThresholdPlan.load(path)
        plan.check(run, remedy="")
        from ertacache.calibrate import fingerprint

        assert plan.provenance["weights"] == fingerprint(demo.transformer), path.name


@pytest.mark.parametrize("site", ["output", "blocks"])
def test_the_shipped_plan_beats_fewer_steps_and_the_uniform_schedule(flux, demo, site):
    from ertacache.algorithm import uniform_cached

    plans = [ThresholdPlan.load(p) for p in (flux.FOLDER / "cache").glob("demo-*.json")]
    plan = min((p for p in plans if p.site == site), key=lambda p: abs(p.nfe - 15))
    from ertacache.scenes import sample_scenes

    prompts = [s.caption() for s in sample_scenes(16, seed=5, held_out=True)]
    inputs = flux.prepare(demo, prompts, range(16), steps=30)
    exact = flux.denoise(demo, inputs)
    bare = {"k": (), "b": (), "rectified": False, "phi": (), "phi_definition": "none"}
    uniform = replace(plan, cached=uniform_cached(30, plan.nfe), **bare)

    def error(latents):
        return (latents - exact).square().mean().item()

    mine = error(flux.denoise(demo, inputs, plan))
    fewer = error(flux.denoise(demo, flux.prepare(demo, prompts, range(16), steps=plan.nfe)))
    assert mine < fewer and mine < error(flux.denoise(demo, inputs, uniform))


def test_the_demo_draws_what_the_prompt_says(flux, demo):
    from ertacache.outputs import to_uint8
    from ertacache.scenes import prompt_accuracy, sample_scenes

    prompts = [s.caption() for s in sample_scenes(20, seed=6, held_out=True)]
    inputs = flux.prepare(demo, prompts, range(20), steps=30)
    pictures = flux.decode(demo, flux.denoise(demo, inputs), inputs)
    assert prompt_accuracy(prompts, [to_uint8(p) for p in pictures]) >= 0.85


def test_importing_the_program_does_no_work():
    code = f"import sys; sys.path[:0] = [{str(ROOT / 'common')!r}, {str(ROOT / 'ERTACache4FLUX')!r}]; import generate; "
    code += "assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_first_function_is_the_loop_and_fits_on_a_screen():
    lines = (ROOT / "ERTACache4FLUX" / "generate.py").read_text().splitlines()
    functions = [n for n, line in enumerate(lines) if line.startswith("def ")]
    assert lines[functions[0]].startswith("def denoise(") and functions[1] - functions[0] <= 42
    assert len(lines) <= 300


def test_run_sh_is_posix():
    for script in (ROOT / "ERTACache4FLUX" / "run.sh", *sorted((ROOT / "scripts").glob("*.sh"))):
        subprocess.run(["sh", "-n", script], check=True)
        assert script.read_text().startswith("#!/bin/sh")
    assert shutil.which("sh")
