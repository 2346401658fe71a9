"""`ertacache generate`: images and videos, with a plan, uncached, or both to compare.

Several processes that a launcher has started take the batches of prompts in turn, and each writes its own files.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ertacache.calibration.accelerate import find_plans
from ertacache.cli.calls import Call, Calls
from ertacache.cli.options import FPS
from ertacache.cli.request import Request
from ertacache.evaluation.comparison import compare, doubt
from ertacache.pipelines.summary import Summary, summary
from ertacache.plans import Plan
from ertacache.plans.names import budget_of, check_speedups
from ertacache.utils import media, parallel
from ertacache.utils.checkpoints import Checkpoints
from ertacache.utils.checks import check_seed
from ertacache.utils.errors import UserError
from ertacache.utils.files import writable
from ertacache.utils.words import counted

UNFINISHED = ".unfinished-"  # a folder in the output folder that says which batches are done


@dataclasses.dataclass(frozen=True)
class Output:
    """Where and how results are written.

    Attributes:
        folder: For one file per prompt and method.
        compare: Whether to run uncached too, and compare.
        fps: Frames per second of videos; None by default.
    """

    folder: Path
    compare: bool
    fps: int | None


def run(
    request: Request,
    source: str | None,
    speedup: float | None,
    seed: int,
    output: Output,
    on_drift: str | None = None,
) -> None:
    """Generate, in one process or in each of several; to compare, both methods run once before, to warm up.

    Args:
        request: Pipeline, prompts and arguments.
        source: Of a plan.
        speedup: Of a set's plan; without a source, of a stored plan or one made now.
        seed: Of the first prompt.
        output: Where to.
        on_drift: As in `ertacache.enable`; None for its default.
    """
    check_seed(seed)
    planned = source is not None or speedup is not None
    if output.compare and not planned:
        raise UserError("--compare without --plan or --speedup: say what is compared with the uncached run")
    if on_drift and not planned:
        raise UserError(f"--on-drift {on_drift} without --plan or --speedup: runs with a plan drift, leave it out")
    if output.fps and not request.makes_videos:
        raise UserError(f"--fps {output.fps}: a {request.pipeline.__name__} makes images, leave it out")
    if speedup is not None and source is None:
        check_speedups([speedup], "--speedup")
        budget_of(request.steps, speedup)
    plan = request.plan(source, speedup if source else None)

    def main() -> None:
        with writable(output.folder):
            calls = Calls(request, seed, on_drift or "warn")
            chosen = plan
            if source is None and speedup is not None:
                with request.calling():
                    chosen = find_plans(calls.pipe, speedup, call_kwargs=request.arguments).first
            methods = {"baseline": None} if chosen is None else {chosen.method: chosen}
            if output.compare:
                methods = {"baseline": None, **methods}
                for name, followed in methods.items():
                    calls.run(calls.call(name, followed), calls.batches[0])
            made = [calls.call(name, followed) for name, followed in methods.items()]
            results, kind = generate(calls, made, output)
            report(calls, chosen, results, output, kind)

    parallel.run_on_all_ranks(main)


def generate(
    calls: Calls, methods: Sequence[Call], output: Output
) -> tuple[dict[str, tuple[list[np.ndarray], float]], str | None]:
    """Make the calls of this process, the methods in turn, batch by batch; each file is written as it is made.

    Batches that a run was done with when it was broken off are not made again; to compare, all are.

    Returns:
        Name → images or videos of each batch (kept to compare only), and the seconds of all calls; and what was made,
        "image" or "video" (None in a process without a batch).
    """
    kind = None
    results: dict[str, tuple[list, list]] = {method.name: ([], []) for method in methods}
    plans = [method.plan and dataclasses.asdict(method.plan) for method in methods]
    finished = Checkpoints(output.folder, [calls.identity, plans, output.fps or FPS], UNFINISHED)

    def make(number: int) -> str:
        part = calls.batches[number]
        for method in methods:
            images, seconds = calls.run(method, part)
            media.save_results(output.folder, images, method.name, output.fps or FPS, first=part.start)
            if output.compare:
                results[method.name][0].append(images)
            results[method.name][1].append(seconds)
        return "video" if images.ndim == 5 else "image"

    for number in parallel.mine(len(calls.batches)):
        kind = make(number) if output.compare else finished.of_this_rank(number, partial(make, number))
    finished.remove()
    return {name: (images, sum(seconds)) for name, (images, seconds) in results.items()}, kind


def report(
    calls: Calls, plan: Plan | None, results: Mapping[str, tuple[list[np.ndarray], float]], output: Output, kind: str
) -> None:
    """Print what all processes together have made. kind: "image" or "video"."""
    done = all_summaries(summary(calls.pipe)) if plan else None
    gathered = {name: (parallel.in_order(images), sum(parallel.gather(s))) for name, (images, s) in results.items()}
    if not parallel.is_main():
        return
    print(f"{counted(len(calls.prompts), kind)} in {output.folder}/")
    if done:
        print(done)
    if output.compare:
        (uncached, before), (cached, after) = gathered.values()
        comparison = compare(calls.prompts, np.concatenate(uncached), np.concatenate(cached), plan)
        media.save_png(output.folder / "comparison.png", comparison.sheet)
        doubts = doubt([[before], [after]], plan.steps / plan.nfe)
        speed = f"{before / after:.2f}× faster calls ({before:.2f} s → {after:.2f} s{doubts})"
        print(f"{speed}, {comparison}; see {output.folder}/comparison.png")


def all_summaries(mine: Summary) -> Summary:
    """Return this process's summary with the counts of all processes."""
    names = ("calls", "all_computed", "all_skipped")
    counts = parallel.gather([getattr(mine, name) for name in names])
    return dataclasses.replace(mine, **dict(zip(names, map(sum, zip(*counts, strict=True)), strict=True)))
