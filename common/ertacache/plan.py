"""Plans: what calibration learned, as data. A plan refuses what it was not made for.

On disk a plan is two files: `NAME.json` for people and `NAME.safetensors` for the arrays, held together by a
checksum over both. common/docs/plan-format.md describes the fields.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save

from ertacache.algorithm import PHI_DEFINITIONS, adjusted_sigmas
from ertacache.errors import PlanError
from ertacache.files import write_atomically

FORMAT, VERSION = "ertacache-plan", 1
SITES = ("output", "blocks")
ARRAYS = ("phi", "k", "b", "native_sigmas", "sigmas")


@dataclass(frozen=True)
class Conditions:
    """What a run is made under.

    Steps, model and scheduler (class and public config, as JSON values) bind a plan: another one is refused.
    The settings (guidance, height, width, dtype, …) may differ, with one warning.
    """

    steps: int
    model: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, pipe, steps: int, settings: Mapping[str, Any]) -> "Conditions":
        """The conditions of a diffusers pipeline with a `transformer` and a `scheduler`."""
        return cls(steps, _describe(pipe.transformer), _describe(pipe.scheduler), json.loads(json.dumps(settings)))


def _describe(component) -> dict[str, Any]:
    public = {k: v for k, v in dict(component.config).items() if not k.startswith("_")}
    return json.loads(json.dumps({"class": type(component).__name__, **public}, default=str))


def _differences(mine: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys that both have with different values, as "key made-for, got"; keys of other library versions are let be."""
    return [key for key in mine if key in other and mine[key] != other[key]]


