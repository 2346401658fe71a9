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
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.numpy import load, save

from ertacache.algorithm import PHI_DEFINITIONS, adjusted_sigmas
from ertacache.conditions import Conditions, differences
from ertacache.errors import PlanError
from ertacache.files import write_atomically
from ertacache.hub import HubMixin

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


@dataclass(frozen=True)
class ThresholdPlan(Plan):
    """The paper's plan for one λ: which steps are cached, on which grid, and how their velocity is rectified."""

    kind = "threshold"
    FIELDS = ("threshold", "cached", "site", "phi_definition", "rectified")
    ARRAYS = ("phi", "k", "b", "native_sigmas")
    DERIVED = ("nfe",)

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
    def title(self) -> str:
        """What sets this plan apart, for captions."""
        return f"lambda={self.threshold:g}"

    @property
    def computed(self) -> tuple[int, ...]:
        """The steps that are not cached, ascending."""
        return tuple(i for i in range(self.steps) if i not in self.cached)

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


@dataclass(frozen=True)
class BudgetPlan(Plan):
    """Exactly N model calls: the computed steps, and the jump from each of them to the next (planner.py)."""

    kind = "budget"
    FIELDS = ("target", "computed", "predicted_error", "held_out_error")
    ARRAYS = ("weights", "scale", "native_sigmas", "sigmas")
    OPTIONAL_ARRAYS = ("predictor", "prediction_errors", "repair", "repair_scale")
    DERIVED = ("nfe", "anchors")

    conditions: Conditions
    computed: tuple[int, ...]  # 0 = c_1 < … < c_N < T
    weights: tuple[tuple[float, ...], ...]  # [N, H], of the newest outputs, newest first; 0 where there are fewer
    native_sigmas: tuple[float, ...]  # [T+1], the scheduler's own grid at calibration
    target: str = "reference"  # what was aimed at: the uncached run, or the "exact" solution, which it approximates
    sigmas: tuple[float, ...] = ()  # a grid of its own that `computed` counts on, falling; () for the run's native grid
    scale: tuple[float, ...] = ()  # [N], weight of the latent itself: 1 but for solvers with x' = a x + b v, a ≠ 1
    predicted_error: float | None = None  # mean squared error of the final latents on the calibration prompts
    held_out_error: float | None = None  # the same on calibration prompts that were left out of the fit
    predictor: tuple[
        tuple[float, ...], ...
    ] = ()  # [N, H−1], of the outputs before a computed one, newest first: drift.py
    prediction_errors: tuple[tuple[float, ...], ...] = ()  # [P, N], its root mean square on each calibration prompt
    repair: tuple[tuple[float, ...], ...] = ()  # [N, H], of the outputs in what the latents of a computed step lack
    repair_scale: tuple[float, ...] = ()  # [N], of the latent itself, as in `scale`
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.scale:
            object.__setattr__(self, "scale", (1.0,) * len(self.computed))
        problem = self._problem()
        if problem:
            raise PlanError(f"not a valid plan: {problem}")

    @property
    def title(self) -> str:
        """What sets this plan apart, for captions."""
        return f"{self.steps / self.nfe:.2g}x" + (", exact" if self.target == "exact" else "")

    @property
    def nfe(self) -> int:
        """N, the number of computed steps; with guidance each one calls the model for both branches."""
        return len(self.computed)

    @property
    def anchors(self) -> int:
        """H, the number of outputs that a jump combines, and that a run keeps."""
        return len(self.weights[0])

    def _problem(self) -> str | None:
        if self.target not in TARGETS:
            return f"target = {self.target!r}, must be one of {TARGETS}"
        if len(self.sigmas) == 1 or np.any(np.diff(self.sigmas) >= 0):
            return "sigmas must be empty, or fall"
        computed, end = list(self.computed), len(self.sigmas) - 1 if self.sigmas else self.steps
        if not computed or computed[0] != 0 or computed != sorted(set(computed)) or computed[-1] >= end:
            return f"computed steps {computed}, must ascend from 0 within 0 … {end - 1}"
        lengths = {len(row) for row in self.weights}
        if len(self.weights) != len(computed) or len(lengths) != 1 or 0 in lengths or len(self.scale) != len(computed):
            return f"weights and scale must hold a row for each of the {len(computed)} computed steps"
        if not (np.all(np.isfinite(self.weights)) and np.all(np.isfinite(self.scale))):
            return "weights and scale must be finite"
        if len(self.native_sigmas) != self.steps + 1:
            return f"native_sigmas must hold {self.steps + 1} numbers"
        lengths = {len(getattr(self, name)) for name in ("predictor", "repair", "repair_scale")}
        if lengths != ({len(computed)} if self.prediction_errors else {0}):
            return f"predictor and repair must hold a row for each of the {len(computed)} computed steps, or be empty"
        if {len(row) for row in self.prediction_errors} - {len(computed)}:
            return f"prediction_errors must hold {len(computed)} numbers a prompt"
        return None

    def grid(self, native: torch.Tensor) -> torch.Tensor:
        """The grid that `computed` counts on: the plan's own, or the native one of the run, [T+1]."""
        return torch.tensor(self.sigmas, dtype=native.dtype, device=native.device) if self.sigmas else native

    def weights_on(self, sigmas: torch.Tensor) -> list[list[float]]:
        """The weights [N, H] for a run's grid [T+1]: those of a jump grow with its interval.

        Grids differ from that of the calibration where the scheduler shifts them by the size of the picture.
        """
        ends = [*self.computed, len(sigmas) - 1]
        run, made = (
            np.diff(np.asarray(s, np.float64)[ends]) for s in (sigmas.tolist(), self.sigmas or self.native_sigmas)
        )
        return (np.array(self.weights) * (run / made)[:, None]).tolist()


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
