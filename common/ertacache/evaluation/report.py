"""What a report says about rows of `scripts/evaluate.py` (docs/rows.md): read, checked, grouped, tabulated.

Rows are compared only when they share the prompts, the first seed and the uncached run's settings. How the page looks
is in `scripts/report/report.py` and `scripts/report/page/`.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ertacache.evaluation.ranking import (
    FAMILIES,
    MISSING,
    TITLES,
    best,
    cell,
    is_ours,
    margin,
    markdown,
    ordered,
    reaches,
    speedup,
    standing,
)
from ertacache.utils.errors import UserError

TEXTS = ("folder", "model", "method", "label", "family", "machine", "date")
NUMBERS = ("asked", "steps", "nfe", "prompts", "seed", "batch_size", "speedup_nfe", "speedup_flops", "speedup_latency")
NUMBERS += ("psnr", "ssim")
NEVER_NULL = ("steps", "nfe", "prompts", "seed", "speedup_nfe")
OWN_SETTINGS = ("steps", "threshold", "site", "shift", "value")  # what a method chooses; the rest is common to all
TABLE = ("label", "nfe", "speedup_flops", "speedup_latency", "speedup_end_to_end", "psnr", "ssim", "exact_psnr")
TABLE += ("prompt_accuracy", "place")
MORE = (
    "lpips",
    "temporal_psnr",
    "latent_psnr",
    "exact_ssim",
    "exact_latent_psnr",
    "clip_similarity",
    "clip_score",
    "peak_memory_mib",
)
RANKED_BY = ("psnr", "ssim", "exact_psnr")
MEDIA = {".png": "image/png", ".mp4": "video/mp4"}
REMEDY = "write it with scripts/evaluate.py --json"


@dataclass(frozen=True)
class Source:
    """A file of rows; digest: SHA-256 of its bytes. Paths of samples are resolved against its folder."""

    name: str
    digest: str
    rows: list[dict]


@dataclass
class Section:
    """The rows of one model folder and model. uncached: of its uncached runs the row with the fewest nulls."""

    folder: str
    model: str
    rows: list[dict] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)

    @property
    def uncached(self) -> dict | None:
        rows = [row for row in self.rows if row["method"] == "none"]
        return max(rows, key=lambda row: sum(value is not None for value in row.values()), default=None)

    @property
    def methods(self) -> list[dict]:
        return [row for row in self.rows if row["method"] != "none"]

    @property
    def asked(self) -> list[float]:
        return sorted({row["asked"] for row in self.methods if row["asked"] is not None})


def read_source(path: Path) -> Source:
    """A file of rows, each checked field by field."""
    try:
        data = path.read_bytes()
        rows = json.loads(data)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give a file of rows, {REMEDY}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): {REMEDY}") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} holds no list of rows: {REMEDY}")
    for number, row in enumerate(rows, 1):
        check_row(row, f"row {number} of {path}")
        row["samples"] = [sample_path(path.parent / name) for name in row.get("samples") or ()]
    return Source(path.name, hashlib.sha256(data).hexdigest(), rows)


def check_row(row, where: str) -> None:
    """A UserError names the first field that the contract asks for and the row has not, or has wrong."""

    def refuse(name, expected):
        value = "is missing" if name not in row else f"is {row[name]!r}"
        raise UserError(f"{where}: {name!r} {value}, not {expected}: {REMEDY}")

    if not isinstance(row, dict):
        raise UserError(f"{where} is {row!r}, no object with the fields of docs/rows.md: {REMEDY}")
    for name in TEXTS:
        if not isinstance(row.get(name), str):
            refuse(name, "a text")
    if row["family"] not in FAMILIES or (row["family"] == "none") != (row["method"] == "none"):
        refuse("family", f"the one of {', '.join(FAMILIES)} that fits method {row['method']!r}")
    for name in (*NUMBERS, *TITLES.keys() & row.keys() - {"label"}):
        value = row.get(name)
        if name not in row or not (is_number(value) or (value is None and name not in NEVER_NULL)):
            refuse(name, "a finite number" + " or null" * (name not in NEVER_NULL))
    for name in ("settings", "libraries"):
        if not isinstance(row.get(name), dict):
            refuse(name, "an object")
    for name in ("samples", "sample_prompts"):
        if not isinstance(row.get(name) or [], list) or not all(isinstance(text, str) for text in row.get(name) or []):
            refuse(name, "a list of texts or null")
    if len(row.get("samples") or ()) != len(row.get("sample_prompts") or ()):
        refuse("sample_prompts", "one prompt for each of the samples")
    check_timeline(row.get("timeline"), where)


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_timeline(timeline, where: str) -> None:
    if timeline is None:
        return
    try:
        sigmas, computed, error = (timeline[name] for name in ("sigmas", "computed", "error"))
        fits = all(map(is_number, [*sigmas, *computed, *(error or ())])) and error != []
        fits = fits and len(sigmas) > max(computed) >= min(computed) >= 0 and len(error or computed) == len(computed)
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise UserError(f"{where}: 'timeline' needs sigmas, computed indices into it and an error for each: {REMEDY}")


def sample_path(path: Path) -> Path:
    if path.suffix not in MEDIA:
        raise UserError(f"sample {path} is neither .png nor .mp4: {REMEDY} and --samples N")
    if not path.is_file():
        raise UserError(f"sample {path} is missing: keep the samples beside the file of rows")
    return path


def sections(sources: list[Source]) -> list[Section]:
    """One for each model folder and model. Rows that may not share a table, and a row that comes twice, are refused."""
    found: dict[tuple, Section] = {}
    for source in sources:
        for row in source.rows:
            section = found.setdefault((row["folder"], row["model"]), Section(row["folder"], row["model"]))
            section.rows.append(row)
            if source not in section.sources:
                section.sources.append(source)
    for section in found.values():
        check_comparable(section)
    return list(found.values())


def conditions(row: dict) -> dict:
    """What rows must share to be compared: prompts, first seed, and the settings that no method chooses."""
    common = {name: value for name, value in row["settings"].items() if name not in OWN_SETTINGS}
    return {"prompts": row["prompts"], "seed": row["seed"], "T": round(row["nfe"] * row["speedup_nfe"]), **common}


def check_comparable(section: Section) -> None:
    first, seen = conditions(section.rows[0]), set()
    for row in section.rows:
        other = conditions(row)
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                values = f"{first.get(name)!r} and of {other.get(name)!r}"
                raise UserError(f"{section.folder}: rows of {name} {values} share no table: report them apart")
        key = (row["label"], row["asked"], json.dumps(row["settings"], sort_keys=True))
        if key in seen and row["method"] != "none":
            raise UserError(f"{section.folder}: {row['label']!r} asked for {row['asked']} comes twice: give it once")
        seen.add(key)


def curve(row: dict) -> str:
    """Name of the curve that a row is a point of: its method, and where a threshold plan caches."""
    site = row["settings"].get("site")
    return row["method"] + (f" ({site})" if site else "")


def curves(section: Section) -> dict[str, list[dict]]:
    """The points of each curve by speed-up; budget plans first, then threshold plans, peers, fewer steps."""
    rows = sorted(section.methods, key=lambda row: (FAMILIES.index(row["family"]), curve(row), speedup(row)))
    return {name: [row for row in rows if curve(row) == name] for name in dict.fromkeys(map(curve, rows))}


def table(section: Section, asked: float | None) -> dict:
    """Cells of the table at an asked speed-up (None: rows that came from λ), the uncached run first."""
    rows = [row for row in section.methods if row["asked"] == asked]
    shown = [section.uncached] * (section.uncached is not None) + rows
    columns = [*TABLE[:-1], *(name for name in MORE if any(r.get(name) is not None for r in rows)), TABLE[-1]]
    lines = []
    for place, row in [(None, row) for row in shown if row["method"] == "none"] + ordered(rows):
        marked = {name for name in columns if reaches(row, asked) and row.get(name) is not None}
        marked = {name for name in marked - {"label"} if row[name] == best(rows, name)}
        cells = [{"text": cell(row, name), "best": name in marked} for name in columns[:-1]]
        lines.append({"row": row, "cells": cells, "place": place, "ours": is_ours(row), "why": why(row, place, asked)})
    return {"asked": asked, "titles": [TITLES[name] for name in columns], "lines": lines, "notes": notes(rows)}


def why(row: dict, place: int | None, asked: float | None) -> str:
    """Why a row has no place; nothing when it has one."""
    if row["method"] == "none":
        return "reference"
    if place is not None or asked is None:
        return "" if place is not None else MISSING
    return "no PSNR" if reaches(row, asked) else f"too slow: {speedup(row):.2f}×"


def notes(rows: list[dict]) -> list[str]:
    """Which columns have no value in any row, which in some, and whether latency comes from more than one bench."""
    measured = {name: sum(row.get(name) is not None for row in rows) for name in (*TABLE[1:-1], *MORE)}
    none = [plain(name) for name, count in measured.items() if not count]
    some = [f"{plain(name)} ({count} of {len(rows)} rows)" for name, count in measured.items() if 0 < count < len(rows)]
    found = [f"{MISSING} Not measured in any row: {', '.join(none)}."] if none else []
    found += [f"{MISSING} Measured in part: {', '.join(some)}."] if some else []
    benches = dict.fromkeys(f"{row['machine']} at batch size {row['batch_size']}" for row in rows)
    return found + [f"Latency comes from different benches: {'; '.join(benches)}."] * (len(benches) > 1)


def plain(column: str) -> str:
    """A column's title without its unit."""
    return TITLES[column].split(",")[0]


