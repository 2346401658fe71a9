"""Drift: how well the anchors of a budget plan predict each computed output, in a run against its calibration.

At the k-th computed step the outputs before it predict the one there, v̂_k = Σ_j p_kj v_{k−j}, and then the model
computes it: the prediction's error e_k = rms(v_k − v̂_k) costs no call. Calibration fits p by least squares and keeps
the errors of its prompts. A run whose errors are larger is one that the plan's jumps, which combine the same outputs,
fit less.

    drift = exp( mean_k ln(e_k / E_k) ),   E_k the geometric mean of e_k over the calibration prompts

is 1 for a sample like those of the calibration. The first computed step has no prediction.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

LIMITS = {  # × the worst of the calibration prompts, by what is done beyond it; a single step scatters more than a run
    "warn": 1.25,  # a run's drift
    "compute": 2.0,  # a step's error
}
LEAST = 1e-12  # an error, so that it has a logarithm


@dataclass(frozen=True)
class Reading:
    """The drift of one sample: 1 as at calibration. percentile: of the calibration prompts, how many drift less."""

    drift: float
    percentile: float


class Monitor:
    """Watches one run of a plan. What it sees stays on the device until it is read."""

    def __init__(self, plan):
        self.plan, self.seen, self.share = plan, {}, 1.0  # place → norm of each sample's error, [B]
        self.errors = np.maximum(plan.prediction_errors, LEAST)  # of the calibration prompts, [P, N]
        self.usual = np.log(self.errors).mean(0)  # ln E_k, [N]
        self.calibrated = self.drifts({k: self.errors[:, k] for k in range(1, plan.nfe)})  # [P]

    def see(self, place: int, v: torch.Tensor, earlier: list[torch.Tensor]) -> None:
        """The output v [B, …] of a computed step, and those before it, newest first. Too few of them: not compared."""
        weights = self.plan.predictor[place]
        if not any(weights) or any(weights[len(earlier) :]):
            return
        error = v.float().add(earlier[0], alpha=-weights[0])  # in float32
        for weight, output in zip(weights[1:], earlier[1:], strict=False):
            error.add_(output, alpha=-weight)
        self.share = len(v) / v.numel()  # of an element in the mean
        self.seen[place] = torch.linalg.vector_norm(error.flatten(1), dim=1)

    def drifts(self, errors: Mapping[int, np.ndarray]) -> np.ndarray:
        """The drift of each sample [B] from its e_k, by place; [] without any."""
        logs = [np.log(np.maximum(e, LEAST)) - self.usual[k] for k, e in errors.items()]
        return np.exp(np.mean(logs, axis=0)) if logs else np.array([])

    def readings(self) -> tuple[Reading, ...]:
        """Of each sample, over the steps seen so far; () before the second computed step. Waits for the device."""
        drifts = self.drifts({k: e.double().cpu().numpy() * self.share**0.5 for k, e in self.seen.items()})
        return tuple(Reading(float(d), float(100 * np.mean(self.calibrated < d))) for d in drifts)

    def limit(self, factor: float | None = None) -> float:
        """The drift beyond which a run gets a warning."""
        return (LIMITS["warn"] if factor is None else factor) * float(self.calibrated.max())

    def beyond(self, factor: float) -> bool:
        """Whether for any sample the newest prediction misses by more than `factor` × that of the worst prompt."""
        if not self.seen:
            return False
        place = max(self.seen)
        return self.seen[place].max().item() * self.share**0.5 > factor * self.errors[:, place].max()
