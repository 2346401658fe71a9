"""What a report says of rows: grouped, compared, tabulated.

Rows share a table only when they share the prompts, the first seed and the uncached run's settings. How the page looks
is in page.py.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ertacache.evaluation.ranking import (
    FAMILIES,
    TITLES,
    best,
    cell,
    is_ours,
    margin,
    markdown,
    ordered,
    ranking,
    reaches,
    speedup,
)
from ertacache.evaluation.rows import Row, Source, check_row, read_source
from ertacache.utils.errors import UserError
from ertacache.utils.tables import MISSING, code, escaped
from ertacache.utils.words import counted

OWN_SETTINGS = (
    "steps",
    "threshold",
    "site",
    "shift",
    "sigmas",
    "value",
)  # what a method chooses; the rest is common to all
TABLE = ("label", "nfe", "speedup_flops", "speedup_latency", "speedup_end_to_end", "psnr", "psnr_p10")
TABLE += ("psnr_worst", "below_30db", "ssim", "exact_psnr", "prompt_accuracy", "place")
MORE = (
    "psnr_8bit",
    "lpips",
    "temporal_psnr",
    "latent_psnr",
    "latents_below_30db",
    "exact_ssim",
    "exact_latent_psnr",
    "clip_similarity",
    "clip_score",
    "peak_memory_mib",
)
RANKED_BY = ("psnr", "ssim", "exact_psnr")
HALF = 2  # the speed-up at which fewer steps say how hard a problem is


@dataclass
class Section:
    """The rows of one model folder and model."""

    folder: str
    model: str
    rows: list[Row] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)

    @property
    def uncached(self) -> Row | None:
        """The row of the uncached run; of several the one with the fewest nulls."""
        rows = [row for row in self.rows if row["method"] == "none"]
        return max(rows, key=lambda row: sum(value is not None for value in row.values()), default=None)

    @property
    def methods(self) -> list[Row]:
        """All rows but the uncached run's."""
        return [row for row in self.rows if row["method"] != "none"]

    @property
    def targets(self) -> list[float]:
        """The target speed-ups, ascending."""
        return sorted({row["asked"] for row in self.methods if row["asked"] is not None})

    @property
    def hardness(self) -> float | None:
        """Mean PSNR in dB that half of the uncached run's steps reach; lower is harder. None: not measured."""
        half = [row for row in self.methods if row["method"] == "fewer-steps" and row["asked"] == HALF]
        return half[0]["psnr"] if half else None


def sections(sources: list[Source]) -> list[Section]:
    """Group rows by model folder and model.

    Raises:
        UserError: Rows that may not share a table, or a row that comes twice.
    """
    groups: dict[tuple, Section] = {}
    for source in sources:
        for row in source.rows:
            section = groups.setdefault((row["folder"], row["model"]), Section(row["folder"], row["model"]))
            section.rows.append(row)
            if source not in section.sources:
                section.sources.append(source)
    for section in groups.values():
        check_comparable(section)
    return list(groups.values())


def comparable(row: Row) -> dict[str, Any]:
    """Return what rows must share to be compared: prompts, first seed, and the settings that no method chooses."""
    common = {name: value for name, value in row["settings"].items() if name not in OWN_SETTINGS}
    asked = {name: row.get(name) for name in ("captions", "prompts", "seed")}
    return {**asked, "T": round(row["nfe"] * row["speedup_nfe"]), **common}


def check_comparable(section: Section) -> None:
    first, seen = comparable(section.rows[0]), set()
    for row in section.rows:
        other = comparable(row)
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                values = f"{first.get(name)!r} and of {other.get(name)!r}"
                raise UserError(f"{section.folder}: rows of {name} {values} share no table: report them apart")
        key = (row["label"], row["asked"], json.dumps(row["settings"], sort_keys=True))
        if key in seen and row["method"] != "none":
            raise UserError(f"{section.folder}: {row['label']!r} asked for {row['asked']} comes twice: give it once")
        seen.add(key)


def curve(row: Row) -> str:
    """Return the name of the curve that a row is a point of: its method, and a threshold plan's cache site."""
    site = row["settings"].get("site")
    return row["method"] + (f" ({site})" if site else "")


def curves(section: Section) -> dict[str, list[Row]]:
    """Return each curve's points by speed-up: budget plans, threshold plans, other caches, fewer steps."""
    rows = sorted(section.methods, key=lambda row: (FAMILIES.index(row["family"]), curve(row), speedup(row)))
    return {name: [row for row in rows if curve(row) == name] for name in dict.fromkeys(map(curve, rows))}


def table(section: Section, target: float | None) -> dict[str, Any]:
    """Return the cells of the table at a target speed-up (None: rows that came from λ), the uncached run first."""
    rows = [row for row in section.methods if row["asked"] == target]
    shown = [section.uncached] * (section.uncached is not None) + rows
    columns = [*TABLE[:-1], *(name for name in MORE if any(r.get(name) is not None for r in rows)), TABLE[-1]]
    lines = []
    for place, row in [(None, row) for row in shown if row["method"] == "none"] + ordered(rows):
        marked = {name for name in columns if reaches(row, target) and row.get(name) is not None}
        marked = {name for name in marked - {"label"} if row[name] == best(rows, name)}
        cells = [{"text": cell(row, name), "best": name in marked} for name in columns[:-1]]
        lines.append({"row": row, "cells": cells, "place": place, "ours": is_ours(row), "why": why(row, place, target)})
    return {"asked": target, "titles": [TITLES[name] for name in columns], "lines": lines, "notes": notes(rows)}


