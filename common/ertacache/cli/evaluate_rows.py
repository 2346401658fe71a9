"""The rows of `ertacache evaluate`, and their table for a terminal."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ertacache.cli.calls import Call
from ertacache.cli.request import Request
from ertacache.evaluation.comparison import doubt
from ertacache.evaluation.metrics import PSNRS, finite, mean_and_tail
from ertacache.evaluation.ranking import cell
from ertacache.utils.errors import printable
from ertacache.utils.words import counted

MEASURES = ("psnr", "psnr_8bit", "ssim")


def values_of(pieces: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Return MEASURES of each image or video of a method, from its pieces."""
    distances = [each for piece in pieces for each in piece["distances"]]
    return {name: [each[name] for each in distances] for name in MEASURES}


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


def show(rows: Sequence[Mapping[str, Any]], prompts: int, least_width: int = 0) -> None:
    """Print the table, and below it each speed-up that is to be doubted.

    Args:
        rows: The uncached run's first.
        prompts: Their number.
        least_width: Of the table, in characters, also where the terminal is narrower.
    """
    console = Console()
    console = console if console.width >= least_width else Console(width=least_width)
    console.print(table(rows, prompts))
    for each in rows[1:]:
        reason = doubt([rows[0]["repeats_s"], each["repeats_s"]], each["speedup_nfe"])
        if reason:
            print(f"{printable(each['label'])}, {each['speedup_end_to_end']:.2f}×{reason}")


def table(rows: Sequence[Mapping[str, Any]], prompts: int) -> Table:
    """Return the rows as a table for a terminal."""
    title = f"against the uncached run, {counted(prompts, 'prompt')}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("", overflow="fold")
    for head in ("calls", "T/N", "s per call", "speed-up", "PSNR dB", "p10", "worst", "8 bits", "below 30 dB", "SSIM"):
        table.add_column(head, justify="right", no_wrap=True)
    steps = rows[0]["steps"]
    for r in rows:
        calls = (f"{cell(r, 'nfe')} of {steps}", f"{r['speedup_nfe']:.2f}×")
        speed = (f"{r['end_to_end_s']:.3g}", f"{r['speedup_end_to_end']:.2f}×")
        table.add_row(Text(printable(r["label"])), *calls, *speed, *quality_cells(r))
    return table


def quality_cells(row: Mapping[str, Any]) -> list[str]:
    """Return mean, 10th percentile and worst of the PSNR, the mean in 8 bits, share below 30 dB, and SSIM."""
    psnrs = [_number(row[name], 1) for name in ("psnr", "psnr_p10", "psnr_worst", "psnr_8bit")]
    share = "–" if row["below_30db"] is None else f"{100 * row['below_30db']:.0f} %"
    return [*psnrs, share, _number(row["ssim"], 4)]


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
