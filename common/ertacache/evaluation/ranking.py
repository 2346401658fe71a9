"""Ranks the rows of an evaluation. Pure functions on lists of rows (rows.py).

A row is ranked at its target speed-up, the row's `asked`, when it reaches it: the FLOPs of the uncached run over its
own are at least REACHED × the target (T / NFE where FLOPs were not counted). The uncached run and rows without the
metric are not ranked.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ertacache.utils.tables import MISSING, escaped
from ertacache.utils.tables import markdown as markdown_table

OUR_FAMILIES = ("budget", "ertacache")
OTHER_FAMILIES = ("peer", "steps")
FAMILIES = (*OUR_FAMILIES, *OTHER_FAMILIES, "none")
REACHED = 0.9  # of the target speed-up
LESS_IS_BETTER = {"nfe", "flops", "latency_s", "end_to_end_s", "lpips", "peak_memory_mib"}
LESS_IS_BETTER |= {"below_30db", "latents_below_30db"}
TITLES = {
    "label": "method",
    "nfe": "NFE",
    "speedup_flops": "FLOPs speed-up",
    "speedup_latency": "latency speed-up",
    "speedup_end_to_end": "end-to-end speed-up",
    "psnr": "PSNR, dB",
    "psnr_p10": "10th percentile, dB",
    "psnr_worst": "worst, dB",
    "below_30db": "below 30 dB",
    "ssim": "SSIM",
    "exact_psnr": "exact PSNR, dB",
    "prompt_accuracy": "prompt accuracy",
    "lpips": "LPIPS",
    "temporal_psnr": "temporal PSNR, dB",
    "psnr_8bit": "PSNR of 8 bits, dB",
    "latent_psnr": "latent PSNR, dB",
    "latents_below_30db": "latents below 30 dB",
    "exact_ssim": "exact SSIM",
    "exact_latent_psnr": "exact latent PSNR, dB",
    "clip_similarity": "CLIP similarity",
    "clip_score": "CLIP score",
    "peak_memory_mib": "peak memory, MiB",
    "place": "place",
}
DIGITS = {"ssim": 5, "exact_ssim": 5, "lpips": 4, "clip_similarity": 4, "prompt_accuracy": 3, "peak_memory_mib": 0}

AnyRow = Mapping[str, Any]  # a Row, or one with fewer fields


def is_ours(row: AnyRow) -> bool:
    """Return whether the method is one of ours: a budget or a threshold plan."""
    return row["family"] in OUR_FAMILIES


def speedup(row: AnyRow) -> float | None:
    """Return the speed-up by FLOPs; by computed steps where FLOPs were not counted."""
    return row["speedup_nfe"] if row.get("speedup_flops") is None else row["speedup_flops"]


def reaches(row: AnyRow, target: float | None) -> bool:
    """Return whether a row is as fast as its target speed-up, within a tenth."""
    return target is not None and speedup(row) is not None and speedup(row) >= REACHED * target


def better(metric: str, a: float, b: float) -> bool:
    """Return whether value a of a metric is strictly better than b."""
    return a < b if metric in LESS_IS_BETTER else a > b


def ranking(rows: Sequence[AnyRow], folder: str, target: float, metric: str) -> list[tuple[int, AnyRow]]:
    """Return (place, row) of the ranked rows, best first. Equal values share a place: 1, 1, 3.

    Args:
        rows: Of any folders and targets.
        folder: Model folder to rank.
        target: Target speed-up.
        metric: Column by which rows are ranked.
    """
    candidates = [row for row in rows if (row["folder"], row["asked"]) == (folder, target) and row["method"] != "none"]
    ranked = [row for row in candidates if reaches(row, target) and row.get(metric) is not None]
    places = [(1 + sum(better(metric, other[metric], row[metric]) for other in ranked), row) for row in ranked]
    return sorted(places, key=lambda pair: pair[0])


def margin(
    rows: Sequence[AnyRow], folder: str, target: float, metric: str, others: Sequence[str] = OTHER_FAMILIES
) -> float | None:
    """Return our best budget row minus the best row of other families, in the metric's unit; None without either."""
    ranked = [row for _, row in ranking(rows, folder, target, metric)]
    ours = next((row[metric] for row in ranked if row["family"] == "budget"), None)
    theirs = next((row[metric] for row in ranked if row["family"] in others), None)
    return None if ours is None or theirs is None else ours - theirs


def best(rows: Sequence[AnyRow], column: str) -> float | None:
    """Return the best value of a column among the rows that reach their target speed-up."""
    values = [row[column] for row in rows if reaches(row, row["asked"]) and row.get(column) is not None]
    return (min if column in LESS_IS_BETTER else max)(values, default=None)


def ordered(rows: Sequence[AnyRow], metric: str = "psnr") -> list[tuple[int | None, AnyRow]]:
    """Return (place or None, row): by target speed-up, then the ranked rows from the best, then the others."""
    order: list[tuple[int | None, AnyRow]] = []
    for target in sorted({row["asked"] for row in rows}, key=lambda target: target or 0):
        group = [row for row in rows if row["asked"] == target]
        folders = dict.fromkeys(row["folder"] for row in group)
        ranked = [pair for folder in folders for pair in ranking(group, folder, target, metric)]
        order += ranked + [(None, row) for row in group if not any(row is other for _, other in ranked)]
    return order


def cell(row: AnyRow, column: str) -> str:
    """Return a value as tables show it; a dash where it was not measured."""
    value = row.get(column)
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    if column == "nfe":
        return f"{value:g}" if value == int(value) else f"{value:.1f}"
    return f"{value:.{DIGITS.get(column, 2)}f}" + "×" * column.startswith("speedup")


def markdown(rows: Sequence[AnyRow], columns: Sequence[str], metric: str = "psnr") -> str:
    """Return a Markdown table by target speed-up, then metric; the best of a column at each speed-up is bold.

    Args:
        rows: One line per row.
        columns: Fields of a row, and "place", which is by the metric.
        metric: Orders the rows.
    """

    def text(place: int | None, row: AnyRow, column: str) -> str:
        if column == "place":
            return str(place or MISSING)
        shown = escaped(cell(row, column))
        comparable = reaches(row, row["asked"]) and row.get(column) is not None and not isinstance(row[column], str)
        group = [other for other in rows if (other["folder"], other["asked"]) == (row["folder"], row["asked"])]
        return f"**{shown}**" if comparable and row[column] == best(group, column) else shown

    lines = [[text(place, row, column) for column in columns] for place, row in ordered(rows, metric)]
    align = ["---" if column == "label" else "--:" for column in columns]
    return markdown_table([TITLES.get(column, column) for column in columns], lines, align)
