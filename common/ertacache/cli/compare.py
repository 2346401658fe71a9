"""`ertacache evaluate MODEL`: budget plans beside other ways to spend as many model calls, on the user's own device.

It calibrates what is missing, fits the other methods on the same calibration prompts, measures all of them on held-out
prompts, and writes a report and a JSON file into one folder. Every piece is a checkpoint in that folder.
"""

import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ertacache.calibration.accelerate import find_plans, shipped_prompts
from ertacache.calibration.effort import EFFORTS
from ertacache.calibration.from_pipeline import FOLDER, check_call
from ertacache.calibration.search import goes_on
from ertacache.calibration.trajectories import SHIFTS, grid_name
from ertacache.cli.calls import Calls
from ertacache.cli.compare_files import EvaluationFolder, document, without_paths, write_report
from ertacache.cli.compare_rows import Method, full_row, timeline
from ertacache.cli.evaluate_rows import show
from ertacache.cli.measure import Measurement
from ertacache.cli.request import Request
from ertacache.evaluation.other_methods import FLOP_PROMPTS, OtherMethods, grid_call
from ertacache.pipelines.enable import disable
from ertacache.plans import Plan
from ertacache.plans.names import LEAST_BUDGET, budget_of
from ertacache.utils import parallel
from ertacache.utils.checkpoints import Checkpoints
from ertacache.utils.errors import UserError
from ertacache.utils.files import writable, write_atomically
from ertacache.utils.locks import exclusive
from ertacache.utils.progress import duration
from ertacache.utils.provenance import fingerprint, library_versions, machine
from ertacache.utils.words import counted

SPEEDUPS = (2, 3)
EFFORT = "quick"
LEARNED_ON = 4  # calibration prompts that fewer steps and OSS are fitted on
CACHES = ("first-block", "taylorseer")  # of diffusers
CACHE_RUNS = 8  # about as many runs find a cache's settings
METHODS = 4 + len(CACHES)  # measured at each speed-up
SAMPLES = 2  # prompts shown in the report
LEAST_WIDTH = 120  # of the table, in characters


@dataclass(frozen=True)
class Options:
    """What the command line asks for, besides the request.

    Attributes:
        plans: Given ones by source, in place of calibrated ones.
        out: Folder of the results.
        learned_on: Calibration prompts; None for those that ship with the package.
        seed: Of the first held-out prompt.
        repeats: Timed calls of each method.
        file: Also gets the rows.
    """

    plans: Mapping[str, Plan]
    out: Path
    learned_on: Sequence[str] | None
    seed: int
    repeats: int
    file: Path | None

    def targets(self, steps: int) -> dict[float, int]:
        """Return N by target speed-up: those of the plans given, or SPEEDUPS."""
        if self.plans:
            return {plan.steps / plan.nfe: plan.nfe for plan in self.plans.values()}
        if steps < LEAST_BUDGET * max(SPEEDUPS):
            text = f"the comparison is at {SPEEDUPS[0]}× and {SPEEDUPS[1]}×, which {steps} steps are too few for"
            raise UserError(f"{text}: give --steps {LEAST_BUDGET * max(SPEEDUPS)} or more, or plans with --plan")
        return {speedup: budget_of(steps, speedup) for speedup in SPEEDUPS}


def run_comparison(request: Request, options: Options) -> None:
    """Run the comparison, or go on with it."""
    targets = options.targets(request.steps)
    if options.learned_on:
        check_apart(request.prompts, options.learned_on)
    folder = EvaluationFolder(options.out, request)
    folder.check()
    with writable(folder.path), writable(folder.path / FOLDER):
        compare(request, options, targets, folder)
    with contextlib.suppress(OSError):  # what lies in it belongs to another evaluation
        (folder.path / FOLDER).rmdir()


