"""Every model folder on its trained demo: exact where it must be, and really skipping calls."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import ertacache
from conftest import FOLDERS, ROOT
from ertacache.numerics.ode import candidate_grid, integrate, rate_of
from ertacache.plans.budget import BudgetPlan
from ertacache.plans.requirements import Requirements
from ertacache.plans.threshold import ThresholdPlan
from ertacache.utils.media import to_uint8
from ertacache.utils.provenance import fingerprint
from helpers import CallCounter, no_warning, shipped_plan, shipped_plans

SEEDS = [3, 4]
STEPS = 8
SITES = ["output", "blocks"]
FEW = {"ERTACache4Wan2.1": 5, "ERTACache4CogVideoX-2B": 9}  # frames of a video that costs less than the default


def short(model_folder, name="frames"):
    """Return the frames of a short video as a setting of that name; nothing for other models."""
    return {name: FEW[model_folder.name]} if model_folder.name in FEW else {}


def prepare(model_folder, pipe=None, rows=slice(None)):
    prompts, options = model_folder.prompts[rows], {"steps": STEPS, **short(model_folder)}
    return model_folder.sampler.prepare(pipe or model_folder.pipe, prompts, SEEDS[rows], **options)


def requirements(model_folder, pipe=None):
    pipe = pipe or model_folder.pipe
    settings = model_folder.sampler.settings_of(pipe, steps=STEPS, **short(model_folder))
    return Requirements.of(pipe, settings.pop("steps"), settings)


def make_plan(model_folder, inputs, cached, site="output", **changes):
    grid = tuple(inputs.sigmas.tolist())
    return ThresholdPlan(requirements(model_folder), 0.1, cached, site, grid, **changes)


def blocks_of(transformer):
    return transformer.blocks if hasattr(transformer, "blocks") else transformer.transformer_blocks


def hooks_of(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize(
    ("steps", "count", "dtype"),
    [
        (8, 1, torch.float32),
        (8, 2, torch.float32),
        pytest.param(8, 2, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(30, 1, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_without_a_plan_it_is_the_stock_pipeline_bit_for_bit(model_folder, steps, count, dtype):
    pipe = model_folder.pipe if dtype == torch.float32 else model_folder.sampler.load("demo", dtype=dtype)
    prompts, seeds = model_folder.prompts[:count], SEEDS[:count]
    ours = model_folder.sampler.denoise(pipe, model_folder.sampler.prepare(pipe, prompts, seeds, steps=steps))
    assert torch.equal(ours, model_folder.stock(pipe, prompts, seeds, steps))


def test_decoding_is_the_stock_pipelines(model_folder):
    inputs = prepare(model_folder)
    ours = model_folder.sampler.decode(
        model_folder.pipe, model_folder.sampler.denoise(model_folder.pipe, inputs), inputs
    )
    options = {"output_type": "np", **short(model_folder, "num_frames")}
    assert np.array_equal(ours, model_folder.stock(model_folder.pipe, model_folder.prompts, SEEDS, STEPS, **options))


@pytest.mark.parametrize("site", SITES)
def test_an_empty_plan_is_no_plan_exactly(model_folder, site):
    inputs = prepare(model_folder)
    empty = make_plan(model_folder, inputs, (), site=site)
    assert torch.equal(
        model_folder.sampler.denoise(model_folder.pipe, inputs, empty),
        model_folder.sampler.denoise(model_folder.pipe, inputs),
    )


@pytest.mark.parametrize("site", SITES)
def test_cached_steps_make_no_model_call(model_folder, site):
    inputs = prepare(model_folder)
    plan, model = make_plan(model_folder, inputs, (1, 2, 5), site=site), model_folder.pipe.transformer
    with CallCounter(model) as whole, CallCounter(blocks_of(model)[0]) as blocks:
        model_folder.sampler.denoise(model_folder.pipe, inputs)
        uncached = whole.count
        model_folder.sampler.denoise(model_folder.pipe, inputs, plan)
    cached = whole.count - uncached
    assert blocks.count == whole.count and plan.nfe == STEPS - 3
    assert cached / uncached == plan.nfe / STEPS  # in calls: one or, with separate guidance branches, two a step


def test_a_budget_plan_makes_exactly_its_calls(model_folder):
    inputs, model = prepare(model_folder), model_folder.pipe.transformer
    grid, computed = tuple(inputs.sigmas.tolist()), (0, 1, 4, 6)
    pairs = [
        model_folder.sampler.first_order(model_folder.pipe, inputs, i, k) for i, k in ((0, 1), (1, 4), (4, 6), (6, 8))
    ]
    weights, scale = tuple((w,) for _, w in pairs), tuple(a for a, _ in pairs)
    plan = BudgetPlan(requirements(model_folder), computed, weights, grid, scale=scale)
    seen = []
    with CallCounter(model) as whole:
        model_folder.sampler.denoise(model_folder.pipe, inputs)
        uncached = whole.count
        x = model_folder.sampler.denoise(model_folder.pipe, inputs, plan, lambda i, x, v: seen.append((i, x, v)))
    assert (whole.count - uncached) / uncached == len(computed) / STEPS and [i for i, *_ in seen] == list(computed)
    (_, x0, v0), (_, x1, _) = seen[:2]
    assert torch.allclose(x1, pairs[0][0] * x0 + pairs[0][1] * v0, atol=1e-5) and x.isfinite().all()


def test_output_site_is_eq_5_and_6(model_folder):
    seen, inputs = [], prepare(model_folder)
    model_folder.sampler.denoise(
        model_folder.pipe, inputs, make_plan(model_folder, inputs, (2, 3)), lambda i, x, v: seen.append((x, v))
    )
    (x1, v1), (x2, v2), (x3, v3) = seen[1:4]
    assert torch.equal(v2, x2 + (v1 - x1)) and torch.equal(v3, x3 + (v1 - x1))


def test_blocks_site_reuses_nothing_but_the_residual_of_the_blocks(model_folder):
    """With the residual of this very step, the model without its blocks gives the model's own output."""
    inputs = prepare(model_folder)
    with model_folder.sampler.open_site(model_folder.pipe, inputs, "blocks") as site:
        x, t = inputs.latents, inputs.times[2]
        v = model_folder.sampler.velocity(model_folder.pipe, inputs, x, t)
        assert torch.allclose(site.reuse(x, t, site.residual(x, v)), v, atol=5e-5)


