"""Parts of gpu_day.py on the trained demos: each yields rows, of numbers that a test on a CPU can check, too.

Distances are root mean squares over that of the uncached latents of the same run.
"""

import contextlib
import importlib.util
import inspect
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from overhead import kept_bytes

import ertacache
from ertacache import Plan
from ertacache.calibration.budget import BudgetCalibration
from ertacache.calibration.session import CalibrationSession
from ertacache.calibration.threshold import ThresholdCalibration
from ertacache.evaluation.latency import Latency, release_memory
from ertacache.pipelines.uncached import CALL_NAMES, text_length
from ertacache.utils.devices import peak_memory, reset_peak_memory, synchronize
from ertacache.utils.files import read_prompts

ROOT = Path(__file__).resolve().parents[3]
SEEDS = (7, 8)
CPU = torch.device("cpu")
CALIBRATIONS = ("budget", "threshold, output", "threshold, blocks", "pipeline")
GRAPHS = {"CUDA graphs": {"mode": "reduce-overhead"}, "inductor": {}}


class Demo:
    """A trained demo on a device, with two of its prompts.

    Args:
        sampler: The model folder.
        device: "cuda" or "cpu".
        dtype: Of the weights.
        **settings: Of the run, where they are not the demo's.
    """

    def __init__(self, sampler, device: str, dtype: torch.dtype = torch.float32, **settings):
        self.sampler, self.pipe = sampler, sampler.load("demo", device, dtype)
        self.prompts = read_prompts(sampler.FOLDER / "prompts" / "demo.txt")[: len(SEEDS)]
        self.settings = sampler.settings_of(self.pipe, **settings)

    def loop(self, plan: Plan | None = None) -> torch.Tensor:
        """Return the latents of the model folder's loop, float32 on the CPU."""
        inputs = self.sampler.prepare(self.pipe, self.prompts, SEEDS, **self.settings)
        return self.sampler.denoise(self.pipe, inputs, plan).float().cpu()

    def stock(self, plan: Plan | None = None) -> torch.Tensor:
        """Return those of the stock pipeline."""
        if plan is not None:
            ertacache.enable(self.pipe, plan)
        try:
            return self.call().float().cpu()
        finally:
            if plan is not None:
                ertacache.disable(self.pipe)

    @property
    def options(self) -> dict:
        """The settings as arguments of the pipeline's call."""
        options = {CALL_NAMES.get(name, name): value for name, value in self.settings.items()}
        if "max_sequence_length" in inspect.signature(type(self.pipe).__call__).parameters:
            options["max_sequence_length"] = text_length(self.pipe)
        return options

    @torch.no_grad()
    def call(self) -> torch.Tensor:
        """Return the latents of the pipeline as it is, on its device."""
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        result = self.pipe(self.prompts, generator=generators, output_type="latent", **self.options)
        return result.images if hasattr(result, "images") else result.frames

    def plans(self) -> dict[str, Plan]:
        """Return the shipped plan nearest to 2× of each kind: site of a threshold plan, target of a budget plan."""
        nearest: dict[str, tuple[str, Plan]] = {}
        for path in sorted((self.sampler.FOLDER / "cache").glob("demo-*.json")):
            plan = Plan.load(path)
            kind = plan.target if plan.kind == "budget" else plan.site
            best = nearest.get(kind)
            if best is None or abs(plan.nfe - plan.steps / 2) < abs(best[1].nfe - plan.steps / 2):
                nearest[kind] = path.stem, plan
        return dict(nearest.values())


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the root mean square of found − wanted over that of wanted."""
    return ((found - wanted).norm() / wanted.norm()).item()


def timed(run: Callable[[], torch.Tensor], device: str) -> tuple[torch.Tensor, float]:
    """Return a result, and the seconds it took."""
    start = time.perf_counter()
    result = run()
    synchronize(torch.device(device))
    return result, time.perf_counter() - start


def parity(samplers: Sequence, device: str, **settings) -> Iterator[dict]:
    """Yield a row per demo and dtype: loop against stock pipeline, and the device against the CPU in float32."""
    for sampler in samplers:
        wanted = Demo(sampler, "cpu", **settings).loop()
        for dtype in (torch.float32, torch.bfloat16):
            demo = Demo(sampler, device, dtype, **settings)
            loop, seconds = timed(demo.loop, device)
            row = {"folder": sampler.FOLDER.name, "dtype": str(dtype).removeprefix("torch."), "seconds": seconds}
            row["loop equals stock pipeline"] = torch.equal(loop, demo.stock())
            yield row | {"distance to the CPU in float32": distance(loop, wanted)}


def plans(samplers: Sequence, device: str) -> Iterator[dict]:
    """Yield a row per demo and plan: calls, distances of loop and pipeline to uncached, the predicted error."""
    for sampler in samplers:
        demo = Demo(sampler, device)
        uncached = demo.loop()
        for name, plan in demo.plans().items():
            loop, stock = demo.loop(plan), demo.stock(plan)
            row = {"folder": sampler.FOLDER.name, "plan": name, "computed": plan.nfe, "steps": plan.steps}
            row |= {"distance to uncached": distance(loop, uncached), "pipeline to loop": distance(stock, loop)}
            row["mean squared error"] = (loop - uncached).square().mean().item()
            yield row | {"predicted": getattr(plan, "predicted_error", None)}


def calibration(samplers: Sequence, device: str, kinds: Sequence[str] = CALIBRATIONS, **settings) -> Iterator[dict]:
    """Yield a row per demo and kind of plan, calibrated here for 2× on the same two prompts: its distance to uncached.

    kinds: of CALIBRATIONS, or "exact target". "pipeline" calibrates by the stock pipeline's own calls.
    """
    for sampler in samplers:
        demo = Demo(sampler, device, **settings)
        uncached, budget = demo.loop(), demo.settings["steps"] // 2
        for kind in kinds:
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as work:
                plan = calibrated(demo, kind, budget, work)
            row = {"folder": sampler.FOLDER.name, "calibrated": kind, "seconds": time.perf_counter() - start}
            loop, stock = demo.loop(plan), demo.stock(plan)
            row |= {"computed": plan.nfe, "steps": plan.steps, "distance to uncached": distance(loop, uncached)}
            yield row | {"pipeline to loop": distance(stock, loop)}


def calibrated(demo: Demo, kind: str, budget: int, work: str) -> Plan:
    """Return a plan of one kind, calibrated with as little effort as possible."""
    common = {"batch_size": len(SEEDS), "work": work, "progress": False}
    if kind == "pipeline":
        speedup = demo.settings["steps"] / budget
        return ertacache.calibrate(demo.pipe, demo.prompts, [speedup], effort="quick", **common, **demo.options).first
    session = CalibrationSession(demo.sampler, demo.pipe, demo.prompts, SEEDS, settings=demo.settings, **common)
    if kind.startswith("threshold"):
        found = ThresholdCalibration(session, kind.split()[-1])
        return found.plan(found.threshold_for(budget), "quick")
    return BudgetCalibration(session, "exact" if kind == "exact target" else "reference").plans([budget], "quick")[
        budget
    ]


def history(samplers: Sequence, device: str) -> Iterator[dict]:
    """Yield a row per demo: what a budget plan keeps between two steps, and peak memory with it and without."""
    for sampler in samplers:
        demo = Demo(sampler, device)
        plan = next(plan for plan in demo.plans().values() if plan.kind == "budget" and plan.target == "reference")
        peaks = []
        for followed in (None, plan):
            reset_peak_memory(torch.device(device))
            demo.stock(followed)
            peaks.append(peak_memory(torch.device(device)))
        ertacache.enable(demo.pipe, plan)
        kept, scheduler = [0], demo.pipe.scheduler
        make_step = scheduler.step

        def step(*args, make_step=make_step, scheduler=scheduler, kept=kept, **kwargs):
            output = make_step(*args, **kwargs)
            kept.append(kept_bytes(scheduler.run))
            return output

        scheduler.step = step
        latents = demo.call()
        ertacache.disable(demo.pipe)
        row = {"folder": sampler.FOLDER.name, "kept, latents": max(kept) / latents.nbytes}
        yield row | {"peak MiB, uncached": peaks[0], "peak MiB, plan": peaks[1]}


def flux(device: str, dtype: torch.dtype = torch.float32) -> tuple[Demo, Plan]:
    """Return the FLUX demo and its budget plan for 2×."""
    from ertacache.demos.model_folder import load_model_folder

    folder = ROOT / "ERTACache4FLUX"
    demo = Demo(load_model_folder(folder), device, dtype)
    return demo, Plan.load(folder / "cache" / "demo-30-budget-15.json")


def ways_to_offload(device: str) -> dict[str, Callable]:
    """Return functions of a pipeline that offload it; sequential offload and streams are not of a CPU."""
    target = torch.device(device)
    kinds = {
        "model": lambda pipe: pipe.enable_model_cpu_offload(device=device),
        "group, block": lambda pipe: pipe.enable_group_offload(
            target, CPU, offload_type="block_level", num_blocks_per_group=1
        ),
    }
    if device != "cpu":
        kinds["sequential"] = lambda pipe: pipe.enable_sequential_cpu_offload(device=device)
        kinds["group, leaf, stream"] = lambda pipe: pipe.enable_group_offload(
            target, CPU, offload_type="leaf_level", use_stream=True
        )
    return kinds


def offload(device: str) -> Iterator[dict]:
    """Yield a row per way to offload the FLUX demo: distance of a plan's latents to those without."""
    demo, plan = flux(device)
    wanted = demo.stock(plan)
    for name, apply in ways_to_offload(device).items():
        demo, _ = flux("cpu")
        apply(demo.pipe)
        found, seconds = timed(lambda demo=demo: demo.stock(plan), device)
        yield {"offload": name, "distance": distance(found, wanted), "seconds": seconds}