def verdicts(section: Section, asked: float) -> list[dict]:
    """For each quality that was measured: who is first, our best place, and the margin of our best budget plan."""
    found = []
    for metric in RANKED_BY:
        ranked = standing(section.rows, section.folder, asked, metric)
        if ranked:
            first = [(row, cell(row, metric)) for place, row in ranked if place == 1]
            ours = next(((place, row) for place, row in ranked if is_ours(row)), None)
            shown = lead(section, asked, metric)
            found.append(
                {
                    "metric": metric,
                    "title": plain(metric),
                    "first": first,
                    "ours": ours,
                    "of": len(ranked),
                    "margin": shown,
                }
            )
    return found


def lead(section: Section, asked: float, metric: str, **others) -> str:
    """The margin of our best budget plan, in words."""
    found = margin(section.rows, section.folder, asked, metric, **others)
    shown = MISSING if found is None else f"{found:+.2f} dB" if metric.endswith("psnr") else f"{found:+.5f}"
    return shown.replace("-", "−")


def provenance(section: Section) -> list[dict]:
    """For each file, what all its rows of this section were measured with; values that differ side by side."""
    found = []
    for source in section.sources:
        rows = [row for row in source.rows if (row["folder"], row["model"]) == (section.folder, section.model)]
        facts = {"file": f"{source.name} ({len(rows)} rows, SHA-256 {source.digest})"}
        facts |= {name: either(row[name] for row in rows) for name in ("machine", "date")}
        facts["libraries"] = either(listed(row["libraries"]) for row in rows)
        facts["prompts"] = either(row["prompts"] for row in rows)
        facts["seeds"] = either(f"{row['seed']} to {row['seed'] + row['prompts'] - 1}" for row in rows)
        facts["batch size"] = either(row["batch_size"] for row in rows)
        facts["uncached steps"] = either(conditions(row)["T"] for row in rows)
        facts["settings"] = listed({k: v for k, v in rows[0]["settings"].items() if k not in OWN_SETTINGS})
        found.append(facts)
    return found