@pytest.mark.slow
def test_plans_of_both_sites_run_in_bfloat16(model_folder):
    """As the test above, in bfloat16; residuals are kept in it, and loop and pipeline are one."""
    sampler, dtype = model_folder.sampler, torch.bfloat16
    pipe = sampler.load("demo", dtype=dtype)
    inputs = prepare(model_folder, pipe)
    with sampler.open_site(pipe, inputs, "blocks") as site:
        x, t = inputs.latents, inputs.times[2]
        v = sampler.velocity(pipe, inputs, x, t)
        r = site.residual(x, v)
        assert r.dtype == dtype and (site.reuse(x, t, r) - v).norm() < 0.05 * v.norm()
    for site in SITES:
        plan = ThresholdPlan(
            requirements(model_folder, pipe), 0.1, (2, 5), site, tuple(inputs.sigmas.tolist()), rectified=True
        )
        ours = sampler.denoise(pipe, inputs, plan)
        assert ours.dtype == inputs.latents.dtype and ours.isfinite().all()
        ertacache.enable(pipe, plan)
        theirs = model_folder.stock(pipe, model_folder.prompts, SEEDS, STEPS, **short(model_folder, "num_frames"))
        ertacache.disable(pipe)
        assert torch.equal(ours, theirs)


def test_another_grid_stays_on_its_devices(model_folder):
    """Times are given to the model, so they must be where they were: UniPC keeps its sigmas on the CPU."""
    inputs = prepare(model_folder)
    if hasattr(inputs, "grid"):
        inputs = replace(inputs, grid=replace(inputs.grid, times=inputs.grid.times.to("meta")))
    elif "times" in inputs.__dataclass_fields__:
        inputs = replace(inputs, times=inputs.times.to("meta"))
    else:
        inputs = replace(inputs, sigmas=inputs.sigmas.to("meta"))
    sigmas = prepare(model_folder).sigmas * 0.9
    moved = inputs.on(sigmas.to(inputs.sigmas.device))
    assert moved.times.device.type == "meta" and moved.sigmas.device == inputs.sigmas.device


