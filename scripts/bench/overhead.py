"""Overhead of following a plan: the bare loop against the stock pipeline, in time and memory.

    .venv/bin/python scripts/bench/overhead.py ERTACache4FLUX ERTACache4Wan2.1 --batch-size 4 --repeats 9

Medians of alternating runs (A B C A B C …) of the denoising loop on one batch: the bare loop of the model folder's
generate.py with the plan; the stock pipeline that follows it; and the stock pipeline without a plan, at as many steps.

Percentages are of a computed step of the bare loop. The plan's code at a computed step is the part of the pipeline's
step that is spent in it, drift included. A skipped step is a whole iteration of the pipeline, with callbacks and
guidance but without a model call.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts

import statistics
import time

import torch
from torch.utils._pytree import tree_leaves

import ertacache
from ertacache.calibration.from_folder import find_plan
from ertacache.cli import folder_command
from ertacache.cli.arguments import ArgumentParser
from ertacache.demos.model_folder import load_model_folder
from ertacache.evaluation.table import facts
from ertacache.pipelines.uncached import uncached_latents
from ertacache.utils.devices import synchronize
from ertacache.utils.errors import run_program
from ertacache.utils.files import read_prompts
from ertacache.utils.tables import markdown


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
        synchronize(self.pipe._execution_device)
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


def measure(folder: str, rest: list[str]) -> dict[str, str]:
    """Return a column of the table: what a plan costs in one model folder."""
    sampler = load_model_folder(folder)
    without = ("prompt", "prompts", "seed", "fps", "compare", "out")
    options = folder_command.parse_arguments(sampler, ["--speedup", "2", *rest], without=without)
    request, calibration = folder_command.plan_request(options), folder_command.calibration_options(options)
    pipe = folder_command.open_pipeline(sampler, options)
    settings = folder_command.checked_settings(sampler, pipe, options)
    plan, _ = find_plan(sampler, pipe, settings, request, calibration)
    prompts = (read_prompts(sampler.FOLDER / "prompts" / "demo.txt") * options.batch_size)[: options.batch_size]
    overhead = Overhead(sampler, pipe, plan, settings, prompts)
    runs = (overhead.bare, overhead.planned, overhead.plain)
    seconds = [[run() for run in runs] for _ in range(options.repeats + 1)][1:]
    bare, planned, plain = (statistics.median(times) / plan.nfe for times in zip(*seconds, strict=True))
    own = statistics.median(overhead.in_steps[1:]) / plan.nfe
    skipped, in_plan = (statistics.median(times) for times in zip(*overhead.skipped, strict=True))
    latents = overhead.inputs.latents
    return {
        "bare loop, per computed step: model call and weighted sum": f"{1e3 * bare:.1f} ms",
        "stock pipeline with the plan, per computed step": f"{100 * planned / bare:.1f} %",
        "stock pipeline without a plan, per step": f"{100 * plain / bare:.1f} %",
        "the plan's code at a computed step": f"{1e3 * own:.2f} ms, {100 * own / bare:.1f} %",
        "a skipped step of the pipeline": f"{1e6 * skipped:.0f} µs, {100 * skipped / bare:.1f} %",
        "… of it in the scheduler's stand-in": f"{1e6 * in_plan:.0f} µs",
        "kept in the middle of a jump, in sizes of the latents": f"{overhead.kept / latents.nbytes:.0f}",
    }


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", help="model folders, for example ERTACache4FLUX")
    args, rest = parser.parse_known_args()
    columns = [measure(folder, rest) for folder in args.folders]
    names = [folder.removeprefix("ERTACache4") for folder in args.folders]
    print(markdown(["", *names], [[line, *(column[line] for column in columns)] for line in columns[0]]))
    print(f"\n{facts(f'plans at 2×; {torch.get_num_threads()} threads')}")


if __name__ == "__main__":
    run_program(main)
