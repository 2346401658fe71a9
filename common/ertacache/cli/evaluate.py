"""`ertacache evaluate`: plans, and plainly fewer steps, against the uncached run."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from ertacache.calibration.accelerate import packaged_prompts
from ertacache.calibration.from_pipeline import FOLDER
from ertacache.cli.calls import Call, Calls
from ertacache.cli.evaluate_rows import row, show, values_of
from ertacache.cli.measure import Measurement
from ertacache.cli.request import Request
from ertacache.plans import Plan
from ertacache.utils import parallel
from ertacache.utils.checkpoints import Checkpoints
from ertacache.utils.checks import check_seed
from ertacache.utils.errors import UserError
from ertacache.utils.files import read_prompts, writable_files, write_atomically
from ertacache.utils.provenance import library_versions, machine

DEFAULT_OUT = "ertacache-evaluation"
HINT = "TeaCache, first-block cache and others on the same model: scripts/evaluate.py in a clone of the repository"


def run(
    request: Request,
    sources: Sequence[str],
    out: Path | None,
    calibration_prompts: Path | None,
    seed: int,
    repeats: int,
    file: Path | None,
) -> None:
    """Print the table, and write the rows as JSON to `file`; without plans, or with `out`, compare other methods."""
    check_seed(seed)
    if not request.prompts:
        request = dataclasses.replace(request, prompts=packaged_prompts(request.makes_videos, held_out=True))
    plans = {source: request.plan(source) for source in sources}
    fixed = [name for name in ("sigmas", "timesteps") if name in request.arguments]
    if fixed:
        raise UserError(f"--set {fixed[0]} fixes the steps, fewer of them cannot be compared: leave it out")
    if plans and out is None:
        if calibration_prompts:
            raise UserError("--calibration-prompts without --out: plans given are measured, nothing is learned")
        work = partial(_run, request, plans, seed, repeats, file)
    else:
        from ertacache.cli.compare import Options, run_comparison

        learned_on = read_prompts(calibration_prompts) if calibration_prompts else None
        options = Options(plans, out or Path(DEFAULT_OUT), learned_on, seed, repeats, file)
        work = partial(run_comparison, request, options)
    with writable_files(file):
        parallel.run_on_all_ranks(work)


def _run(request: Request, plans: Mapping[str, Plan], seed: int, repeats: int, file: Path | None) -> None:
    calls = Calls(request, seed)
    rows = measure(calls, methods_of(calls, plans), repeats)
    if not parallel.is_main():
        return
    facts = {"model": request.model, "prompts": len(request.prompts), "seed": seed, "batch_size": request.batch_size}
    facts |= {"settings": request.arguments, "repeats": repeats, "machine": machine()}
    facts |= {"libraries": library_versions(), "date": date.today().isoformat()}
    show(rows, len(request.prompts))
    if file:
        text = json.dumps([row | facts for row in rows], indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(file, (text + "\n").encode())
    if any(plan.target == "exact" for plan in plans.values()):
        print("a plan aims at the exact solution, PSNR and SSIM are to the uncached run", file=sys.stderr)
    print(HINT)


def methods_of(calls: Calls, plans: Mapping[str, Plan]) -> list[Call]:
    """Return the uncached run, fewer steps of the pipeline's own scheduler for each number of calls, and the plans."""
    steps = calls.request.steps
    fewer = sorted({plan.nfe for plan in plans.values()} - {steps})
    methods = [calls.call("uncached")]
    methods += [calls.call(f"{n} steps", num_inference_steps=n) for n in fewer]
    return methods + [calls.call(source, plan) for source, plan in plans.items()]


def measure(calls: Calls, methods: Sequence[Call], repeats: int) -> list[dict[str, Any]]:
    """Measure one row per method.

    Quality: means over all prompts (of videos over frames), against the first method. Seconds: of the first batch's
    call end to end, medians of `repeats` rounds in which the methods take turns, after each of them has run once.
    """
    plans = [method.plan and dataclasses.asdict(method.plan) for method in methods]
    finished = Checkpoints(FOLDER, [calls.identity, plans], "evaluation-", ".partial")
    measurement = Measurement(calls, finished)
    pieces = measurement.quality(methods)  # also waits, so that nothing else runs while the first process measures time
    rows = []
    if parallel.is_main():
        seconds = measurement.seconds(methods, repeats)
        values = [values_of(found) for found in pieces]
        parts = zip(methods, seconds, values, strict=True)
        rows = [row(calls.request, method, times, seconds[0], each) for method, times, each in parts]
    finished.remove()
    with contextlib.suppress(OSError):  # what lies in it belongs to another evaluation
        Path(FOLDER).rmdir()
    return rows
