"""Overhead of following a plan: the bare loop against the stock pipeline, in time and memory.

    .venv/bin/python scripts/bench/overhead.py ERTACache4FLUX --batch-size 4 --repeats 9

Medians of alternating runs (A B C A B C …) of the denoising loop on one batch: the bare loop of the model folder's
generate.py with the plan; the stock pipeline that follows it; and the stock pipeline without a plan, at as many steps.

"in the plan" is the part of the second that is spent in the plan's own code at a computed step, drift included.
"skipped step" is a whole iteration of the pipeline on a step that the plan skips, with callbacks and guidance but
without a model call; "in the plan, skipped" is the plan's part of it. "kept" are the tensors that the plan keeps in the
middle of a jump, in bytes, and in sizes of the latents.
"""

import statistics
import time

import torch
from torch.utils._pytree import tree_leaves

import ertacache
from ertacache.calibration.from_folder import find_plan
from ertacache.cli import folder_command
from ertacache.cli.arguments import ArgumentParser
from ertacache.demos.model_folder import load_model_folder
from ertacache.pipelines.uncached import uncached_latents
from ertacache.utils.devices import synchronize
from ertacache.utils.errors import run_program
from ertacache.utils.files import read_prompts
from ertacache.utils.provenance import library_versions, machine


class Overhead:
    """The runs of one demo with one of its plans, in seconds.

    Attributes:
        in_steps: Seconds in the plan's code at computed steps, one sum per run.
        skipped: Seconds of each skipped iteration, and of the plan's code in it.
        kept: Most bytes that a plan has kept.
    """

    def __init__(self, sampler, pipe, plan, settings, prompts):
        self.sampler, self.pipe, self.plan, self.settings, self.prompts = sampler, pipe, plan, settings, prompts
        self.seeds = range(len(prompts))
        self.inputs = sampler.prepare(pipe, prompts, self.seeds, **settings)
        self.in_steps, self.skipped, self.kept = [], [], 0

    def bare(self) -> float:
        start = time.perf_counter()
        self.sampler.denoise(self.pipe, self.inputs, self.plan)
        synchronize(self.pipe)
        return time.perf_counter() - start

    def planned(self) -> float:
        ertacache.enable(self.pipe, self.plan)
        scheduler = self.pipe.scheduler
        make_step, self.last = scheduler.step, time.perf_counter()
        self.in_steps.append(0.0)

        def step(*args, **kwargs):
            run = scheduler.run
            skips, start = run.next is not None and not run.course.computes(run.next), time.perf_counter()
            output = make_step(*args, **kwargs)
            end = time.perf_counter()
            if skips:
                self.skipped.append((end - self.last, end - start))
            else:
                self.in_steps[-1] += end - start
            self.kept = max(self.kept, kept_bytes(run))
            self.last = time.perf_counter()
            return output

        scheduler.step = step
        try:
            return uncached_latents(self.pipe, self.prompts, self.seeds, self.settings)[1]
        finally:
            ertacache.disable(self.pipe)

    def plain(self) -> float:
        return uncached_latents(self.pipe, self.prompts, self.seeds, {**self.settings, "steps": self.plan.nfe})[1]


def kept_bytes(run) -> int:
    """Return the bytes that a run and its course keep between two steps."""
    kept = [list(vars(run.way).values())]
    if run.course.outputs is not None:
        kept.append(run.course.outputs.kept)
    tensors = {id(x): x for x in tree_leaves(kept) if isinstance(x, torch.Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="model folder, for example ERTACache4FLUX")
    args, rest = parser.parse_known_args()
    sampler = load_model_folder(args.folder)
    options = folder_command.parse_arguments(sampler, ["--speedup", "2", *rest])
    request, calibration = folder_command.plan_request(options), folder_command.calibration_options(options)
    pipe = folder_command.open_pipeline(sampler, options)
    settings = folder_command.checked_settings(sampler, pipe, options)
    plan, _ = find_plan(sampler, pipe, settings, request, calibration)
    prompts = (read_prompts(sampler.FOLDER / "prompts" / "demo.txt") * options.batch_size)[: options.batch_size]
    overhead = Overhead(sampler, pipe, plan, settings, prompts)
    kinds = {"bare loop": overhead.bare, "pipeline with the plan": overhead.planned, "pipeline alone": overhead.plain}
    seconds = {name: [] for name in kinds}
    for _ in range(options.repeats + 1):
        for name, run in kinds.items():
            seconds[name].append(run())
    seconds["in the plan"] = overhead.in_steps
    milliseconds = {name: 1000 * statistics.median(times[1:]) / plan.nfe for name, times in seconds.items()}
    for name, value in milliseconds.items():
        share = 100 * value / milliseconds["bare loop"]
        print(f"{name}: {value:.3f} ms per computed step, {share:.2f} % of the bare loop")
    for name, times in zip(("skipped step", "in the plan, skipped"), zip(*overhead.skipped, strict=True), strict=True):
        microseconds = 1e6 * statistics.median(times)
        share = microseconds / milliseconds["bare loop"] / 10
        print(f"{name}: {microseconds:.0f} µs per skipped step, {share:.2f} % of a computed step of the bare loop")
    latents = overhead.inputs.latents
    size = latents.numel() * latents.element_size()
    print(f"kept: {overhead.kept} bytes, {overhead.kept / size:.1f} latents of {size} bytes")
    print(f"plan {plan.title}, batch {len(prompts)}, {options.repeats} repeats, {machine()}, {library_versions()}")


if __name__ == "__main__":
    run_program(main)
