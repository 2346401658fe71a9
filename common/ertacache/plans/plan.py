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
from ertacache.plans.schema import (
    OBJECT,
    PROVENANCE,
    TEXTS,
    array_problem,
    depth_problem,
    is_too_large,
    value_problem,
)
from ertacache.utils.checks import steps_problem
from ertacache.utils.errors import PlanError, UserError, reason_of, shown
from ertacache.utils.files import check_regular, path_of, write_atomically

FORMAT, VERSION = "ertacache-plan", 2
HEAD = ("format", "version", "kind", "steps", "model", "scheduler", "settings", "provenance")  # fields of all kinds
LARGEST_FILES = {".json": 2**20, ".safetensors": 2**24}  # bytes


class Plan(HubMixin):
    """What both kinds of plan share.

    A subclass is a frozen dataclass with `requirements`, `provenance`, and a field for every name in FIELDS (JSON, with
    what it may hold) and ARRAYS (float64, in the safetensors file, with its shape): schema.py.

    Attributes:
        kind: "threshold" or "budget", in the file.
        method: Name of the method in file names, tables and metrics.json.
        target: What the plan imitates: "reference", the uncached run, or "exact", the ODE's solution.
    """

    kind: ClassVar[str]
    method: ClassVar[str]
    FIELDS: ClassVar[Mapping[str, Any]]
    ARRAYS: ClassVar[Mapping[str, str]]
    OPTIONAL_FIELDS: ClassVar[Mapping[str, Any]] = {}
    OPTIONAL_ARRAYS: ClassVar[Mapping[str, str]] = {}  # which a file may lack
    OLD_ARRAYS: ClassVar[tuple[str, ...]] = ()  # of earlier releases, not read
    DERIVED: ClassVar[Mapping[str, str]] = {}  # fields for readers of the file, by name: the attribute they show
    LEAST_STEPS: ClassVar[int] = 2

    target: str = "reference"

    def __post_init__(self):
        problem = self._problem_of_fields() or self._problem_of_arrays() or self._problem()
        if problem:
            raise PlanError(f"not a valid plan: {problem}")

    def _problem_of_fields(self) -> str | None:
        """Return what is wrong with the kinds of values."""
        required = self.requirements
        values = [("model", required.model, OBJECT), ("scheduler", required.scheduler, OBJECT)]
        values += [("settings", required.settings, OBJECT), ("provenance", self.provenance, PROVENANCE)]
        values += [("the plan", [required.model, required.scheduler, required.settings, self.provenance], TEXTS)]
        kinds = {**self.FIELDS, **self.OPTIONAL_FIELDS}
        values += [(name, getattr(self, name), kind) for name, kind in kinds.items()]
        return next(
            (problem for value in values if (problem := value_problem(*value))),
            steps_problem(required.steps, self.LEAST_STEPS),
        )

    def _problem_of_arrays(self) -> str | None:
        """Return what is wrong with shapes and numbers."""
        sizes = self.sizes()
        for name, shape in {**self.ARRAYS, **self.OPTIONAL_ARRAYS}.items():
            value = getattr(self, name)
            if len(value) or name in self.ARRAYS:
                problem = array_problem(name, value, shape, sizes)
                if problem:
                    return problem
        return None

    def _problem(self) -> str | None:
        """Return what of the plan does not fit together; subclasses say what has to."""
        return None

    def sizes(self) -> dict[str, int]:
        """Return the sizes of arrays that the fields tell, by letter."""
        return {"T": self.steps}

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
        if path.suffix != ".json":
            raise UserError(f"path = {shown(str(path))}: give a name that ends with .json")
        check_regular(path)
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
        problem = kind._problem_of_names(fields, arrays)
        if problem:
            raise PlanError(f"{path} is not a valid plan: {problem}")
        requirements = Requirements(fields["steps"], fields["model"], fields["scheduler"], fields["settings"])
        values = {name: as_tuples(fields[name]) for name in (*kind.FIELDS, *kind.OPTIONAL_FIELDS) if name in fields}
        values |= {name: as_tuples(array.tolist()) for name, array in arrays.items() if name not in kind.OLD_ARRAYS}
        try:
            return kind(requirements, provenance=fields["provenance"], **values)
        except PlanError as error:
            raise PlanError(f"{path} is {error}") from None

    @classmethod
    def _problem_of_names(cls, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str | None:
        """Return which field or array of a file is missing, or unknown, or no array of a plan."""
        for given, needed, optional in (
            (fields, (*HEAD, *cls.FIELDS), (*cls.OPTIONAL_FIELDS, *cls.DERIVED)),
            (arrays, cls.ARRAYS, (*cls.OPTIONAL_ARRAYS, *cls.OLD_ARRAYS)),
        ):
            for name in needed:
                if name not in given:
                    return f"it has no {name}"
            for name in given:
                if name not in (*needed, *optional):
                    return f"it has an unknown {shown(name)}"
        for name, array in arrays.items():
            if array.dtype != np.float64 or is_too_large(array.shape):
                return f"{name} is {array.dtype} {shown(array.shape)}, must be float64 and not too large"
        return None


def as_tuples(value):
    """Return nested lists as nested tuples."""
    return tuple(as_tuples(v) for v in value) if isinstance(value, list) else value


def _kinds() -> dict[str, type[Plan]]:
    return {kind.kind: kind for kind in Plan.__subclasses__()}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the checked fields and arrays of a plan's two files."""
    again = "copy it again, or calibrate another"
    texts = {suffix: _bytes(path.with_suffix(suffix), size) for suffix, size in LARGEST_FILES.items()}
    try:
        fields, tensors = json.loads(texts[".json"].decode()), texts[".safetensors"]
        arrays = load(tensors)
    except Exception as error:  # json and safetensors raise their own types for damaged input
        raise PlanError(f"plan {path} is truncated or damaged: {again}") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise PlanError(f"{path} is not an ERTACache plan")
    version, kind = fields.get("version"), fields.get("kind")
    if type(version) is not int or not 1 <= version <= VERSION or not isinstance(kind, str) or kind not in _kinds():
        known = f"this release reads {' and '.join(_kinds())} plans up to version {VERSION}: upgrade"
        raise PlanError(f"{path} is a {shown(kind)} plan of format version {shown(version)}; {known}")
    problem = depth_problem(fields)
    if problem:
        raise PlanError(f"{path} is not a valid plan: {problem}")
    if fields.pop("checksum", None) != _checksum(fields, tensors):
        raise PlanError(f"plan {path} was edited or damaged (its checksum does not match): {again}")
    return fields, arrays


def _bytes(path: Path, largest: int) -> bytes:
    """Return the content of a plan's file, which is not read if it is too large."""
    try:
        if path.exists() and not path.is_file():
            raise PlanError(f"{path} is no file: check the path")
        with open(path, "rb") as file:
            content = file.read(largest + 1)
    except FileNotFoundError as error:
        raise PlanError(f"no plan file {error.filename}: check the path, or calibrate one") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise PlanError(f"cannot read plan {path} ({reason_of(error)}): check the path") from error
    if len(content) > largest:
        raise PlanError(f"{path} is larger than a plan's {largest / 2**20:.0f} MiB: check the path")
    return content


def _json_path(path: str | Path) -> Path:
    path = path_of(path, "path")
    if not path.name:
        raise PlanError(f"{str(path)!r} names no file: give the path of a plan, like plan.json")
    return path.with_suffix(".json") if path.suffix == ".safetensors" else path


def _checksum(fields: Mapping[str, Any], tensors: bytes) -> str:
    canonical = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode(errors="surrogatepass") + tensors).hexdigest()