def test_rectification_and_grid_of_the_plan_are_used(model_folder):
    inputs = prepare(model_folder)
    plain = make_plan(model_folder, inputs, (2, 3))
    k, b = [0.0] * STEPS, [-2.0] * STEPS
    k[2], b[2] = 0.4, -1.96
    rectified = replace(plain, k=tuple(k), b=tuple(b), rectified=True)
    seen = {}
    model_folder.sampler.denoise(model_folder.pipe, inputs, rectified, lambda i, x, v: seen.update({i: (x, v)}))
    raw = seen[2][0] + (seen[1][1] - seen[1][0])
    assert torch.allclose(seen[2][1], raw - (0.1 * raw + 0.01), atol=1e-5)
    phi = tuple(0.5 if i == 2 else 1.0 for i in range(STEPS))
    adjusted = replace(plain, phi=phi, phi_definition="velocity")
    moved = model_folder.sampler.denoise(model_folder.pipe, inputs, adjusted)
    assert moved.isfinite().all() and not torch.equal(
        moved, model_folder.sampler.denoise(model_folder.pipe, inputs, plain)
    )


def test_another_grid_keeps_the_ends_and_returns_the_native_one_untouched(model_folder):
    inputs = prepare(model_folder)
    assert torch.equal(inputs.on(inputs.sigmas.clone()).times, inputs.times)
    grid = inputs.sigmas.clone()
    grid[2] = (grid[1] + grid[2]) / 2
    native, times = inputs.times.tolist(), inputs.on(grid).times.tolist()
    cut = 1 if model_folder.name == "ERTACache4Wan2.1" else 1e-2  # UniPC cuts its native times to whole numbers
    assert times[0] == pytest.approx(native[0], abs=cut) and times[3] == pytest.approx(native[3], abs=cut)
    assert native[2] < times[2] < native[1]


@pytest.mark.parametrize("site", SITES)
def test_a_batch_gives_what_single_prompts_give(model_folder, site):
    inputs = prepare(model_folder)
    plan = make_plan(model_folder, inputs, (1, 2, 4), site=site)
    together = model_folder.sampler.denoise(model_folder.pipe, inputs, plan)
    for row in range(len(SEEDS)):
        alone = prepare(model_folder, rows=slice(row, row + 1))
        alone = model_folder.sampler.denoise(model_folder.pipe, alone, plan)
        assert torch.allclose(alone[0], together[row], atol=5e-4)


@pytest.mark.parametrize("site", SITES)
def test_no_state_is_left_after_a_run_or_an_interrupted_one(model_folder, site):
    inputs = prepare(model_folder)
    plan = make_plan(model_folder, inputs, (1, 2, 4), site=site)
    before = hooks_of(model_folder.pipe.transformer)
    first = model_folder.sampler.denoise(model_folder.pipe, inputs, plan)

    def interrupt(i, x, v):
        if i == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model_folder.sampler.denoise(model_folder.pipe, inputs, plan, interrupt)
    assert hooks_of(model_folder.pipe.transformer) == before
    assert torch.equal(model_folder.sampler.denoise(model_folder.pipe, inputs, plan), first)


def test_the_shipped_plans_belong_to_the_shipped_demo(model_folder):
    plans = shipped_plans(model_folder.sampler)
    assert len(plans) >= 4
    settings = model_folder.sampler.settings_of(model_folder.pipe)
    run = Requirements.of(model_folder.pipe, settings.pop("steps"), settings | {"dtype": "float32"})
    for name, plan in plans.items():
        with no_warning():
            plan.check(run, remedy="")
        assert plan.provenance["weights"] == fingerprint(model_folder.pipe), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*SITES, "reference"])