def why(row: Row, place: int | None, target: float | None) -> str:
    """Return why a row has no place; nothing when it has one."""
    if row["method"] == "none":
        return "reference"
    if place is not None or target is None:
        return "" if place is not None else MISSING
    return "no PSNR" if reaches(row, target) else f"too slow: {speedup(row):.2f}×"


def notes(rows: Sequence[Row]) -> list[str]:
    """Return which columns have no value in any row or in some, and whether latency comes from several benches."""
    measured = {name: sum(row.get(name) is not None for row in rows) for name in (*TABLE[1:-1], *MORE)}
    none = [plain(name) for name, count in measured.items() if not count]
    some = [f"{plain(name)} ({count} of {len(rows)} rows)" for name, count in measured.items() if 0 < count < len(rows)]
    notes = [f"{MISSING} Not measured in any row: {', '.join(none)}."] if none else []
    notes += [f"{MISSING} Measured in part: {', '.join(some)}."] if some else []
    benches = dict.fromkeys(f"{row['machine']} at batch size {row['batch_size']}" for row in rows)
    return notes + [f"Latency comes from different benches: {'; '.join(benches)}."] * (len(benches) > 1)


def plain(column: str) -> str:
    """Return a column's title without its unit."""
    return TITLES[column].split(",")[0]


def verdicts(section: Section, target: float) -> list[dict[str, Any]]:
    """Return for each measured quality the first row, our best place, and the margin of our best budget plan."""
    verdicts = []
    for metric in RANKED_BY:
        ranked = ranking(section.rows, section.folder, target, metric)
        if ranked:
            first = [(row, cell(row, metric)) for place, row in ranked if place == 1]
            ours = next(((place, row) for place, row in ranked if is_ours(row)), None)
            shown = lead(section, target, metric)
            verdicts.append(
                {
                    "metric": metric,
                    "title": plain(metric),
                    "first": first,
                    "ours": ours,
                    "of": len(ranked),
                    "margin": shown,
                }
            )
    return verdicts


def lead(section: Section, target: float, metric: str, **others) -> str:
    """Return the margin of our best budget plan as text; others: families that it is compared with."""
    lead = margin(section.rows, section.folder, target, metric, **others)
    shown = MISSING if lead is None else f"{lead:+.2f} dB" if metric.endswith("psnr") else f"{lead:+.5f}"
    return shown.replace("-", "−")


def provenance(section: Section) -> list[dict[str, Any]]:
    """Return for each file what its rows of this section were measured with; values that differ side by side."""
    provenances = []
    for source in section.sources:
        rows = [row for row in source.rows if (row["folder"], row["model"]) == (section.folder, section.model)]
        facts = {"file": f"{source.name} ({counted(len(rows), 'row')}, SHA-256 {source.digest})"}
        facts |= {name: either(row[name] for row in rows) for name in ("machine", "date")}
        facts["libraries"] = either(listed(row["libraries"]) for row in rows)
        facts["prompts"] = either(row["prompts"] for row in rows)
        facts["seeds"] = either(f"{row['seed']} to {row['seed'] + row['prompts'] - 1}" for row in rows)
        facts["batch size"] = either(row["batch_size"] for row in rows)
        facts["uncached steps"] = either(comparable(row)["T"] for row in rows)
        facts["settings"] = listed({k: v for k, v in rows[0]["settings"].items() if k not in OWN_SETTINGS})
        provenances.append(facts)
    return provenances


def either(values: Iterable) -> str:
    """Return the different values, joined."""
    return "; ".join(dict.fromkeys(MISSING if value is None else str(value) for value in values))


def listed(values: Mapping[str, Any]) -> str:
    """Return names and values, joined."""
    return (
        ", ".join(f"{name} {value!r}" if value == "" else f"{name} {value}" for name, value in values.items())
        or MISSING
    )


def card_table(rows: str | Path | Sequence[Row]) -> str:
    """Return Markdown tables of measured quality for a plan's model card, one per model folder and model.

    Only what was measured becomes a number: a column without any value is left out, a single missing value is a dash.

    Args:
        rows: Of `scripts/evaluate.py --json`: the file's path, or a list.

    Raises:
        UserError: A row without a field, or rows that may not share a table.

    Example:
        >>> plan.push_to_hub("OWNER/flux-2x", results=card_table("rows.json"))
    """
    if isinstance(rows, str | Path):
        rows = read_source(Path(rows).expanduser()).rows
    for number, row in enumerate(rows, 1):
        check_row(row, f"row {number}")
    parts = []
    for section in sections([Source("rows", "", list(rows))]):
        columns = [*TABLE[:-1], *(name for name in MORE if any(row.get(name) is not None for row in section.rows))]
        facts = {name: fact for name, fact in provenance(section)[0].items() if name != "file"}
        where = ", ".join(f"{name} {escaped(str(fact))}" for name, fact in facts.items())
        text = f"Measured with `scripts/evaluate.py` on {escaped(section.folder)}, model {code(section.model)}"
        parts += [f"{text}, against the uncached run ({where}):", markdown(section.rows, columns)]
    return "\n\n".join(parts)
