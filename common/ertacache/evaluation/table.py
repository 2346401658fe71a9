"""Rows as Markdown tables: one line per row, or one per speed-up with a column for each method."""

from collections.abc import Callable, Sequence
from datetime import date

from ertacache.evaluation.ranking import cell, reaches, speedup
from ertacache.evaluation.rows import Row
from ertacache.utils.provenance import measured_with
from ertacache.utils.tables import MISSING, escaped, markdown
from ertacache.utils.words import counted

Text = Callable[[Row], str]


def _field(name: str) -> Text:
    return lambda row: cell(row, name)


def percent(share: float | None) -> str:
    """Return a share, "12 %"."""
    return MISSING if share is None else f"{100 * share:.0f} %"


def tail(row: Row) -> str:
    """Return mean, 10th percentile and worst of the PSNR."""
    if row["psnr"] is None:
        return MISSING
    return " / ".join(f"{row[name]:.1f}" for name in ("psnr", "psnr_p10", "psnr_worst"))


def _latents(row: Row) -> str:
    if row["latent_psnr"] is None:
        return MISSING
    return f"{cell(row, 'latent_psnr')} ({percent(row['latents_below_30db'])})"


COLUMNS: tuple[tuple[str, str, Text], ...] = (  # title, the field that makes it worth showing, cell
    ("method", "label", lambda row: "uncached" if row["method"] == "none" else escaped(row["label"])),
    ("asked", "asked", lambda row: MISSING if row["asked"] is None else f"{row['asked']:g}×"),
    ("calls", "nfe", lambda row: f"{cell(row, 'nfe')} of {round(row['nfe'] * row['speedup_nfe'])}"),
    ("FLOPs", "speedup_flops", _field("speedup_flops")),
    ("latency", "speedup_latency", _field("speedup_latency")),
    ("end to end", "speedup_end_to_end", _field("speedup_end_to_end")),
    ("PSNR: mean / 10th percentile / worst, dB", "psnr", tail),
    ("below 30 dB", "below_30db", lambda row: percent(row["below_30db"])),
    ("latents, dB (below 30 dB)", "latent_psnr", _latents),
    ("SSIM", "ssim", _field("ssim")),
    ("LPIPS", "lpips", _field("lpips")),
    ("temporal PSNR, dB", "temporal_psnr", _field("temporal_psnr")),
    ("CLIP similarity", "clip_similarity", _field("clip_similarity")),
    ("PSNR to the solution, dB", "exact_psnr", _field("exact_psnr")),
    ("shown right", "prompt_accuracy", lambda row: percent(row["prompt_accuracy"])),
    ("memory, MiB", "peak_memory_mib", _field("peak_memory_mib")),
)
TITLES = {
    "budget": "budget plan",
    "budget-exact": "budget plan, exact target",
    "ertacache": "threshold plan",
    "least-squares": "least squares per step",
    "fewer-steps": "fewer steps",
    "fewer-steps-tuned": "… on a tuned grid",
    "fewer-steps-ab2": "Adams–Bashforth 2",
    "taylorseer": "TaylorSeer",
    "teacache": "TeaCache",
    "first-block": "first block",
    "easycache": "EasyCache",
    "oss": "OSS, first order",
    "oss-solver": "OSS, model's solver",
    "lemica": "LeMiCa",
    "dpcache": "DPCache",
    "budcache": "BudCache, one prompt",
    "budcache: all prompts": "BudCache, all prompts",
    "spectrum": "Spectrum",
    "spectrum-blend": "Spectrum, blend",
    "neuralsolver": "NeuralSolver",
}


def title_of(row: Row) -> str:
    """Return what a method is called in a table."""
    return escaped(TITLES.get(row["method"], row["method"]))


def one_line_each(rows: Sequence[Row]) -> str:
    """Return a table with one line per row; columns without a value in any row are left out."""
    shown = [(title, text) for title, name, text in COLUMNS if any(row[name] is not None for row in rows)]
    return markdown([title for title, _ in shown], [[text(row) for _, text in shown] for row in rows])


def by_speedup(rows: Sequence[Row], text: Text | None = None) -> str:
    """Return a table with one line per target speed-up (of each model folder and sort of captions).

    Args:
        rows: Of `--speedups`.
        text: Of a cell; default: PSNR, mean / 10th percentile, and the share of latents below 30 dB.

    Returns:
        A column per method. The best mean of a line is bold. A method that does not come within a tenth of the
        target speed-up shows in FLOPs what it reaches.
    """
    rows = [row for row in rows if row["method"] != "none"]
    methods = list(dict.fromkeys(map(column_of, rows)))
    lines: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row["folder"], row["captions"], row["asked"]), {})[column_of(row)] = row
    shared = [len({key[n] for key in lines}) == 1 for n in range(2)]
    table = []
    for (folder, captions, asked), found in lines.items():
        names = (escaped(folder.removeprefix("ERTACache4")), escaped(str(captions)))
        head = [name for name, same in zip(names, shared, strict=True) if not same]
        ranked = [row["psnr"] for row in found.values() if reaches(row, asked) and row["psnr"] is not None]
        cells = []
        for method in methods:
            row = found.get(method)
            shown = MISSING if row is None else (text or mean_and_tail)(row)
            if row is not None and not reaches(row, asked):
                shown = f"{MISSING} ({speedup(row):.2f}×)"
            cells.append(f"**{shown}**" if row is not None and ranked and row["psnr"] == max(ranked) else shown)
        table.append([*head, f"{asked:g}×", *cells])
    head = ["demo"] * (not shared[0]) + ["captions"] * (not shared[1])
    return markdown([*head, "speed-up", *methods], table)


def column_of(row: Row) -> str:
    """Return the title of a method's column; a threshold plan's cache site belongs to it."""
    site = row["settings"].get("site")
    return title_of(row) + (f", {escaped(site)}" if site else "")


def mean_and_tail(row: Row) -> str:
    if row["psnr"] is None:
        return MISSING
    return f"{row['psnr']:.1f} / {row['psnr_p10']:.1f} / {percent(row['latents_below_30db'])}"


def latency(row: Row) -> str:
    """Return the measured speed-up of the loop, and that in FLOPs."""
    return f"{cell(row, 'speedup_latency')} of {speedup(row):.2f}×"


def facts_of(rows: Sequence[Row]) -> str:
    """Return the line below a table of rows."""
    counts = dict.fromkeys(str(row["prompts"]) for row in rows)
    return facts(counted(" or ".join(counts), "prompt"), day=max(row["date"] for row in rows))


def facts(*what: str, day: str | None = None) -> str:
    """Return the line below a table: on what, with what and when it was measured; by default today."""
    return f"*{'; '.join([*what, measured_with(), escaped(day or date.today().isoformat())])}*"
