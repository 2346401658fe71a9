"""`ertacache evaluate`: plans, and plainly fewer steps, against the uncached run."""

import json
import statistics
import sys
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ertacache.cli.calls import Calls, Method
from ertacache.cli.model_folder import METHODS
from ertacache.cli.request import Request, prompts_of
from ertacache.evaluation.metrics import mean, psnr, ssim
from ertacache.plans.plan import Plan
from ertacache.utils.errors import UserError
from ertacache.utils.files import ensure_writable, write_atomically
from ertacache.utils.provenance import library_versions, machine

MEASURES = {"psnr": psnr, "ssim": ssim}
HINT = "TeaCache, first-block cache and others on the same model: scripts/evaluate.py in a clone of the repository"


def run(request: Request, sources, prompt, prompts_file, seed, batch_size, repeats: int, file: Path | None) -> None:
    """The table on stdout, the rows as JSON in `file`."""
    prompts = prompts_of(prompt, prompts_file)
    plans = {source: request.plan(source) for source in sources}
    fixed = [name for name in ("sigmas", "timesteps") if name in request.arguments]
    if fixed:
        raise UserError(f"--set {fixed[0]} fixes the steps, fewer of them cannot be compared: leave it out")
    if file:
        ensure_writable(file.parent)
    calls = Calls(request, prompts, seed, batch_size)
    rows = measure(calls, methods_of(calls, plans), repeats)
    settings = {"model": request.model, "prompts": len(prompts), "seed": seed, "batch_size": batch_size}
    settings |= {"settings": request.arguments, "repeats": repeats, "machine": machine()}
    settings |= {"libraries": library_versions(), "date": date.today().isoformat()}
    if file:
        text = json.dumps([row | settings for row in rows], indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(file, (text + "\n").encode())
    Console().print(table(rows, len(prompts)))
    if any(getattr(plan, "target", "reference") == "exact" for plan in plans.values()):
        print("a plan aims at the exact solution, PSNR and SSIM are to the uncached run", file=sys.stderr)
    print(HINT)


def methods_of(calls: Calls, plans: dict[str, Plan]) -> list[Method]:
    """The uncached run first; fewer steps of the pipeline's own scheduler for each number of calls; the plans."""
    steps = calls.request.steps
    fewer = sorted({plan.nfe for plan in plans.values()} - {steps})
    methods = [calls.method("uncached")]
    methods += [calls.method(f"{n} steps", num_inference_steps=n) for n in fewer]
    return methods + [calls.method(source, plan) for source, plan in plans.items()]


def measure(calls: Calls, methods: list[Method], repeats: int) -> list[dict]:
    """A row a method. Quality: means over all prompts (of videos over frames), against the first method.

    Seconds: of the first batch's call end to end, medians of `repeats` rounds in which the methods take turns, after
    every one of them has run once.
    """
    quality = [{name: [] for name in MEASURES} for _ in methods]
    for part in calls.batches:
        reference, _ = calls.run(methods[0], part)
        for method, values in zip(methods[1:], quality[1:], strict=True):
            for pair in zip(reference, calls.run(method, part)[0], strict=True):
                for name, metric in MEASURES.items():
                    values[name].append(mean(metric, *(picture[None] for picture in pair)))
    seconds = [[] for _ in methods]
    for _ in range(repeats):
        for method, times in zip(methods, seconds, strict=True):
            times.append(calls.run(method, calls.batches[0])[1])
    medians = [statistics.median(times) for times in seconds]
    found = zip(methods, medians, quality, strict=True)
    return [row(calls.request, method, time, medians[0] / time, values) for method, time, values in found]


def row(request: Request, method: Method, seconds: float, speedup: float, quality: dict[str, list]) -> dict:
    """Names as in common/docs/rows.md. A PSNR without a number (equal pictures) is None."""
    steps = method.arguments.get("num_inference_steps", request.steps)
    nfe = method.plan.nfe if method.plan else steps
    kind = METHODS[method.plan.kind] if method.plan else "none" if steps == request.steps else "fewer-steps"
    means = {n: statistics.fmean(v) if v and None not in v else None for n, v in quality.items()}
    return {
        "method": kind,
        "label": method.name,
        "plan": method.name if method.plan else None,
        "steps": steps,
        "nfe": nfe,
        "speedup_nfe": request.steps / nfe,
        "end_to_end_s": seconds,
        "speedup_end_to_end": speedup,
        **means,
    }


def table(rows: list[dict], prompts: int) -> Table:
    title = f"against the uncached run, {prompts} prompt{'s' if prompts > 1 else ''}"
    found = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold")
    found.add_column("", overflow="fold")
    for head in ("calls", "T/N", "s a call", "speed-up", "PSNR dB", "SSIM"):
        found.add_column(head, justify="right", no_wrap=True)
    total = rows[0]["steps"]
    for r in rows:
        calls = (f"{r['nfe']} of {total}", f"{r['speedup_nfe']:.2f}×")
        speed = (f"{r['end_to_end_s']:.3g}", f"{r['speedup_end_to_end']:.2f}×")
        found.add_row(Text(r["label"]), *calls, *speed, _number(r["psnr"], 1), _number(r["ssim"], 4))
    return found


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
