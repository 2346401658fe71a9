"""`ertacache evaluate`: plans, and plainly fewer steps, against the uncached run."""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ertacache.cli.calls import Call, Calls
from ertacache.cli.request import Request
from ertacache.evaluation.metrics import quality
from ertacache.plans import Plan
from ertacache.utils.errors import UserError
from ertacache.utils.files import ensure_writable, write_atomically
from ertacache.utils.provenance import library_versions, machine

MEASURES = ("psnr", "ssim")
HINT = "TeaCache, first-block cache and others on the same model: scripts/evaluate.py in a clone of the repository"


def run(request: Request, sources: Sequence[str], seed: int, repeats: int, file: Path | None) -> None:
    """Print the table, and write the rows as JSON to `file`."""
    plans = {source: request.plan(source) for source in sources}
    fixed = [name for name in ("sigmas", "timesteps") if name in request.arguments]
    if fixed:
        raise UserError(f"--set {fixed[0]} fixes the steps, fewer of them cannot be compared: leave it out")
    if file:
        ensure_writable(file.parent)
    calls = Calls(request, seed)
    rows = measure(calls, methods_of(calls, plans), repeats)
    facts = {"model": request.model, "prompts": len(request.prompts), "seed": seed, "batch_size": request.batch_size}
    facts |= {"settings": request.arguments, "repeats": repeats, "machine": machine()}
    facts |= {"libraries": library_versions(), "date": date.today().isoformat()}
    if file:
        text = json.dumps([row | facts for row in rows], indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(file, (text + "\n").encode())
    Console().print(table(rows, len(request.prompts)))
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
    measured: list[dict[str, list]] = [{name: [] for name in MEASURES} for _ in methods]
    for part in calls.batches:
        reference, _ = calls.run(methods[0], part)
        for method, values in zip(methods[1:], measured[1:], strict=True):
            for uncached, image in zip(reference, calls.run(method, part)[0], strict=True):
                distance = quality(uncached[None], image[None])
                for name in MEASURES:
                    values[name].append(distance[name])
    seconds: list[list[float]] = [[] for _ in methods]
    for _ in range(repeats):
        for method, times in zip(methods, seconds, strict=True):
            times.append(calls.run(method, calls.batches[0])[1])
    medians = [statistics.median(times) for times in seconds]
    rows = zip(methods, medians, measured, strict=True)
    return [row(calls.request, method, time, medians[0] / time, values) for method, time, values in rows]


def row(request: Request, method: Call, seconds: float, speedup: float, values: Mapping[str, list]) -> dict[str, Any]:
    """Return a row; names as in common/docs/reference/rows.md. A PSNR of equal images is None."""
    steps = method.arguments.get("num_inference_steps", request.steps)
    nfe = method.plan.nfe if method.plan else steps
    name = method.plan.method if method.plan else "none" if steps == request.steps else "fewer-steps"
    means = {n: statistics.fmean(v) if v and None not in v else None for n, v in values.items()}
    return {
        "method": name,
        "label": method.name,
        "plan": method.name if method.plan else None,
        "steps": steps,
        "nfe": nfe,
        "speedup_nfe": request.steps / nfe,
        "end_to_end_s": seconds,
        "speedup_end_to_end": speedup,
        **means,
    }


def table(rows: Sequence[Mapping[str, Any]], prompts: int) -> Table:
    """Return the rows as a table for a terminal."""
    title = f"against the uncached run, {prompts} prompt{'s' if prompts > 1 else ''}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("", overflow="fold")
    for head in ("calls", "T/N", "s per call", "speed-up", "PSNR dB", "SSIM"):
        table.add_column(head, justify="right", no_wrap=True)
    steps = rows[0]["steps"]
    for r in rows:
        calls = (f"{r['nfe']} of {steps}", f"{r['speedup_nfe']:.2f}×")
        speed = (f"{r['end_to_end_s']:.3g}", f"{r['speedup_end_to_end']:.2f}×")
        table.add_row(Text(r["label"]), *calls, *speed, _number(r["psnr"], 1), _number(r["ssim"], 4))
    return table


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
