"""The files of `ertacache evaluate MODEL`: a report, and a JSON file without personal paths that can be sent."""

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from ertacache.cli.calls import Calls
from ertacache.cli.request import Request
from ertacache.evaluation.page import missing_packages, page, tables
from ertacache.evaluation.report import sections
from ertacache.evaluation.rows import Source
from ertacache.pipelines.enable import originals
from ertacache.plans.requirements import Requirements
from ertacache.utils.errors import UserError
from ertacache.utils.files import write_atomically
from ertacache.utils.provenance import fingerprint, library_versions, machine

SCHEMA, KIND = 1, "ertacache evaluation"
JSON, HTML, MARKDOWN = "evaluation.json", "report.html", "report.md"
HOMES = re.compile(r"(?:/home|/Users|[A-Za-z]:\\Users)[/\\][^/\\\s'\"]+")


@dataclass(frozen=True)
class EvaluationFolder:
    """The folder of results.

    Attributes:
        path: It.
        request: What is evaluated.
    """

    path: Path
    request: Request

    @property
    def json(self) -> Path:
        return self.path / JSON

    def check(self) -> None:
        """Refuse a folder that holds files of others or another model's results.

        The results of an earlier evaluation of the same model are written over.
        """
        present = [path for path in (self.json, self.path / HTML, self.path / MARKDOWN) if path.exists()]
        if present:
            earlier = _read(self.json)
            if earlier.get("kind") != KIND:
                raise UserError(f"{present[0]} is there already, and of something else: give another --out")
            if earlier.get("model") != self.request.name:
                raise UserError(f"{self.json} is of {earlier.get('model')}: give another --out")


def document(calls: Calls, repeats: int, learned_on: Sequence[str], conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Return all of the JSON file but the rows; its fields are in common/docs/reference/rows.md.

    Args:
        calls: The pipeline and its prompts.
        repeats: Timed calls of each method.
        learned_on: Calibration prompts.
        conditions: Arguments of the call with its defaults, as a plan has recorded them.
    """
    request, pipe = calls.request, calls.pipe
    scheduler, denoisers = originals(pipe)["scheduler"], {k: v for k, v in originals(pipe).items() if k != "scheduler"}
    first = next(iter(denoisers.values()))
    facts = {
        "kind": KIND,
        "schema": SCHEMA,
        "model": request.name,
        "revision": request.commit,
        "weights": fingerprint(pipe),
        "pipeline": type(pipe).__name__,
        "denoisers": {name: type(part).__name__ for name, part in denoisers.items()},
        "scheduler": dict(Requirements.of_scheduler(scheduler, request.steps).scheduler),
        "dtype": str(first.dtype).removeprefix("torch."),
        "offload": request.offload,
        "machine": machine(pipe._execution_device),
        "libraries": library_versions(),
        "steps": request.steps,
        "settings": request.arguments,
        "conditions": conditions,
        "batch_size": request.batch_size,
        "repeats": repeats,
        "prompts": calls.prompts,
        "seeds": list(range(calls.seed, calls.seed + len(calls.prompts))),
        "calibration_prompts": list(learned_on),
        "date": date.today().isoformat(),
        "command": command_line(),
    }
    return without_paths(facts)


def command_line() -> str:
    """Return the command, with the last part of each path in the place of the path."""
    return shlex.join(["ertacache", *map(_last_part, sys.argv[1:])])


def _last_part(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    is_path = value and (path.is_absolute() or value.startswith(("~", "..")) or (path.exists() and "/" in value))
    return f"{flag}{equals}{path.name if is_path else value}"


def without_paths(value: Any) -> Any:
    """Return a JSON value with the home directory taken out of all texts."""
    if isinstance(value, Mapping):
        return {without_paths(name): without_paths(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(each) for each in value]
    if not isinstance(value, str):
        return value
    home = str(Path.home())
    return HOMES.sub("~", value.replace(home, "~") if len(home) > 1 else value)


def write_report(
    folder: EvaluationFolder, rows: list[dict], samples: list[list[Path]], prompts: Sequence[str], text: str
) -> Path:
    """Write the report, as HTML where the extra `report` is installed. Returns its path.

    Args:
        folder: Where.
        rows: Of the JSON file.
        samples: Images or videos of each row's first prompts.
        prompts: All of them.
        text: Of the JSON file.
    """
    title = f"ERTACache evaluated on {folder.request.name}"
    shown = [
        {**row, "samples": paths, "sample_prompts": list(prompts[: len(paths)])}
        for row, paths in zip(rows, samples, strict=True)
    ]
    source = Source(JSON, hashlib.sha256(text.encode()).hexdigest(), shown)
    grouped = sections([source])
    absent = missing_packages()
    if absent:
        path = folder.path / MARKDOWN
        write_atomically(path, f"# {title}\n\n{tables(grouped)}".encode())
        print(f"{', '.join(absent)} is not installed, so {path} has tables only: pip install 'ertacache[report]'")
    else:
        path = folder.path / HTML
        write_atomically(path, page(grouped, [source], title, "ertacache evaluate").encode())
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