def offload_full(new_pipeline: Callable, sampler, device: str, settings: dict) -> Iterator[dict]:
    """Yield a row per way to offload a pipeline with random weights: seconds and peak memory of a plan for 2×.

    new_pipeline(): returns it, on the device.
    """
    for name, apply in {"none": lambda pipe: None, **ways_to_offload(device)}.items():
        pipe = new_pipeline()
        if name != "none":
            pipe.to("cpu")
            release_memory()
            apply(pipe)
        latency = Latency(sampler, pipe, sampler.settings_of(pipe, **settings), repeats=1)
        run = latency.run_of("budget")
        reset_peak_memory(torch.device(device))
        seconds = run()
        yield {"offload": name, "seconds": seconds, "peak MiB": peak_memory(torch.device(device))}
        del pipe, latency, run
        release_memory()


def compiled(device: str, backend: str) -> Iterator[dict]:
    """Yield a row per way to compile the FLUX demo: seconds of first and second run, distance to the eager run.

    CUDA graphs are inductor's; they come first, because a model that overwrites its outputs is the harder case. The
    demo keeps one block of each kind, so that the whole model compiles in time.
    """

    def new_demo() -> tuple[Demo, Plan]:
        demo, plan = flux(device)
        for name in ("transformer_blocks", "single_transformer_blocks"):
            del getattr(demo.pipe.transformer, name)[1:]
        return demo, plan

    demo, plan = new_demo()
    wanted, eager = {}, {}
    for name, followed in (("uncached", None), ("plan", plan)):
        demo.stock(followed)  # warms up
        wanted[name], eager[name] = timed(lambda followed=followed: demo.stock(followed), device)
    for kind, options in (GRAPHS if backend == "inductor" else {backend: {"backend": backend}}).items():
        torch._dynamo.reset()
        demo, _ = new_demo()
        demo.pipe.transformer.compile(**options)
        for name, followed in (("uncached", None), ("plan", plan)):
            _, first = timed(lambda demo=demo, followed=followed: demo.stock(followed), device)
            found, second = timed(lambda demo=demo, followed=followed: demo.stock(followed), device)
            row = {"compile": kind, "run": name, "first_s": first, "second_s": second}
            yield row | {"eager_s": eager[name], "distance to eager": distance(found, wanted[name])}
    torch._dynamo.reset()


