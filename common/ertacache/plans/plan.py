"""Plans as data: files, checksum, and the refusal of runs that a plan was not made for.

A plan on disk is two files: `NAME.json`, human-readable, and `NAME.safetensors` with the arrays, held together by a
checksum over both. common/docs/reference/plan-format.md describes the fields.
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
from ertacache.plans.requirements import Requirements, differences
from ertacache.utils.errors import PlanError
from ertacache.utils.files import write_atomically

FORMAT, VERSION = "ertacache-plan", 2


class Plan(HubMixin):
    """What both kinds of plan share.

    A subclass is a frozen dataclass with `requirements`, `provenance`, and a field for every name in FIELDS (JSON) and
    ARRAYS (float64, in the safetensors file).

    Attributes:
        kind: "threshold" or "budget", in the file.
        method: Name of the method in file names, tables and metrics.json.
        target: What the plan imitates: "reference", the uncached run, or "exact", the ODE's solution.
    """

    kind: ClassVar[str]
    method: ClassVar[str]
    FIELDS: ClassVar[tuple[str, ...]]
    ARRAYS: ClassVar[tuple[str, ...]]
    OPTIONAL_FIELDS: ClassVar[tuple[str, ...]] = ()
    OPTIONAL_ARRAYS: ClassVar[tuple[str, ...]] = ()  # which a file may lack
    DERIVED: ClassVar[Mapping[str, str]] = {}  # fields for readers of the file, by name: the attribute they show

    target: str = "reference"

    @property
    def steps(self) -> int:
        """T, the number of steps of the uncached run."""
        return self.requirements.steps

    @property
    def speedup(self) -> float:
        """T/N, the speed-up in model calls."""
        return self.steps / self.nfe

    @property
    def version(self) -> int:
        """The lowest version of the file format that can hold the plan."""
        return 1

    @property
    def has_drift(self) -> bool:
        """Whether the plan can tell how unlike its calibration a run is (drift.py)."""
        return False

    def check(self, run: Requirements, remedy: str) -> None:
        """Refuse a run that the plan was not made for; warn once when only settings differ.

        Args:
            run: Of the run.
            remedy: What makes the right plan, for the message.

        Raises:
            PlanError: Another number of steps, model or scheduler.
        """
        required = self.requirements
        if required.steps != run.steps:
            raise PlanError(f"the plan is for {required.steps} steps, the run has {run.steps}: {remedy}")
        for name in ("model", "scheduler"):
            mine, other = getattr(required, name), getattr(run, name)
            keys = differences(mine, other)
            if keys:
                pairs = ", ".join(f"{key} {mine[key]} ≠ {other[key]}" for key in keys[:3])
                raise PlanError(f"the plan is for another {name} than this pipeline's ({pairs}): {remedy}")
        keys = differences(required.settings, run.settings)
        if keys:
            pairs = ", ".join(f"{key} {required.settings[key]}, now {run.settings[key]}" for key in keys)
            warnings.warn(f"the plan was calibrated at {pairs}; quality may be lower. {remedy}", stacklevel=2)

    def save(self, path: str | Path) -> Path:
        """Write `path` (….json) and the arrays beside it.

        Returns:
            The path of the JSON file.

        Example:
            >>> plans[2].save("my-plan.json")
        """
        path = _json_path(path)
        present = [name for name in self.OPTIONAL_ARRAYS if getattr(self, name)]
        tensors = save({name: np.array(getattr(self, name), np.float64) for name in (*self.ARRAYS, *present)})
        fields = {"format": FORMAT, "version": self.version, "kind": self.kind, "steps": self.steps}
        fields |= {name: getattr(self, attribute) for name, attribute in self.DERIVED.items()}
        optional = [name for name in self.OPTIONAL_FIELDS if getattr(self, name)]
        fields |= {name: getattr(self, name) for name in (*self.FIELDS, *optional)}
        fields |= {name: getattr(self.requirements, name) for name in ("model", "scheduler", "settings")}
        fields = json.loads(json.dumps({**fields, "provenance": self.provenance}))
        fields["checksum"] = _checksum(fields, tensors)
        write_atomically(path.with_suffix(".safetensors"), tensors)
        write_atomically(path, (json.dumps(fields, indent=1, ensure_ascii=False) + "\n").encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan of this kind (`Plan.load`: of any kind).

        Raises:
            PlanError: A missing, damaged, edited or newer file, or a plan of the other kind.
        """
        path = _json_path(path)
        fields, arrays = _read(path)
        kind = _kinds()[fields["kind"]]
        if not issubclass(kind, cls):
            raise PlanError(f"{path} is a {fields['kind']} plan, a {cls.kind} plan is needed")
        requirements = Requirements(fields["steps"], fields["model"], fields["scheduler"], fields["settings"])
        optional = [name for name in kind.OPTIONAL_FIELDS if name in fields]
        values = {name: as_tuples(fields[name]) for name in (*kind.FIELDS, *optional)}
        present = [name for name in kind.OPTIONAL_ARRAYS if name in arrays]
        values |= {name: as_tuples(arrays[name].tolist()) for name in (*kind.ARRAYS, *present)}
        return kind(requirements, provenance=fields["provenance"], **values)


def as_tuples(value):
    """Return nested lists as nested tuples."""
    return tuple(as_tuples(v) for v in value) if isinstance(value, list) else value


def _kinds() -> dict[str, type[Plan]]:
    return {kind.kind: kind for kind in Plan.__subclasses__()}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the checked fields and arrays of a plan's two files."""
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
    if fields.get("version") not in range(1, VERSION + 1) or fields.get("kind") not in _kinds():
        title = f"{fields.get('kind')} plan of format version {fields.get('version')}"
        raise PlanError(
            f"{path} is a {title}; this release reads {' and '.join(_kinds())} plans up to version {VERSION}: upgrade"
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
