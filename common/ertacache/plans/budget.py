"""Budget plans: exactly N model calls, and a fitted jump from each computed step to the next."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from ertacache.plans.names import TARGETS, budget_name
from ertacache.plans.plan import Plan
from ertacache.plans.requirements import Requirements
from ertacache.plans.schema import OPTIONAL_NUMBER, grid_problem
from ertacache.utils.errors import shown


@dataclass(frozen=True)
class BudgetPlan(Plan):
    """Exactly N model calls: the computed steps, and the jump x' = a x + Σ_j w_j v_j from each of them to the next.

    Attributes:
        requirements: What the plan requires of a run.
        computed: begin = c_1 < … < c_N < T.
        weights: w, [N, H], for the newest velocities, newest first; 0 where there are fewer.
        native_sigmas: The scheduler's own grid at calibration, [T+1].
        target: What the plan imitates: "reference", the uncached run, or "exact", the solution that it approximates.
        sigmas: A grid of the plan's own that `computed` counts on, falling; () for the run's native grid.
        scale: a, [N]: 1 but for solvers with x' = a x + b v, a ≠ 1.
        begin: The step at which the calibrated call began; above 0 with `strength` < 1.
        end: The step at which it ended, below T with `denoising_end` < 1; 0 for T.
        predicted_error: Mean squared error of the final latents, its geometric mean over the fitted calibration prompts
            (in plans from before 2026-11-26: the mean).
        held_out_error: The same on calibration prompts left out of the fit.
        predictor: Weights of the velocities before a computed one that predict it, newest first, [N, H−1] (drift.py).
        prediction_errors: Root mean square error of the prediction on each calibration prompt, [P, N].
        repair: Correction weights: expected target − latents at a computed step, from the last H velocities, [N, H].
        repair_scale: The correction's coefficient on the latents, [N], as in `scale`.
        start_weights: For a run that begins at step b: weights of its first H jumps, where its history is shorter than
            the plan's or holds v_b, [T, H, H], as in `weights`; all 0 where `weights` serve.
        start_scale: Their coefficient on the latents, [T, H], as in `scale`.
        provenance: What the plan was learned from.

    Raises:
        PlanError: Fields that do not fit each other.
    """

    kind = method = "budget"
    FIELDS: ClassVar = {
        **{"target": str, "computed": [int]},
        **{"predicted_error": OPTIONAL_NUMBER, "held_out_error": OPTIONAL_NUMBER},
    }
    ARRAYS: ClassVar = {"weights": "N,H", "scale": "N", "native_sigmas": "T+1", "sigmas": "M"}
    OPTIONAL_FIELDS: ClassVar = {"begin": int, "end": int}
    OPTIONAL_ARRAYS: ClassVar = {
        **{"predictor": "N,H-1", "prediction_errors": "P,N", "repair": "N,H", "repair_scale": "N"},
        **{"start_weights": "T,H,H", "start_scale": "T,H"},
    }
    DERIVED: ClassVar = {"nfe": "nfe", "anchors": "history_length"}

    requirements: Requirements
    computed: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]
    native_sigmas: tuple[float, ...]
    target: str = "reference"
    sigmas: tuple[float, ...] = ()
    begin: int = 0
    end: int = 0
    scale: tuple[float, ...] = ()
    predicted_error: float | None = None
    held_out_error: float | None = None
    predictor: tuple[tuple[float, ...], ...] = ()
    prediction_errors: tuple[tuple[float, ...], ...] = ()
    repair: tuple[tuple[float, ...], ...] = ()
    repair_scale: tuple[float, ...] = ()
    start_weights: tuple[tuple[tuple[float, ...], ...], ...] = ()
    start_scale: tuple[tuple[float, ...], ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.scale:
            object.__setattr__(self, "scale", (1.0,) * len(self.computed))
        super().__post_init__()

    @property
    def title(self) -> str:
        """What sets this plan apart, for captions."""
        return f"{self.speedup:.2g}x" + (", exact" if self.target == "exact" else "")

    @property
    def speedup(self) -> float:
        """The speed-up in model calls of a run that begins and ends where the calibration did: T/N for a whole one."""
        return ((self.end or self.steps) - self.begin) / self.nfe

    @property
    def nfe(self) -> int:
        """N, the number of computed steps; with guidance each one calls the model for both branches."""
        return len(self.computed)

    @property
    def history_length(self) -> int:
        """H, the number of velocities that a jump combines, and that a run keeps."""
        return len(self.weights[0])

    @property
    def version(self) -> int:
        return 2 if self.start_weights or self.begin or self.end else 1

    @property
    def has_drift(self) -> bool:
        return bool(self.predictor) and self.nfe > 1

    def file_name(self, model: str) -> str:
        """Return the name of the plan's file in a model folder's cache/."""
        return budget_name(model, self.steps, self.nfe, self.target)

    def grid(self, native: torch.Tensor) -> torch.Tensor:
        """Return the grid that `computed` counts on: the plan's own, or the native one of the run, [T+1]."""
        return torch.tensor(self.sigmas, dtype=native.dtype, device=native.device) if self.sigmas else native

    @property
    def on_native(self) -> tuple[int, ...]:
        """The steps of the native grid that stand for the computed ones: these, or the nearest to those of `sigmas`."""
        if not self.sigmas:
            return self.computed
        native, steps = np.array(self.native_sigmas), []
        for level in np.array(self.sigmas)[list(self.computed)]:
            nearest = int(np.abs(native[:-1] - level).argmin())
            steps.append(max(nearest, steps[-1] + 1 if steps else 0))
        last = self.steps - self.nfe
        return tuple(min(step, last + place) for place, step in enumerate(steps))

    def on(self, native: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Return the noise levels of a pipeline's run [T+1] and its computed steps, for its own levels.

        A plan with a grid of its own moves the levels of computed steps; the others stay.
        """
        if not self.sigmas:
            return native, self.computed
        levels = native.clone()
        levels[list(self.on_native)] = torch.tensor(self.sigmas).to(native)[list(self.computed)]
        levels[-1] = self.sigmas[-1]
        return levels, self.on_native

    def calibrated_levels(self) -> list[float]:
        """Return the noise levels of `on` under the conditions of the calibration, [T+1]."""
        return self.on(torch.tensor(self.native_sigmas, dtype=torch.float64))[0].tolist()

    def weights_on(self, sigmas: torch.Tensor) -> list[list[float]]:
        """Return the weights [N, H] for a run's grid [T+1]: those of a jump grow with its interval.

        Grids differ from that of the calibration where the scheduler shifts them by the size of the image.
        """
        ends = [*self.computed, len(sigmas) - 1]
        run, calibrated = (
            np.diff(np.asarray(s, np.float64)[ends]) for s in (sigmas.tolist(), self.sigmas or self.native_sigmas)
        )
        ratio = np.divide(run, calibrated, out=np.ones_like(run), where=calibrated != 0)
        return (np.array(self.weights) * ratio[:, None]).tolist()

    def sizes(self) -> dict[str, int]:
        return {**super().sizes(), "N": self.nfe}

    def _problem(self) -> str | None:
        if self.target not in TARGETS:
            return f"target = {shown(self.target)}, must be one of {tuple(TARGETS)}"
        for name in ("native_sigmas", "sigmas"):
            problem = grid_problem(name, getattr(self, name), self.requirements.scheduler)
            if problem:
                return problem
        if not 0 <= self.end <= self.steps or (self.end and self.sigmas):
            return f"end = {self.end}, must be from 0 to {self.steps}, and 0 for a plan with a grid of its own"
        computed, end = self.computed, len(self.sigmas) - 1 if self.sigmas else self.end or self.steps
        ascends = all(a < b for a, b in zip(computed, [*computed[1:], end], strict=True))
        if not computed or computed[0] != self.begin or not ascends:
            return f"computed steps {shown(list(computed))}, must ascend from {self.begin} within 0 … {end - 1}"
        if not self.history_length:
            return "weights must hold at least one for each computed step"
        for names in (("predictor", "prediction_errors", "repair", "repair_scale"), ("start_weights", "start_scale")):
            if len({bool(getattr(self, name)) for name in names}) > 1:
                return f"{', '.join(names)}: some are there and some are missing"
        if any(error < 0 for row in self.prediction_errors for error in row):
            return "prediction_errors must not be negative"
        return None