def either(values) -> str:
    return "; ".join(dict.fromkeys(MISSING if value is None else str(value) for value in values))


def listed(values: dict) -> str:
    return (
        ", ".join(f"{name} {value!r}" if value == "" else f"{name} {value}" for name, value in values.items())
        or MISSING
    )


def card_table(rows: str | Path | Sequence[Mapping[str, Any]]) -> str:
    """Markdown tables of measured quality for a plan's model card, one for each model folder and model.

    rows: of `scripts/evaluate.py --json` (common/docs/rows.md), the file's path or a list. Only what was measured
    becomes a number: a column without any value is left out, a single missing value is a dash.
    """
    if isinstance(rows, str | Path):
        rows = read_source(Path(rows).expanduser()).rows
    for number, row in enumerate(rows, 1):
        check_row(row, f"row {number}")
    parts = []
    for section in sections([Source("rows", "", list(rows))]):
        columns = [*TABLE[:-1], *(name for name in MORE if any(row.get(name) is not None for row in section.rows))]
        facts = {name: fact for name, fact in provenance(section)[0].items() if name != "file"}
        where = ", ".join(f"{name} {fact}" for name, fact in facts.items())
        text = f"Measured with `scripts/evaluate.py` on {section.folder}, model `{section.model}`"
        parts += [f"{text}, against the uncached run ({where}):", markdown(section.rows, columns)]
    return "\n\n".join(parts)
