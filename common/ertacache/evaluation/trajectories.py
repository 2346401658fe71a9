"""Data of the paper's Figure 2: distances from step to step, and trajectories projected to a plane."""

from itertools import pairwise

import numpy as np
import torch

from ertacache.algorithm import l1_norm, relative_l1, residual
from ertacache.caches.block_stack import cached_ranges
from ertacache.caches.teacache import INDICATORS, relative_change
from ertacache.numerics.blocks import blocks_of


class Expected:
    """Policy that computes every step and records the change that TeaCache expects.

    Args:
        coefficients: TeaCache's polynomial, highest power first.

    Attributes:
        changes: Expected relative change by step, of the first guidance branch.
    """

    def __init__(self, coefficients: tuple[float, ...]):
        self.coefficients, self.changes = coefficients, {}

    def __call__(self, state, block, arguments) -> bool:
        indicator = INDICATORS[type(block).__name__](block, arguments)
        previous, state.memory["indicator"] = state.memory.get("indicator"), indicator
        if previous is not None:
            change = relative_change(indicator, previous)
            self.changes.setdefault(state.step, float(np.polyval(self.coefficients, change)))
        return True


def distances(sampler, pipe, inputs, coefficients) -> list[dict]:
    """Measure relative ℓ1 distances between neighbouring steps of an uncached run.

    Args:
        sampler: Of the model folder.
        pipe: The pipeline.
        inputs: Of one prompt.
        coefficients: TeaCache's polynomial, highest power first.

    Returns:
        For each step i ≥ 1 the distance from step i − 1 of the residual (Eq. 12) and of the model's output, and the
        distance of the output that TeaCache expects.
    """
    expected, outputs = Expected(coefficients), []
    with cached_ranges(pipe.transformer, [(blocks_of(pipe.transformer), expected)]):
        sampler.denoise(pipe, inputs, None, lambda i, x, v: outputs.append((residual(v, x).float(), v.float())))
    rows = []
    for i, ((r_before, v_before), (r, v)) in enumerate(pairwise(outputs), start=1):
        row = {"step": i, "residual": float(relative_l1(l1_norm(r - r_before), l1_norm(r)))}
        rows.append({**row, "output": relative_change(v, v_before), "teacache": expected.changes[i]})
    return rows


def trajectory(sampler, pipe, inputs, plan=None) -> np.ndarray:
    """Return the latents of the first prompt before each step and at the end, [T+1, elements]."""
    states = []
    states.append(sampler.denoise(pipe, inputs, plan, lambda i, x, v: states.append(x)))
    return torch.stack([x[0].float().flatten().cpu() for x in states]).numpy()


def on_plane(paths: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Project trajectories to the plane of the uncached run and the cached run without corrections.

    Args:
        paths: Trajectories [T+1, elements], "uncached" and "policy" among them.

    Returns:
        Coordinates [T+1, 2] of each: along the uncached run from its noise (0) to its image (1), and across it, in the
        same unit, towards the end of "policy".
    """
    uncached, cached = paths["uncached"], paths["policy"]
    along = uncached[-1] - uncached[0]
    drift = cached[-1] - uncached[-1]
    across = drift - along * (drift @ along) / (along @ along)
    length = np.linalg.norm(along)
    basis = np.stack([along / length**2, across / (max(np.linalg.norm(across), 1e-30) * length)], axis=1)
    return {name: (path - uncached[0]) @ basis for name, path in paths.items()}
