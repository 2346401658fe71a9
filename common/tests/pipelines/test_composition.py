"""Plans with what people do to pipelines: compile, offload, quantise, adapt, batch, copy. See docs/works-with.md."""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Thread

import accelerate
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline

import ertacache
from conftest import ROOT
from ertacache.pipelines.enable import originals
from helpers import (
    HALF,
    CallCounter,
    budget_plan,
    calibrate,
    counted,
    flux_plan,
    flux_planned,
    no_warning,
    with_prompts,
)
from tiny_pipelines import (
    STEPS,
    flux,
    flux_controlnet_img2img,
    flux_img2img,
    flux_inpaint,
    qwenimage_img2img,
    qwenimage_inpaint,
    wan,
    wan_two_models,
)

CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def plan():
    return flux_plan()


# --- compilation -------------------------------------------------------------------------------------------------


def wrapped(pipe, **options):
    pipe.transformer = torch.compile(pipe.transformer, **options)


COMPILED = {
    "torch.compile": wrapped,
    "compile": lambda pipe, **options: pipe.transformer.compile(**options),
    "compile_repeated_blocks": lambda pipe, **options: pipe.transformer.compile_repeated_blocks(**options),
}


@pytest.mark.slow
@pytest.mark.parametrize(("build", "how"), [*((flux, how) for how in COMPILED), (wan, "compile")])
def test_compiled_it_adds_no_graph_to_those_of_the_plain_run(build, how):
    from torch._dynamo import config, reset
    from torch._dynamo.utils import counters

    tiny, graphs = build(), []
    plan = budget_plan(tiny, HALF)
    ertacache.enable(tiny.pipe, plan)
    eager = tiny.run()
    ertacache.disable(tiny.pipe)
    reset()
    counters.clear()
    COMPILED[how](tiny.pipe, fullgraph=True, backend="eager")
    with config.patch(error_on_recompile=True):
        for change in (lambda: None, lambda: ertacache.enable(tiny.pipe, plan)):
            change()
            found = tiny.run()
            graphs.append(dict(counters["stats"]))
    assert torch.allclose(found, eager, atol=1e-5) and ertacache.summary(tiny.pipe).computed == plan.nfe
    assert graphs[0] == graphs[1] and graphs[0]["unique_graphs"] >= 1 and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("how", COMPILED)
def test_compiled_after_enable_it_is_the_model_that_is_compiled(how):
    """`torch.compile` is given the stand-in, and its result takes the stand-in's place."""
    from torch._dynamo import config, reset
    from torch._dynamo.utils import counters

    tiny = flux()
    plan = budget_plan(tiny, HALF)
    ertacache.enable(tiny.pipe, plan)
    eager = tiny.run()
    reset()
    counters.clear()
    COMPILED[how](tiny.pipe, fullgraph=True, backend="eager")
    with config.patch(error_on_recompile=True), no_warning():
        for _ in range(2):
            assert torch.allclose(tiny.run(), eager, atol=1e-5)
    assert ertacache.summary(tiny.pipe).computed == plan.nfe
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]


# --- offload -----------------------------------------------------------------------------------------------------


def sequential(pipe):
    """As enable_sequential_cpu_offload, which refuses the CPU."""
    for module in (pipe.vae, pipe.transformer):
        accelerate.cpu_offload(module, execution_device=CPU)


def groups(kind):
    return lambda pipe: pipe.transformer.enable_group_offload(CPU, CPU, offload_type=kind, num_blocks_per_group=1)


OFFLOADED = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": sequential,
    "leaf groups": groups("leaf_level"),
    "block groups": groups("block_level"),
}