@dataclass(frozen=True)
class ThresholdPlan:
    """The paper's plan for one λ: which steps are cached, on which grid, and how their velocity is rectified."""

    conditions: Conditions
    threshold: float  # λ > 0 of Eq. 12
    cached: tuple[int, ...]  # S, ascending, in 1 … T−2
    site: str  # where the residual is taken: "output" (Eq. 5) or "blocks" (around the transformer blocks)
    native_sigmas: tuple[float, ...]  # [T+1], the scheduler's own grid at calibration
    phi_definition: str = "none"  # "none" | "velocity" | "difference"
    phi: tuple[float, ...] = ()  # [T], φ_i in [0, 1], 1 on computed steps
    rectified: bool = False
    k: tuple[float, ...] = ()  # [T], K_i, 0 where nothing is rectified
    b: tuple[float, ...] = ()  # [T], B_i, −2 where nothing is rectified
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name, neutral in (("phi", 1.0), ("k", 0.0), ("b", -2.0)):
            if not getattr(self, name):
                object.__setattr__(self, name, (neutral,) * self.steps)
        problem = self._problem()
        if problem:
            raise PlanError(f"not a valid plan: {problem}")

    @property
    def steps(self) -> int:
        """T, the number of steps of the uncached run."""
        return self.conditions.steps

    @property
    def nfe(self) -> int:
        """Number of function evaluations: computed steps; with guidance each one calls the model for both branches."""
        return self.steps - len(self.cached)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """[T+1], the adjusted grid under the conditions of the calibration."""
        return tuple(adjusted_sigmas(np.array(self.native_sigmas), self.phi).tolist())

    def grid(self, native: torch.Tensor) -> torch.Tensor:
        """The adjusted grid for a native one of T+1 sigmas (Eq. 13–14); φ = 1 everywhere returns it unchanged."""
        return torch.from_numpy(adjusted_sigmas(native.cpu().numpy(), self.phi)).to(native.device)

    def _problem(self) -> str | None:
        steps, inner = self.steps, range(1, self.steps - 1)
        if steps < 3:
            return f"steps = {steps}, at least 3 are needed"
        if not (math.isfinite(self.threshold) and self.threshold > 0):
            return f"threshold λ = {self.threshold}, must be a finite number above 0"
        if self.site not in SITES:
            return f"site = {self.site!r}, must be one of {SITES}"
        if self.phi_definition not in PHI_DEFINITIONS:
            return f"phi_definition = {self.phi_definition!r}, must be one of {PHI_DEFINITIONS}"
        if list(self.cached) != sorted(set(self.cached)) or any(i not in inner for i in self.cached):
            return f"cached steps {list(self.cached)}, must ascend within 1 … {steps - 2}"
        for name, length in (("phi", steps), ("k", steps), ("b", steps), ("native_sigmas", steps + 1)):
            values = getattr(self, name)
            if len(values) != length or not np.all(np.isfinite(values)):
                return f"{name} must hold {length} finite numbers"
        if any(not 0 <= p <= 1 or (p != 1 and i not in self.cached) for i, p in enumerate(self.phi)):
            return "phi must be in [0, 1], and 1 on computed steps"
        if np.any(np.diff(self.native_sigmas) >= 0):
            return "native_sigmas must fall from noise to data"
        return None

    def check(self, run: Conditions, remedy: str) -> None:
        """Refuse a run that the plan was not made for; warn once when only settings differ.

        remedy: the command that makes the right plan, for the message of the PlanError.
        """
        made = self.conditions
        if made.steps != run.steps:
            raise PlanError(f"the plan is for {made.steps} steps, the run has {run.steps}: {remedy}")
        for what in ("model", "scheduler"):
            mine, other = getattr(made, what), getattr(run, what)
            keys = _differences(mine, other)
            if keys:
                pairs = ", ".join(f"{key} {mine[key]} ≠ {other[key]}" for key in keys[:3])
                raise PlanError(f"the plan is for another {what} than this pipeline's ({pairs}): {remedy}")
        keys = _differences(made.settings, run.settings)
        if keys:
            pairs = ", ".join(f"{key} {made.settings[key]}, now {run.settings[key]}" for key in keys)
            warnings.warn(f"the plan was calibrated at {pairs}; quality may be lower. {remedy}", stacklevel=2)

    def save(self, path: str | Path) -> Path:
        """Write `path` (….json) and the arrays beside it. Returns the path of the JSON file."""
        path = _json_path(path)
        arrays = {name: np.array(getattr(self, name), np.float64) for name in ARRAYS}
        tensors = save(arrays)
        fields = {
            "format": FORMAT,
            "version": VERSION,
            "kind": "threshold",
            "threshold": self.threshold,
            "steps": self.steps,
            "nfe": self.nfe,
            "cached": list(self.cached),
            "site": self.site,
            "phi_definition": self.phi_definition,
            "rectified": self.rectified,
            "model": self.conditions.model,
            "scheduler": self.conditions.scheduler,
            "settings": self.conditions.settings,
            "provenance": self.provenance,
        }
        fields["checksum"] = _checksum(fields, tensors)
        write_atomically(path.with_suffix(".safetensors"), tensors)
        write_atomically(path, (json.dumps(fields, indent=1, ensure_ascii=False) + "\n").encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> "ThresholdPlan":
        """Read a plan; a missing, truncated, edited or newer file is a PlanError that names it."""
        path = _json_path(path)
        again = f"copy it again or calibrate anew (delete {path} first)"
        try:
            tensors = path.with_suffix(".safetensors").read_bytes()
            fields = json.loads(path.read_text("utf-8"))
            arrays = load(tensors)
        except FileNotFoundError as error:
            raise PlanError(f"no plan file {error.filename}: check the path, or calibrate one") from error
        except OSError as error:
            raise PlanError(f"cannot read plan {path} ({error.strerror})") from error
        except Exception as error:  # json and safetensors raise their own types for damaged input
            raise PlanError(f"plan {path} is truncated or damaged: {again}") from error
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise PlanError(f"{path} is not an ERTACache plan")
        if fields.get("version") != VERSION or fields.get("kind") != "threshold":
            found = f"{fields.get('kind')} plan of format version {fields.get('version')}"
            raise PlanError(f"{path} is a {found}; this release reads threshold plans of version {VERSION}: upgrade")
        if fields.pop("checksum", None) != _checksum(fields, tensors):
            raise PlanError(f"plan {path} was edited or damaged (its checksum does not match): {again}")
        conditions = Conditions(fields["steps"], fields["model"], fields["scheduler"], fields["settings"])
        values = {name: tuple(arrays[name].tolist()) for name in ARRAYS if name != "sigmas"}
        names = ("threshold", "site", "phi_definition", "rectified", "provenance")
        return cls(conditions, cached=tuple(fields["cached"]), **values, **{n: fields[n] for n in names})


def _json_path(path: str | Path) -> Path:
    path = Path(path)
    return path.with_suffix(".json") if path.suffix == ".safetensors" else path


def _checksum(fields: Mapping[str, Any], tensors: bytes) -> str:
    canonical = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode() + tensors).hexdigest()
