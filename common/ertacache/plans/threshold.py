"""Threshold plans: the paper's plans, one for each λ."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ertacache.algorithm import PHI_DEFINITIONS, adjusted_sigmas
from ertacache.plans.plan import Plan
from ertacache.plans.requirements import Conditions
from ertacache.utils.errors import PlanError

SITES = ("output", "blocks")


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
