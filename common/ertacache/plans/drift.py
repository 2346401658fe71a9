"""Drift: an out-of-distribution score of a run against the calibration of its budget plan. It costs no model call.

At the k-th computed step the velocities before it give a prediction, v̂_k = Σ_j p_kj v_{k−j}; then the model computes
v_k, and the prediction's error is e_k = rms(v_k − v̂_k). Calibration fits p by least squares and keeps the errors of its
prompts. Larger prediction errors mean that the plan fits this run less well, because its jumps combine the same
velocities.

    drift = exp( mean_k ln(e_k / E_k) ),   E_k the geometric mean of e_k over the calibration prompts

Drift is 1 for a sample like those of the calibration. The first computed step has no prediction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

LIMITS = {  # by reaction, in multiples of the worst calibration prompt; a single step's error scatters more than drift
    "warn": 1.25,  # for the drift of a run
    "compute": 2.0,  # for the prediction error of a step
}
MIN_ERROR = 1e-12  # keeps logarithms finite


@dataclass(frozen=True)
class Reading:
    """The drift of one sample.

    Attributes:
        drift: Geometric mean of its error ratios; 1 as at calibration.
        percentile: Share of the calibration prompts with less drift, 0 … 100.
    """

    drift: float
    percentile: float


class Monitor:
    """Prediction errors of one run of a plan; they stay on the device until they are read.

    Args:
        plan: A `BudgetPlan` with a predictor and prediction errors [P, N].

    Attributes:
        calibrated: Drift of each calibration prompt, [P].
    """

    def __init__(self, plan):
        self.plan = plan
        self.norms: dict[int, torch.Tensor] = {}  # computed step k → ‖v_k − v̂_k‖₂ of each sample, [B]
        self.mean_weight = 1.0  # 1 / elements of a sample: e_k² = mean_weight · ‖v_k − v̂_k‖²
        self.errors = np.maximum(plan.prediction_errors, MIN_ERROR)  # e_k of the calibration prompts, [P, N]
        self.log_typical = np.log(self.errors).mean(0)  # ln E_k, [N]
        self.calibrated = self.drifts({k: self.errors[:, k] for k in range(1, plan.nfe)})  # [P]

    def see(self, k: int, v: torch.Tensor, history: Sequence[torch.Tensor]) -> None:
        """Record the prediction error at the plan's k-th computed step, unless the history is too short.

        Args:
            k: 0 … N−1.
            v: The computed velocity, [B, …].
            history: The velocities before it, newest first.
        """
        weights = self.plan.predictor[k]
        if not any(weights) or any(weights[len(history) :]):
            return
        error = v.float().add(history[0], alpha=-weights[0])  # in float32
        for weight, velocity in zip(weights[1:], history[1:], strict=False):
            error.add_(velocity, alpha=-weight)
        self.mean_weight = len(v) / v.numel()
        self.norms[k] = torch.linalg.vector_norm(error.flatten(1), dim=1)

    def drifts(self, errors: Mapping[int, np.ndarray]) -> np.ndarray:
        """Return the drift of each sample, [B], from its e_k by computed step; [] without any."""
        logs = [np.log(np.maximum(e, MIN_ERROR)) - self.log_typical[k] for k, e in errors.items()]
        return np.exp(np.mean(logs, axis=0)) if logs else np.array([])

    def readings(self) -> tuple[Reading, ...]:
        """Return one reading per sample, over the steps so far; () before the second one. Waits for the device."""
        drifts = self.drifts({k: e.cpu().double().numpy() * self.mean_weight**0.5 for k, e in self.norms.items()})
        return tuple(Reading(float(d), float(100 * np.mean(self.calibrated < d))) for d in drifts)

    def limits(self, factor: float | None = None) -> tuple[float, float]:
        """Return the drift below and above which a run gets a warning: both say that it is another kind of run.

        Args:
            factor: Between them and the least and the largest of the calibration prompts; by default LIMITS["warn"].
        """
        factor = LIMITS["warn"] if factor is None else factor
        return float(self.calibrated.min()) / factor, factor * float(self.calibrated.max())

    def unusual(self, factor: float | None = None) -> float | None:
        """Return the drift of the sample that is farthest beyond the limits; None where all are within."""
        least, largest = self.limits(factor)
        drifts = [reading.drift for reading in self.readings()]
        beyond = [drift for drift in drifts if not least <= drift <= largest]  # NaN too
        return max(beyond, key=lambda drift: abs(np.log(drift / least)) if drift > 0 else np.inf, default=None)

    def beyond(self, factor: float) -> bool:
        """Return whether any sample's newest prediction error exceeds `factor` times the worst prompt's at that step.

        Waits for the device.
        """
        if not self.norms:
            return False
        k = max(self.norms)
        error = self.norms[k].max().item() * self.mean_weight**0.5
        return not error <= factor * self.errors[:, k].max()  # NaN is beyond it too