@pytest.mark.parametrize("first", ["enable", "offload"])
@pytest.mark.parametrize("how", OFFLOADED)
def test_offloaded_it_is_the_same_run(how, first, plan):
    tiny = flux()
    plain, steps = tiny.run(), [lambda: ertacache.enable(tiny.pipe, plan), lambda: OFFLOADED[how](tiny.pipe)]
    with no_warning():
        for step in steps if first == "enable" else reversed(steps):
            step()
    found, calls = counted(tiny)
    assert torch.equal(found, flux_planned()) and calls == plan.nfe
    ertacache.disable(tiny.pipe)
    assert torch.equal(tiny.run(), plain)


@pytest.mark.slow
@pytest.mark.parametrize("how", OFFLOADED)
def test_a_plan_calibrated_under_offload_is_the_same_and_serves_without_it(how, tmp_path):
    tiny = with_prompts(flux())
    wanted = calibrate(tiny, work=tmp_path)[2]
    OFFLOADED[how](tiny.pipe)
    found = calibrate(tiny, work=tmp_path)[2]
    assert found.weights == wanted.weights and found.computed == wanted.computed
    assert found.provenance["weights"] == ("offloaded" if how == "sequential" else wanted.provenance["weights"])
    with no_warning():
        ertacache.enable(flux().pipe, found)


@gpu
@pytest.mark.parametrize(
    "offload",
    [
        lambda pipe: pipe.enable_model_cpu_offload(),
        lambda pipe: pipe.enable_sequential_cpu_offload(),
        lambda pipe: pipe.enable_group_offload("cuda", CPU, offload_type="leaf_level", use_stream=True),
        lambda pipe: pipe.enable_group_offload("cuda", CPU, offload_type="block_level", num_blocks_per_group=1),
    ],
    ids=["model", "sequential", "leaf groups", "block groups"],
)
def test_offloaded_from_a_gpu_it_is_the_same_run(offload, plan):
    tiny = flux()
    tiny.arguments = {k: v.cuda() if torch.is_tensor(v) else v for k, v in tiny.arguments.items()}
    tiny.pipe.to("cuda")
    ertacache.enable(tiny.pipe, plan)
    wanted = tiny.run()
    tiny.pipe.to("cpu")
    offload(tiny.pipe)
    found, calls = counted(tiny)
    assert torch.allclose(found, wanted, atol=1e-4) and calls == plan.nfe


# --- the call ----------------------------------------------------------------------------------------------------


def test_true_guidance_with_a_negative_prompt(plan):
    tiny = flux()
    ertacache.enable(tiny.pipe, plan)
    one = tiny.run()
    negative = {f"negative_{k}": 0.5 * v for k, v in tiny.arguments.items() if "prompt" in k}
    found, calls = counted(tiny, true_cfg_scale=3.0, **negative)
    assert calls == 2 * plan.nfe and not torch.allclose(found, one, atol=1e-3)


def test_a_callback_sees_every_step_and_may_end_guidance():
    tiny, seen = wan(), []
    plan = budget_plan(tiny, HALF)

    def end_guidance(pipe, i, t, tensors):
        seen.append((i, t.item(), pipe.num_timesteps))
        pipe._guidance_scale = 1.0 if i == 1 else pipe._guidance_scale
        return tensors

    times = originals(tiny.pipe)["scheduler"].timesteps.tolist()
    ertacache.enable(tiny.pipe, plan)
    _, calls = counted(tiny, callback_on_step_end=end_guidance)
    assert calls == 2 + 2 + 1 + 1 and seen == [(i, times[i], STEPS) for i in range(STEPS)]


def test_prompts_in_a_batch_are_the_prompts_alone(plan):
    tiny = flux()
    ertacache.enable(tiny.pipe, plan)
    two = {k: torch.cat([v, 0.5 * v]) for k, v in tiny.arguments.items() if "prompt" in k}
    both = tiny.run(generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)], **two)
    for row in (0, 1):
        alone = tiny.run(seed=row, **{k: v[row : row + 1] for k, v in two.items()})
        assert torch.allclose(both[row], alone[0], atol=1e-5)