def test_the_shipped_plan_beats_fewer_steps(model_folder, kind):
    """On held-out prompts, at about 2×, against the uncached run."""
    sampler, pipe, count = model_folder.sampler, model_folder.pipe, 2
    plan = shipped_plan(sampler, kind)
    prompts = sampler.grammar.sample_captions(count, seed=5, held_out=True)
    inputs = sampler.prepare(pipe, prompts, range(count), steps=plan.steps)
    uncached, planned = (sampler.denoise(pipe, inputs, p) for p in (None, plan))
    fewer = sampler.denoise(pipe, sampler.prepare(pipe, prompts, range(count), steps=plan.nfe))
    share = 0.1 if kind == "reference" else 1.0  # of the squared error, that is 10 dB
    assert (planned - uncached).square().mean() < share * (fewer - uncached).square().mean()


@pytest.mark.slow
def test_the_shipped_plan_at_half_the_calls_is_nearer_to_the_solution_than_the_uncached_run(model_folder):
    sampler, pipe = model_folder.sampler, model_folder.pipe
    steps = sampler.settings_of(pipe)["steps"]
    plan = BudgetPlan.load(sampler.FOLDER / "cache" / f"demo-{steps}-budget-{steps // 2}-exact.json")
    inputs = sampler.prepare(pipe, model_folder.prompts[:1], SEEDS[:1], steps=steps)
    grid, rate = candidate_grid(inputs.sigmas, 50), rate_of(sampler, pipe, inputs)
    solution = integrate(sampler, pipe, inputs, grid, rate, substeps=2)
    uncached, planned = (sampler.denoise(pipe, inputs, p) for p in (None, plan))
    assert plan.nfe == steps // 2
    assert (planned - solution).square().mean() < 0.5 * (uncached - solution).square().mean()


@pytest.mark.slow
def test_the_demo_shows_what_the_prompt_says(model_folder):
    sampler, pipe, grammar = model_folder.sampler, model_folder.pipe, model_folder.sampler.grammar
    prompts = grammar.sample_captions(20, seed=6, held_out=True)
    inputs = sampler.prepare(pipe, prompts, range(20), steps=30)
    results = sampler.decode(pipe, sampler.denoise(pipe, inputs), inputs)
    assert grammar.prompt_accuracy(prompts, [to_uint8(r) for r in results], pipe) >= 0.85


@pytest.mark.slow
def test_importing_does_no_work():
    code = "import sys; from ertacache.demos.model_folder import load_model_folder; "
    code += f"[load_model_folder(folder) for folder in {[str(ROOT / folder) for folder in FOLDERS]}]; "
    code += "assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("folder", FOLDERS)
class TestTheSourceText:
    def test_the_first_function_is_the_loop_and_fits_on_a_screen(self, folder):
        lines = (ROOT / folder / "generate.py").read_text().splitlines()
        functions = [n for n, line in enumerate(lines) if line.startswith("def ")]
        assert lines[functions[0]].startswith("def denoise(") and functions[1] - functions[0] <= 42
        assert len(lines) <= 320

    def test_run_sh_is_posix(self, folder):
        for script in (ROOT / folder / "run.sh", *sorted((ROOT / "scripts").rglob("*.sh"))):
            subprocess.run(["sh", "-n", script], check=True)
            assert script.read_text().startswith("#!/bin/sh")


def test_the_four_loops_read_alike():
    """Between the model folders only the solver's lines of denoise() differ."""

    def loop(folder):
        source = (ROOT / folder / "generate.py").read_text()
        body = source[source.index("    if plan is not None:") : source.index("    return x\n")]
        lines = [line.split("#")[0].rstrip() for line in body.splitlines()]
        return [line for line in lines if not line.strip().startswith(("x = ", "x, "))]

    first, *others = (loop(folder) for folder in FOLDERS)
    assert len(first) >= 12 and all(other == first for other in others)
