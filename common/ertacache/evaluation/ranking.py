"""Who stands where among the rows of `scripts/evaluate.py` (docs/rows.md). Pure functions on lists of rows.

A row is ranked at the speed-up that was asked for when it reaches it: FLOPs of the uncached run over its own are at
least REACHED × asked (T / NFE where FLOPs were not counted). The uncached run and rows without
the metric are not ranked.
"""

OURS = ("budget", "ertacache")
OTHERS = ("peer", "steps")
FAMILIES = (*OURS, *OTHERS, "none")
REACHED = 0.9
LESS_IS_BETTER = {"nfe", "flops", "latency_s", "end_to_end_s", "lpips", "peak_memory_mib"}
TITLES = {
    "label": "method",
    "nfe": "NFE",
    "speedup_flops": "FLOPs speed-up",
    "speedup_latency": "latency speed-up",
    "speedup_end_to_end": "end-to-end speed-up",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "exact_psnr": "exact PSNR, dB",
    "prompt_accuracy": "prompt accuracy",
    "lpips": "LPIPS",
    "temporal_psnr": "temporal PSNR, dB",
    "latent_psnr": "latent PSNR, dB",
    "exact_ssim": "exact SSIM",
    "exact_latent_psnr": "exact latent PSNR, dB",
    "clip_similarity": "CLIP similarity",
    "clip_score": "CLIP score",
    "peak_memory_mib": "peak memory, MiB",
    "place": "place",
}
DIGITS = {"ssim": 5, "exact_ssim": 5, "lpips": 4, "clip_similarity": 4, "prompt_accuracy": 3, "peak_memory_mib": 0}
MISSING = "–"


def is_ours(row: dict) -> bool:
    return row["family"] in OURS


def speedup(row: dict) -> float | None:
    """By FLOPs; by computed steps where FLOPs were not counted."""
    return row["speedup_nfe"] if row.get("speedup_flops") is None else row["speedup_flops"]


def reaches(row: dict, asked: float | None) -> bool:
    """Whether a row is as fast as was asked, within a tenth."""
    return asked is not None and speedup(row) is not None and speedup(row) >= REACHED * asked


def better(metric: str, a: float, b: float) -> bool:
    return a < b if metric in LESS_IS_BETTER else a > b


def standing(rows: list[dict], folder: str, asked: float, metric: str) -> list[tuple[int, dict]]:
    """(place, row) of the ranked rows, best first. Equal values share a place: 1, 1, 3."""
    here = [row for row in rows if row["folder"] == folder and row["asked"] == asked and row["method"] != "none"]
    ranked = [row for row in here if reaches(row, asked) and row.get(metric) is not None]
    places = [(1 + sum(better(metric, other[metric], row[metric]) for other in ranked), row) for row in ranked]
    return sorted(places, key=lambda pair: pair[0])


def margin(rows: list[dict], folder: str, asked: float, metric: str, others=OTHERS) -> float | None:
    """Our best budget row minus the best row of other families, in the metric's unit; None when either is missing."""
    ranked = [row for _, row in standing(rows, folder, asked, metric)]
    ours = next((row[metric] for row in ranked if row["family"] == "budget"), None)
    theirs = next((row[metric] for row in ranked if row["family"] in others), None)
    return None if ours is None or theirs is None else ours - theirs


def best(rows: list[dict], column: str) -> float | None:
    """The best value of a column among the rows that reach what they were asked for."""
    values = [row[column] for row in rows if reaches(row, row["asked"]) and row.get(column) is not None]
    return (min if column in LESS_IS_BETTER else max)(values, default=None)


def ordered(rows: list[dict], metric: str = "psnr") -> list[tuple[int | None, dict]]:
    """(place or None, row): by asked speed-up, then the ranked rows from the best, then the others."""
    order = []
    for asked in sorted({row["asked"] for row in rows}, key=lambda asked: asked or 0):
        here = [row for row in rows if row["asked"] == asked]
        ranked = [
            pair
            for folder in dict.fromkeys(r["folder"] for r in here)
            for pair in standing(here, folder, asked, metric)
        ]
        order += ranked + [(None, row) for row in here if not any(row is other for _, other in ranked)]
    return order


def cell(row: dict, column: str) -> str:
    """A value as tables show it; what was not measured as a dash."""
    value = row.get(column)
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    if column == "nfe":
        return f"{value:g}" if value == int(value) else f"{value:.1f}"
    return f"{value:.{DIGITS.get(column, 2)}f}" + "×" * column.startswith("speedup")


def markdown(rows: list[dict], columns: list[str], metric: str = "psnr") -> str:
    """A table by asked speed-up, then metric; the best of a column at each speed-up is bold. place: by the metric."""

    def text(place, row, column):
        if column == "place":
            return str(place or MISSING)
        shown = cell(row, column).replace("|", "\\|").replace("\n", " ")
        comparable = reaches(row, row["asked"]) and row.get(column) is not None and not isinstance(row[column], str)
        peers = [other for other in rows if (other["folder"], other["asked"]) == (row["folder"], row["asked"])]
        return f"**{shown}**" if comparable and row[column] == best(peers, column) else shown

    lines = [[text(place, row, column) for column in columns] for place, row in ordered(rows, metric)]
    head = [[TITLES.get(column, column) for column in columns], ["---" if c == "label" else "--:" for c in columns]]
    return "\n".join("| " + " | ".join(line) + " |" for line in head + lines)
