"""Threshold plans: the paper's plans, one for each λ."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch

from ertacache.algorithm import PHI_DEFINITIONS, adjusted_sigmas
from ertacache.plans.names import threshold_name
from ertacache.plans.plan import Plan
from ertacache.plans.requirements import Requirements
from ertacache.plans.schema import NUMBER, grid_problem
from ertacache.utils.checks import steps_problem
from ertacache.utils.errors import UserError, shown

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
    FIELDS: ClassVar = {
        **{"threshold": NUMBER, "cached": [int], "site": str, "phi_definition": str, "rectified": bool},
    }
    ARRAYS: ClassVar = {"phi": "T", "k": "T", "b": "T", "native_sigmas": "T+1"}
    OLD_ARRAYS = ("sigmas",)
    DERIVED: ClassVar = {"nfe": "nfe"}
    LEAST_STEPS = 3

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
        if not steps_problem(self.steps, self.LEAST_STEPS):
            for name, neutral in (("phi", 1.0), ("k", 0.0), ("b", -2.0)):
                if not getattr(self, name):
                    object.__setattr__(self, name, (neutral,) * self.steps)
        super().__post_init__()

    @property
    def title(self) -> str:
        """What sets this plan apart, for captions."""
        return f"lambda={self.threshold:g}"

    @property
    def computed(self) -> tuple[int, ...]:
        """The steps that are not cached, ascending."""
        cached = set(self.cached)
        return tuple(i for i in range(self.steps) if i not in cached)

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
        inner = range(1, self.steps - 1)
        try:
            check_threshold(self.threshold)
        except UserError as error:
            return str(error)
        if self.site not in SITES:
            return f"site = {shown(self.site)}, must be one of {SITES}"
        if self.phi_definition not in PHI_DEFINITIONS:
            return f"phi_definition = {shown(self.phi_definition)}, must be one of {PHI_DEFINITIONS}"
        if any(a >= b for a, b in pairwise(self.cached)) or any(i not in inner for i in self.cached):
            return f"cached steps {shown(list(self.cached))}, must ascend within 1 … {self.steps - 2}"
        if any(not 0 <= p <= 1 for p in self.phi) or any(self.phi[i] != 1 for i in self.computed):
            return "phi must be in [0, 1], and 1 on computed steps"
        return grid_problem("native_sigmas", self.native_sigmas, self.requirements.scheduler)