def quantised(device: str) -> Iterator[dict]:
    """Yield a row for int8 weights: the distance of the plan to the uncached run, both quantised."""
    if importlib.util.find_spec("torchao") is None:
        yield {"weights": "int8", "skipped": "torchao is not installed"}
        return
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for dtype in (torch.float32, torch.bfloat16):
        demo, plan = flux(device, dtype)
        plain = demo.stock()
        quantize_(demo.pipe.transformer, Int8WeightOnlyConfig())
        uncached = demo.stock()
        row = {"weights": "int8", "dtype": str(dtype).removeprefix("torch.")}
        row["distance of int8"] = distance(uncached, plain)
        yield row | {"distance of the plan": distance(demo.stock(plan), uncached)}


def parallel(device: str) -> Iterator[dict]:
    """Yield a row each for Ulysses and ring attention on two GPUs, by the processes of common/tests."""
    if torch.cuda.device_count() < 2:
        yield {"skipped": f"{torch.cuda.device_count()} GPUs, two are needed"}
        return
    tests = ROOT / "common" / "tests"
    sys.path.insert(0, str(tests))
    from helpers import flux_plan

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    for kind in ("ulysses_degree", "ring_degree"):
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            plan = flux_plan().save(Path(folder) / "plan.json")
            command = [sys.executable, str(tests / "pipelines" / "context_parallel.py")]
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
            words = [kind, str(plan), f"{folder}/meeting"]
            both = [subprocess.Popen([*command, rank, *words], **options) for rank in "01"]
            for process in both:
                stack.callback(process.kill)
            said = [process.communicate()[0].strip().splitlines()[-1:] for process in both]
            yield {"attention": kind, "codes": [process.returncode for process in both], "distance, computed": said}
