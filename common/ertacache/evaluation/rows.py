"""Rows of `scripts/evaluate.py`: one method at one setting on one model folder (common/docs/reference/rows.md)."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypedDict

from ertacache.evaluation.ranking import FAMILIES, TITLES
from ertacache.utils.errors import UserError, shown


class Timeline(TypedDict):
    """Steps of a plan: sigmas of its grid [T+1], computed indices into it, and the latents' relative error at each."""

    sigmas: list[float]
    computed: list[int]
    error: list[float] | None


class Row(TypedDict, total=False):
    """One measured row. A value that was not measured is None.

    Names and units are explained in common/docs/reference/rows.md; JSON files keep them.
    """

    folder: str
    model: str
    method: str
    label: str
    family: str
    asked: float | None  # target speed-up
    settings: dict[str, Any]
    steps: int
    nfe: float
    prompts: int
    captions: str | None  # "full" or "open", of the demo's grammar
    seed: int
    batch_size: int
    flops: float | None
    speedup_flops: float | None
    speedup_nfe: float
    latency_s: float | None
    speedup_latency: float | None
    end_to_end_s: float | None
    speedup_end_to_end: float | None
    psnr: float | None
    psnr_p10: float | None
    psnr_worst: float | None
    below_30db: float | None
    psnr_8bit: float | None
    ssim: float | None
    lpips: float | None
    temporal_psnr: float | None
    latent_psnr: float | None
    latents_below_30db: float | None
    clip_similarity: float | None
    clip_score: float | None
    exact_psnr: float | None
    exact_ssim: float | None
    exact_latent_psnr: float | None
    prompt_accuracy: float | None
    peak_memory_mib: float | None
    plan: str | None
    timeline: Timeline | None
    samples: list[str] | None
    sample_prompts: list[str] | None
    machine: str
    libraries: dict[str, str]
    date: str


LATENCY = ("latency_s", "speedup_latency", "end_to_end_s", "speedup_end_to_end")
TEXTS = ("folder", "model", "method", "label", "family", "machine", "date")
NUMBERS = (
    *("asked", "steps", "nfe", "prompts", "seed", "batch_size"),
    *("speedup_nfe", "speedup_flops", "speedup_latency", "psnr", "ssim"),
)
NEVER_NULL = ("steps", "nfe", "prompts", "seed", "speedup_nfe")
MEDIA = {".png": "image/png", ".mp4": "video/mp4"}
REMEDY = "write it with scripts/evaluate.py --json"


@dataclass(frozen=True)
class Source:
    """A file of rows.

    Attributes:
        name: Of the file.
        digest: SHA-256 of its bytes.
        rows: With paths of samples resolved against the file's folder.
    """

    name: str
    digest: str
    rows: list[Row]


def read_source(path: Path) -> Source:
    """Read a file of rows and check it field by field.

    Raises:
        UserError: An unreadable file, or a row without a field; the message names the first one.
    """
    try:
        data = path.read_bytes()
        rows = json.loads(data)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give a file of rows, {REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}): {REMEDY}") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} holds no list of rows: {REMEDY}")
    for number, row in enumerate(rows, 1):
        check_row(row, f"row {number} of {path}")
        row["samples"] = [sample_path(path.parent, name) for name in row.get("samples") or ()]
    return Source(path.name, hashlib.sha256(data).hexdigest(), rows)


def check_row(row: Any, where: str) -> None:
    """Refuse a row that lacks a field, or has a wrong value; `where` names the row."""

    def refuse(name: str, expected: str) -> NoReturn:
        value = "is missing" if name not in row else f"is {row[name]!r}"
        raise UserError(f"{where}: {name!r} {value}, not {expected}: {REMEDY}")

    if not isinstance(row, dict):
        raise UserError(f"{where} is {row!r}, no object with the fields of docs/reference/rows.md: {REMEDY}")
    for name in TEXTS:
        if not isinstance(row.get(name), str):
            refuse(name, "a text")
    if row["family"] not in FAMILIES or (row["family"] == "none") != (row["method"] == "none"):
        refuse("family", f"the one of {', '.join(FAMILIES)} that fits method {row['method']!r}")
    for name in (*NUMBERS, *TITLES.keys() & row.keys() - {"label"}):
        value = row.get(name)
        if name not in row or not (_is_number(value) or (value is None and name not in NEVER_NULL)):
            refuse(name, "a finite number" + " or null" * (name not in NEVER_NULL))
    for name in ("settings", "libraries"):
        if not isinstance(row.get(name), dict):
            refuse(name, "an object")
    for name in ("samples", "sample_prompts"):
        if not isinstance(row.get(name) or [], list) or not all(isinstance(text, str) for text in row.get(name) or []):
            refuse(name, "a list of texts or null")
    if len(row.get("samples") or ()) != len(row.get("sample_prompts") or ()):
        refuse("sample_prompts", "one prompt for each of the samples")
    _check_timeline(row.get("timeline"), where)


def sample_path(folder: Path, name: str) -> Path:
    """Return the path of a sample, which must be there, within the folder of the rows: they may be a stranger's."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"sample {shown(name)} lies outside of {folder}: keep the samples next to the file of rows")
    if path.suffix not in MEDIA:
        raise UserError(f"sample {path} is neither .png nor .mp4: {REMEDY} and --samples N")
    if not path.is_file():
        raise UserError(f"sample {path} is missing: keep the samples next to the file of rows")
    return path


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_timeline(timeline: Any, where: str) -> None:
    if timeline is None:
        return
    try:
        sigmas, computed, error = (timeline[name] for name in ("sigmas", "computed", "error"))
        fits = all(map(_is_number, [*sigmas, *computed, *(error or ())])) and error != []
        fits = fits and len(sigmas) > max(computed) >= min(computed) >= 0 and len(error or computed) == len(computed)
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise UserError(f"{where}: 'timeline' needs sigmas, computed indices into it and an error for each: {REMEDY}")