def compare(request: Request, options: Options, targets: Mapping[float, int], folder: EvaluationFolder) -> None:
    """Measure what is not finished yet, and write the files. targets: N by target speed-up."""
    calls = Calls(request, options.seed)
    pipe = calls.pipe
    with request.calling():
        steps = check_call(pipe, list(targets), request.batch_size, request.arguments)
    learned_on = list(options.learned_on or shipped_prompts(pipe))
    check_apart(request.prompts, learned_on)
    work = checkpoints_of(calls, options, folder, learned_on)
    with goes_on(), exclusive(work.folder.with_suffix(".lock"), "making the same comparison"):
        seconds = first_call(calls)
        announce(request, options, targets, model_calls(request, options, steps, len(learned_on)), seconds)
        with request.calling():
            methods = methods_of(calls, options, targets, learned_on, work.folder)
        measurement = Measurement(calls, work, SAMPLES)
        pieces = measurement.quality([method.call for method in methods])
        if parallel.is_main():
            seconds = measurement.seconds([method.call for method in methods], options.repeats)
            rows = [
                full_row(calls, method, times, seconds[0], found, pieces[0])
                for method, times, found in zip(methods, seconds, pieces, strict=True)
            ]
            samples = [measurement.sample_paths(method.call) for method in methods]
            plan = next(method.call.plan for method in methods if method.call.plan is not None)
            facts = document(calls, options.repeats, learned_on, plan.requirements.settings)
            finish(calls, options, folder, facts, rows, samples)
        work.remove()


def checkpoints_of(calls: Calls, options: Options, folder: EvaluationFolder, learned_on: Sequence[str]) -> Checkpoints:
    """Return the checkpoints of this comparison: of these weights, plans, prompts, device and library versions."""
    pipe = calls.pipe
    identity = [calls.identity, fingerprint(pipe), str(pipe.dtype), list(learned_on)]
    identity += [machine(pipe._execution_device), library_versions()]
    identity += [calls.call(source, plan).key for source, plan in options.plans.items()]
    disable(pipe)
    return Checkpoints(folder.path / FOLDER, ["comparison, 1", *identity], "evaluation-", ".partial")


def check_apart(held_out: Sequence[str], learned_on: Sequence[str]) -> None:
    """Refuse prompts that are measured and learned on."""
    both = [prompt for prompt in held_out if prompt in learned_on]
    if both:
        remedy = "give --prompts or --calibration-prompts with others"
        raise UserError(f"{len(both)} of the prompts, the first {both[0]!r}, are those that plans learn on: {remedy}")


# --- what is to come ---------------------------------------------------------------------------------------------