def test_from_pipe_shares_the_scheduler_and_with_it_the_plan(plan):
    tiny = flux()
    ertacache.enable(tiny.pipe, plan)
    other = replace(flux_img2img(), pipe=FluxImg2ImgPipeline.from_pipe(tiny.pipe))
    assert counted(other)[1] == 3 and torch.equal(tiny.run(), flux_planned())
    ertacache.disable(other.pipe)
    assert counted(other)[1] == 6 and counted(tiny)[1] == plan.nfe


def test_threads_that_share_a_transformer(plan):
    one, found = flux(), {}
    other = replace(one, pipe=FluxPipeline(**{**one.pipe.components, "scheduler": copy.deepcopy(one.pipe.scheduler)}))
    alone = []
    for tiny, computed in ((one, HALF), (other, (0, 2))):
        ertacache.enable(tiny.pipe, budget_plan(flux(), computed))
        alone.append(tiny.run())
    threads = [
        Thread(target=lambda k=k, tiny=tiny: found.update({k: [tiny.run() for _ in range(3)]}))
        for k, tiny in enumerate((one, other))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, alone[k]) for k in (0, 1) for result in found[k])


# --- image to image ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [flux_controlnet_img2img, qwenimage_img2img, qwenimage_inpaint])
def test_with_strength_it_begins_where_the_uncached_run_does(build):
    tiny = build()
    ertacache.enable(tiny.pipe, budget_plan(tiny, HALF))
    for changes, steps in (({}, 3), ({"strength": 0.5}, 2), ({"strength": 1.0}, 4)):  # from 2, 4 and 0 on
        assert counted(tiny, **changes)[1] == steps * tiny.branches


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:drift")
@pytest.mark.parametrize(
    ("calibrated", "settings", "build"),
    [(flux, {}, flux_img2img), (flux, {}, flux_inpaint), (flux_img2img, {"strength": 1.0}, flux_img2img)],
)
def test_a_plan_of_the_same_parts_serves_image_to_image(calibrated, settings, build, tmp_path):
    """At strength 1 nearer to the uncached run than as many plain steps."""
    with no_warning():
        plan, other = calibrate(with_prompts(calibrated()), work=tmp_path, **settings)[2], build()
        uncached, fewer = other.run(strength=1.0), other.run(steps=4, strength=1.0)
        ertacache.enable(other.pipe, plan)
    found, calls = counted(other, strength=1.0)
    assert calls == 4 and (found - uncached).square().mean() < 0.5 * (fewer - uncached).square().mean()
    assert counted(other)[1] == 1 + sum(step > 2 for step in plan.computed)


# --- other shapes of pipeline ------------------------------------------------------------------------------------


def test_two_transformers_share_the_computed_steps():
    tiny = wan_two_models()
    plan = budget_plan(tiny, HALF)
    ertacache.enable(tiny.pipe, plan)
    with CallCounter(tiny.pipe.transformer) as first, CallCounter(tiny.pipe.transformer_2) as second:
        found = tiny.run()
    assert (first.count, second.count) == (6, 2) and found.isfinite().all()
    ertacache.disable(tiny.pipe)
    with CallCounter(tiny.pipe.transformer_2) as second:
        tiny.run()
    assert second.count == 2 * sum(t < 800 for t in originals(tiny.pipe)["scheduler"].timesteps.tolist())


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "ulysses_degree",
        pytest.param("ring_degree", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")),
    ],
)
def test_context_parallelism(kind, tmp_path, monkeypatch):
    """Both processes make the computed steps; together they make the latents of one alone."""
    path, script = flux_plan().save(tmp_path / "plan.json"), Path(__file__).with_name("context_parallel.py")
    command = [sys.executable, "-W", "ignore", script]
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "common" / "tests"), prepend=":")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, rank, kind, path, tmp_path / "meeting"], **pipes) for rank in "01"]
    for process in started:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        distance, computed = out.split()
        assert float(distance) < (1e-5 if torch.cuda.device_count() < 2 else 0.1) and int(computed) == 4
