"""Budget plans: exactly N model calls, with a fitted jump between each two of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ertacache.plans.plan import Plan
from ertacache.plans.requirements import Conditions
from ertacache.utils.errors import PlanError

TARGETS = ("reference", "exact")


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
