"""`ertacache evaluate`: plans, and plainly fewer steps, against the uncached run."""

import contextlib
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ertacache.calibration.from_pipeline import FOLDER
from ertacache.cli.calls import Call, Calls
from ertacache.cli.request import Request
from ertacache.evaluation.comparison import doubt
from ertacache.evaluation.metrics import PSNRS, finite, mean_and_tail, quality
from ertacache.plans import Plan
from ertacache.utils import parallel
from ertacache.utils.checkpoints import Checkpoints
from ertacache.utils.checks import check_seed
from ertacache.utils.errors import UserError
from ertacache.utils.files import check_file, write_atomically
from ertacache.utils.provenance import library_versions, machine

MEASURES = ("psnr", "psnr_8bit", "ssim")
HINT = "TeaCache, first-block cache and others on the same model: scripts/evaluate.py in a clone of the repository"


def run(request: Request, sources: Sequence[str], seed: int, repeats: int, file: Path | None) -> None:
    """Print the table, and write the rows as JSON to `file`."""
    check_seed(seed)
    plans = {source: request.plan(source) for source in sources}
    fixed = [name for name in ("sigmas", "timesteps") if name in request.arguments]
    if fixed:
        raise UserError(f"--set {fixed[0]} fixes the steps, fewer of them cannot be compared: leave it out")
    if file:
        check_file(file)
    parallel.run_on_all_ranks(lambda: _run(request, plans, seed, repeats, file))


def _run(request: Request, plans: Mapping[str, Plan], seed: int, repeats: int, file: Path | None) -> None:
    calls = Calls(request, seed)
    rows = measure(calls, methods_of(calls, plans), repeats)
    if not parallel.is_main():
        return
    facts = {"model": request.model, "prompts": len(request.prompts), "seed": seed, "batch_size": request.batch_size}
    facts |= {"settings": request.arguments, "repeats": repeats, "machine": machine()}
    facts |= {"libraries": library_versions(), "date": date.today().isoformat()}
    Console().print(table(rows, len(request.prompts)))
    for row in rows[1:]:
        reason = doubt([rows[0]["repeats_s"], row["repeats_s"]], row["speedup_nfe"])
        if reason:
            print(f"{row['label']}, {row['speedup_end_to_end']:.2f}×{reason}")
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

    def measured(number: int) -> list[list[dict[str, float | None]]]:
        """Return the distances of a batch, by method and result."""
        part = calls.batches[number]
        reference, _ = calls.run(methods[0], part)
        results = [calls.run(method, part)[0] for method in methods[1:]]
        pairs = [zip(reference, images, strict=True) for images in results]
        return [[quality(uncached[None], image[None]) for uncached, image in each] for each in pairs]

    mine = [finished.of_this_rank(k, partial(measured, k)) for k in parallel.mine(len(calls.batches))]
    batches = parallel.in_order(mine)  # also waits, so that nothing else runs while the first process measures time
    rows = []
    if parallel.is_main():
        distances = [[], *([d for batch in batches for d in batch[i]] for i in range(len(methods) - 1))]
        seconds: list[list[float]] = [[] for _ in methods]
        for _ in range(repeats):
            for method, times in zip(methods, seconds, strict=True):
                times.append(calls.run(method, calls.batches[0])[1])
        values = [{name: [d[name] for d in found] for name in MEASURES} for found in distances]
        parts = zip(methods, seconds, values, strict=True)
        rows = [row(calls.request, method, times, seconds[0], each) for method, times, each in parts]
    finished.remove()
    with contextlib.suppress(OSError):  # what lies in it belongs to another evaluation
        Path(FOLDER).rmdir()
    return rows


def row(
    request: Request, method: Call, times: list[float], uncached: list[float], values: Mapping[str, list]
) -> dict[str, Any]:
    """Return a row; names as in common/docs/reference/rows.md. A PSNR of equal images is None.

    Args:
        request: Of the calls.
        method: What was called.
        times, uncached: Seconds of its repeats, and of the uncached run's.
        values: MEASURES of each image or video.
    """
    steps = method.arguments.get("num_inference_steps", request.steps)
    nfe = method.plan.nfe if method.plan else steps
    name = method.plan.method if method.plan else "none" if steps == request.steps else "fewer-steps"
    found = {n: [math.inf if value is None else value for value in v] for n, v in values.items()}
    means = {n: finite(np.mean(v)) if v else None for n, v in found.items()}
    means |= mean_and_tail(np.array(found["psnr"])) if found["psnr"] else dict.fromkeys(PSNRS)
    return {
        "method": name,
        "label": method.name,
        "plan": method.name if method.plan else None,
        "steps": steps,
        "nfe": nfe,
        "speedup_nfe": request.steps / nfe,
        "repeats_s": times,
        "end_to_end_s": statistics.median(times),
        "speedup_end_to_end": statistics.median(uncached) / statistics.median(times),
        **means,
    }


def table(rows: Sequence[Mapping[str, Any]], prompts: int) -> Table:
    """Return the rows as a table for a terminal."""
    title = f"against the uncached run, {prompts} prompt{'s' if prompts > 1 else ''}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("", overflow="fold")
    for head in ("calls", "T/N", "s per call", "speed-up", "PSNR dB", "worst", "8 bits", "below 30 dB", "SSIM"):
        table.add_column(head, justify="right", no_wrap=True)
    steps = rows[0]["steps"]
    for r in rows:
        calls = (f"{r['nfe']} of {steps}", f"{r['speedup_nfe']:.2f}×")
        speed = (f"{r['end_to_end_s']:.3g}", f"{r['speedup_end_to_end']:.2f}×")
        table.add_row(Text(r["label"]), *calls, *speed, *quality_cells(r))
    return table


def quality_cells(row: Mapping[str, Any]) -> list[str]:
    """Return mean and worst PSNR, PSNR of 8-bit files, share below 30 dB, and SSIM."""
    psnrs = [_number(row[name], 1) for name in ("psnr", "psnr_worst", "psnr_8bit")]
    share = "–" if row["below_30db"] is None else f"{100 * row['below_30db']:.0f} %"
    return [*psnrs, share, _number(row["ssim"], 4)]


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
