"""Threshold plans: the paper's plans, one for each λ."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ertacache.algorithm import PHI_DEFINITIONS, adjusted_sigmas
from ertacache.plans.names import threshold_name
from ertacache.plans.plan import Plan
from ertacache.plans.requirements import Requirements
from ertacache.utils.errors import PlanError, UserError

SITES = ("output", "blocks")


def check_threshold(threshold: float, flag: str = "threshold") -> None:
    """Refuse a λ that is not a finite number above 0. flag: how the message names it."""
    if not (math.isfinite(threshold) and threshold > 0):
        raise UserError(f"{flag} {threshold}: λ must be a finite number above 0, for example 0.1")


@dataclass(frozen=True)
class ThresholdPlan(Plan):
    """The paper's plan for one λ: which steps are cached, on which grid, and how their velocity is rectified.

    Attributes:
        requirements: What the plan requires of a run.
        threshold: λ > 0 of Eq. 12.
        cached: S, ascending, in 1 … T−2.
        site: Where the residual is taken: "output" (Eq. 5) or "blocks" (around the transformer blocks).
        native_sigmas: The scheduler's own grid at calibration, [T+1].
        phi_definition: "none", "velocity" or "difference".
        phi: φ_i in [0, 1], [T], 1 on computed steps.
        rectified: Whether K and B are used.
        k, b: K_i and B_i, [T], 0 and −2 where nothing is rectified.
        provenance: What the plan was learned from.

    Raises:
        PlanError: Fields that do not fit each other.
    """

    kind = "threshold"
    method = "ertacache"
    FIELDS = ("threshold", "cached", "site", "phi_definition", "rectified")
    ARRAYS = ("phi", "k", "b", "native_sigmas")
    DERIVED = {"nfe": "nfe"}  # noqa: RUF012 (a class attribute of a frozen dataclass)

    requirements: Requirements
    threshold: float
    cached: tuple[int, ...]
    site: str
    native_sigmas: tuple[float, ...]
    phi_definition: str = "none"
    phi: tuple[float, ...] = ()
    rectified: bool = False
    k: tuple[float, ...] = ()
    b: tuple[float, ...] = ()
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
        """The adjusted grid under the conditions of the calibration, [T+1]."""
        return tuple(adjusted_sigmas(np.array(self.native_sigmas), self.phi).tolist())

    def file_name(self, model: str) -> str:
        """Return the name of the plan's file in a model folder's cache/."""
        return threshold_name(model, self.steps, self.threshold, self.site)

    def grid(self, native: torch.Tensor) -> torch.Tensor:
        """Return the adjusted grid for a native one of T+1 sigmas (Eq. 13–14); it is the native one where all φ = 1."""
        return torch.from_numpy(adjusted_sigmas(native.cpu().numpy(), self.phi)).to(native.device)

    def on(self, native: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Return the noise levels of a pipeline's run [T+1] and its computed steps, for its own levels."""
        levels = native if all(p == 1.0 for p in self.phi) else self.grid(native)
        return levels, self.computed

    def _problem(self) -> str | None:
        steps, inner = self.steps, range(1, self.steps - 1)
        if steps < 3:
            return f"steps = {steps}, at least 3 are needed"
        try:
            check_threshold(self.threshold)
        except UserError as error:
            return str(error)
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
        rises = bool(self.requirements.scheduler.get("invert_sigmas"))
        if np.any(np.diff(self.native_sigmas) * (-1 if rises else 1) >= 0):
            return f"native_sigmas must {'rise' if rises else 'fall'} from noise to data"
        return None