def model_calls(request: Request, options: Options, steps: int, prompts: int) -> int:
    """Return about how many model calls the comparison makes, with a batch of prompts each."""

    def batches(count: int) -> int:
        return -(-count // request.batch_size)

    effort, budgets = EFFORTS[EFFORT], list(options.targets(steps).values())
    quick = 0 if options.plans else batches(min(prompts, effort.prompts)) * steps * (1 + effort.search * len(budgets))
    oss = sum(1 + (n - 1) * (steps - n + 2) for n in budgets)
    learned = batches(min(prompts, LEARNED_ON)) * (steps + (1 + len(SHIFTS)) * sum(budgets) + oss)
    caches = batches(min(prompts, FLOP_PROMPTS)) * steps * (1 + len(CACHES) * CACHE_RUNS // 2)
    once = steps + METHODS * sum(budgets)
    return steps + quick + learned + caches + once * (batches(len(request.prompts)) + options.repeats)


def announce(request: Request, options: Options, targets: Mapping[float, int], total: int, seconds: float) -> None:
    """Say what is done, how many model calls and how long it takes, and where the results are written.

    Args:
        request, options: Of the command line.
        targets: N by target speed-up.
        total: Model calls.
        seconds: Of the first call of the pipeline.
    """
    if not parallel.is_main():
        return
    steps, prompts = request.steps, len(request.prompts)
    budgets = " and ".join(str(n) for n in targets.values())
    plans = ", ".join(options.plans) or f"calibrated now ({EFFORT}) unless your store has them"
    size = f"{counted(request.batch_size, 'prompt')} each"
    cost = f"about {total} model calls with {size}, the time of {total / steps:.0f} uncached calls"
    lines = [
        f"comparison on {request.pipeline.__name__}: {budgets} of {steps} steps, {counted(prompts, 'held-out prompt')}",
        f"1. budget plans: {plans}",
        f"2. fewer steps, OSS and the caches {', '.join(CACHES)}, fitted on {LEARNED_ON} calibration prompts",
        f"3. quality on the held-out prompts, then seconds in {options.repeats} rounds",
        f"{cost}; results in {options.out}/",
        f"the first call took {seconds:.1f} s: about {duration(seconds * total / steps)} in all, less what is finished",
        "what is finished is kept: after an interruption the same command goes on",
    ]
    print("\n".join(lines), file=sys.stderr)


def first_call(calls: Calls) -> float:
    """Make the first uncached call, which warms up and shows that the pipeline takes the arguments. Returns seconds."""
    start = time.perf_counter()
    calls.run(calls.call("uncached"), calls.batches[0])
    return time.perf_counter() - start


# --- methods -----------------------------------------------------------------------------------------------------


def methods_of(
    calls: Calls, options: Options, targets: Mapping[float, int], learned_on: Sequence[str], work: Path
) -> list[Method]:
    """Return the uncached run, the plans, and the other methods with as many model calls or FLOPs.

    Args:
        calls: The pipeline.
        options: Of the command line.
        targets: N by target speed-up.
        learned_on: Calibration prompts.
        work: Folder for checkpoints.
    """
    request, pipe, steps = calls.request, calls.pipe, calls.request.steps
    plans = {source: (plan.steps / plan.nfe, plan) for source, plan in options.plans.items()}
    if not plans:
        arguments = {"effort": EFFORT, "batch_size": request.batch_size, "call_kwargs": request.arguments}
        found = find_plans(pipe, list(targets), learned_on, **arguments)
        plans = {f"budget plan ({plan.nfe})": (speedup, plan) for speedup, plan in found.items()}
    others = OtherMethods(pipe, learned_on[:LEARNED_ON], steps, request.batch_size, request.arguments, work)
    disable(pipe)
    problems = {"fewer steps on a tuned grid": others.reason_not_to_shift()}
    problems |= {name: others.reason_not_to_cache(name) for name in CACHES}
    if parallel.is_main():
        for name, problem in problems.items():
            if problem:
                print(f"{name} is left out: {problem}", file=sys.stderr)
    methods = [Method(calls.call("uncached"), "none", "none", None)]
    for label, (speedup, plan) in plans.items():
        call = calls.call(label if not options.plans else without_paths(label), plan)
        methods.append(Method(call, plan.method, plan.method, speedup, {"timeline": timeline(plan)}))
    disable(pipe)
    for speedup, n in targets.items():
        call = calls.call(f"fewer steps ({n})", num_inference_steps=n)
        methods.append(Method(call, "fewer-steps", "steps", speedup))
        if problems["fewer steps on a tuned grid"] is None:
            shift = others.tuned_shift(n)
            call = calls.call(f"fewer steps ({n}), {grid_name(shift)}", **grid_call(n, shift))
            methods.append(Method(call, "fewer-steps-tuned", "steps", speedup, {"shift": shift} if shift else {}))
        call = calls.call(f"OSS ({n})", others.optimal_steps_plan(n))
        methods.append(Method(call, "oss", "steps", speedup))
        disable(pipe)
    for name in (name for name in CACHES if problems[name] is None):
        for speedup, (value, label, within) in others.caches_at(name, list(targets)).items():
            methods.append(Method(calls.call(label, within=within), name, "peer", speedup, {"value": value}))
    return sorted(methods, key=lambda method: method.asked or 0)


# --- results -----------------------------------------------------------------------------------------------------


def finish(
    calls: Calls,
    options: Options,
    folder: EvaluationFolder,
    facts: dict[str, Any],
    rows: list[dict[str, Any]],
    samples: list[list[Path]],
) -> None:
    """Print the table, and write the files."""
    rows = [without_paths({**each, **{k: facts[k] for k in ("machine", "libraries", "date")}}) for each in rows]
    show(rows, len(calls.prompts), LEAST_WIDTH)
    text = json.dumps({**facts, "rows": rows}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(folder.json, text.encode())
    if options.file:
        text = json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(options.file, text.encode())
    report = write_report(folder, rows, samples, calls.prompts, text)
    print(f"{report}: the report; {folder.json}: all numbers, to be kept or sent")
