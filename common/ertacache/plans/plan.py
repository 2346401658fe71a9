"""Plans: what calibration learned, as data. A plan refuses what it was not made for.

On disk a plan is two files: `NAME.json` for people and `NAME.safetensors` for the arrays, held together by a
checksum over both. common/docs/plan-format.md describes the fields.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors.numpy import load, save

from ertacache.plans.hub import HubMixin
from ertacache.plans.requirements import Conditions, differences
from ertacache.utils.errors import PlanError
from ertacache.utils.files import write_atomically

FORMAT, VERSION = "ertacache-plan", 1
SITES = ("output", "blocks")
KINDS = ("threshold", "budget")
TARGETS = ("reference", "exact")


class Plan(HubMixin):
    """What both kinds of plan share: files, checksum, and the refusal of runs that a plan was not made for.

    A subclass is a frozen dataclass with `conditions`, `provenance`, and a field for every name in FIELDS (JSON) and
    ARRAYS (float64, in the safetensors file).
    """

    kind: ClassVar[str]
    FIELDS: ClassVar[tuple[str, ...]]
    ARRAYS: ClassVar[tuple[str, ...]]
    OPTIONAL_ARRAYS: ClassVar[tuple[str, ...]] = ()  # which a file may lack
    DERIVED: ClassVar[tuple[str, ...]] = ()  # written for people and not read

    @property
    def steps(self) -> int:
        """T, the number of steps of the uncached run."""
        return self.conditions.steps

    def check(self, run: Conditions, remedy: str) -> None:
        """Refuse a run that the plan was not made for; warn once when only settings differ.

        remedy: the command that makes the right plan, for the message of the PlanError.
        """
        made = self.conditions
        if made.steps != run.steps:
            raise PlanError(f"the plan is for {made.steps} steps, the run has {run.steps}: {remedy}")
        for what in ("model", "scheduler"):
            mine, other = getattr(made, what), getattr(run, what)
            keys = differences(mine, other)
            if keys:
                pairs = ", ".join(f"{key} {mine[key]} ≠ {other[key]}" for key in keys[:3])
                raise PlanError(f"the plan is for another {what} than this pipeline's ({pairs}): {remedy}")
        keys = differences(made.settings, run.settings)
        if keys:
            pairs = ", ".join(f"{key} {made.settings[key]}, now {run.settings[key]}" for key in keys)
            warnings.warn(f"the plan was calibrated at {pairs}; quality may be lower. {remedy}", stacklevel=2)

    def save(self, path: str | Path) -> Path:
        """Write `path` (….json) and the arrays beside it. Returns the path of the JSON file."""
        path = _json_path(path)
        present = [name for name in self.OPTIONAL_ARRAYS if getattr(self, name)]
        tensors = save({name: np.array(getattr(self, name), np.float64) for name in (*self.ARRAYS, *present)})
        fields = {"format": FORMAT, "version": VERSION, "kind": self.kind, "steps": self.steps}
        fields |= {name: getattr(self, name) for name in (*self.DERIVED, *self.FIELDS)}
        fields |= {name: getattr(self.conditions, name) for name in ("model", "scheduler", "settings")}
        fields = json.loads(json.dumps({**fields, "provenance": self.provenance}))
        fields["checksum"] = _checksum(fields, tensors)
        write_atomically(path.with_suffix(".safetensors"), tensors)
        write_atomically(path, (json.dumps(fields, indent=1, ensure_ascii=False) + "\n").encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan, of this kind (`Plan.load`: of any); a damaged, edited or newer file is a PlanError."""

        path = _json_path(path)
        fields, arrays = _read(path)
        kinds = {kind.kind: kind for kind in Plan.__subclasses__()}
        found = kinds.get(fields["kind"])
        if found is None or not issubclass(found, cls):
            raise PlanError(f"{path} is a {fields['kind']} plan, a {cls.kind} plan is needed")
        conditions = Conditions(fields["steps"], fields["model"], fields["scheduler"], fields["settings"])
        values = {name: as_tuples(fields[name]) for name in found.FIELDS}
        present = [name for name in found.OPTIONAL_ARRAYS if name in arrays]
        values |= {name: as_tuples(arrays[name].tolist()) for name in (*found.ARRAYS, *present)}
        return found(conditions, provenance=fields["provenance"], **values)


def as_tuples(value):
    """Nested lists as nested tuples."""
    return tuple(as_tuples(v) for v in value) if isinstance(value, list) else value


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The checked fields and arrays of a plan's two files."""
    again = f"copy it again or calibrate anew (delete {path} first)"
    try:
        fields = json.loads(path.read_text("utf-8"))
        tensors = path.with_suffix(".safetensors").read_bytes()
        arrays = load(tensors)
    except FileNotFoundError as error:
        raise PlanError(f"no plan file {error.filename}: check the path, or calibrate one") from error
    except OSError as error:
        raise PlanError(f"cannot read plan {path} ({error.strerror})") from error
    except Exception as error:  # json and safetensors raise their own types for damaged input
        raise PlanError(f"plan {path} is truncated or damaged: {again}") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise PlanError(f"{path} is not an ERTACache plan")
    if fields.get("version") != VERSION or fields.get("kind") not in KINDS:
        found = f"{fields.get('kind')} plan of format version {fields.get('version')}"
        raise PlanError(
            f"{path} is a {found}; this release reads {' and '.join(KINDS)} plans of version {VERSION}: upgrade"
        )
    if fields.pop("checksum", None) != _checksum(fields, tensors):
        raise PlanError(f"plan {path} was edited or damaged (its checksum does not match): {again}")
    return fields, arrays


def _json_path(path: str | Path) -> Path:
    path = Path(path)
    return path.with_suffix(".json") if path.suffix == ".safetensors" else path


def _checksum(fields: Mapping[str, Any], tensors: bytes) -> str:
    canonical = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode() + tensors).hexdigest()
