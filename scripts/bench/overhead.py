"""Overhead of following a plan, per computed step: the bare loop against the stock pipeline.

    .venv/bin/python scripts/bench/overhead.py ERTACache4FLUX --batch-size 4 --repeats 9

Milliseconds per computed step, medians of alternating runs (A B C A B C …) of the denoising loop on one batch: the bare
loop of the model folder's generate.py with the plan; the stock pipeline that follows it; and the stock pipeline without
a plan, at as many steps. "in the plan" is the part of the second that is spent in the plan's own code, drift included;
"beyond the jump" leaves out the weighted sum, which the bare loop makes as well.
"""

import statistics
import time

import torch

from ertacache.calibration.from_folder import find_plan
from ertacache.cli import folder_command
from ertacache.cli.arguments import ArgumentParser
from ertacache.demos.model_folder import load_model_folder
from ertacache.numerics.jump import jump
from ertacache.pipelines.scheduler import PlannedScheduler
from ertacache.pipelines.uncached import uncached_latents
from ertacache.utils.devices import synchronize
from ertacache.utils.errors import run_program
from ertacache.utils.files import read_prompts
from ertacache.utils.provenance import library_versions, machine


class Overhead:
    """The runs of one demo with one of its plans, in seconds."""

    def __init__(self, sampler, pipe, plan, settings, prompts):
        self.sampler, self.pipe, self.plan, self.settings, self.prompts = sampler, pipe, plan, settings, prompts
        self.seeds = range(len(prompts))
        self.inputs, self.inside = sampler.prepare(pipe, prompts, self.seeds, **settings), []

    def bare(self) -> float:
        start = time.perf_counter()
        self.sampler.denoise(self.pipe, self.inputs, self.plan)
        synchronize(self.pipe)
        return time.perf_counter() - start

    def planned(self) -> float:
        original = self.pipe.scheduler
        self.pipe.scheduler = TimedPlan(original, self.plan)
        try:
            seconds = uncached_latents(self.pipe, self.prompts, self.seeds, self.settings)[1]
            self.inside.append(self.pipe.scheduler.inside)
            return seconds
        finally:
            self.pipe.scheduler = original

    def plain(self) -> float:
        return uncached_latents(self.pipe, self.prompts, self.seeds, {**self.settings, "steps": self.plan.nfe})[1]

    def jump(self) -> float:
        """One weighted sum."""
        x = self.inputs.latents
        history = [torch.randn_like(x) for _ in range(self.plan.history_length)]
        start = time.perf_counter()
        for _ in range(100):
            jump(x, history, self.plan.weights[-1], self.plan.scale[-1])
        return (time.perf_counter() - start) / 100


class TimedPlan(PlannedScheduler):
    """Sums the seconds in its steps."""

    inside = 0.0

    @property
    def step(self):
        follow = super().step

        def step(*args, **kwargs):
            start = time.perf_counter()
            output = follow(*args, **kwargs)
            self.inside += time.perf_counter() - start
            return output

        return step


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
    seconds["in the plan"] = overhead.inside
    seconds["beyond the jump"] = [inside - plan.nfe * overhead.jump() for inside in overhead.inside]
    milliseconds = {name: 1000 * statistics.median(times[1:]) / plan.nfe for name, times in seconds.items()}
    for name, value in milliseconds.items():
        share = 100 * value / milliseconds["bare loop"]
        print(f"{name}: {value:.3f} ms per computed step, {share:.2f} % of the bare loop")
    print(f"plan {plan.title}, batch {len(prompts)}, {options.repeats} repeats, {machine()}, {library_versions()}")


if __name__ == "__main__":
    run_program(main)
