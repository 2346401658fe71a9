"""What figure 2 of the paper is made of: distances from step to step, and trajectories in a plane."""

from itertools import pairwise

import numpy as np
import torch

from ertacache.algorithm import l1_norm, relative_l1, residual
from ertacache.caches.block_stack import blocks_of, cached_ranges
from ertacache.caches.teacache import INDICATORS, relative_change


class Expected:
    """Has every step computed, and notes by step the change that TeaCache would expect (of the first branch)."""

    def __init__(self, coefficients: tuple[float, ...]):
        self.coefficients, self.changes = coefficients, {}

    def __call__(self, state, block, arguments) -> bool:
        indicator = INDICATORS[type(block).__name__](block, arguments)
        previous, state.memory["indicator"] = state.memory.get("indicator"), indicator
        if previous is not None:
            change = relative_change(indicator, previous)
            self.changes.setdefault(state.step, float(np.polyval(self.coefficients, change)))
        return True


def distances(program, pipe, inputs, coefficients) -> list[dict]:
    """Of one prompt's uncached run, for each step i ≥ 1: the relative ℓ1 distance between what is computed and what
    was cached a step before, of the residual (Eq. 12) and of the model's output, and what TeaCache expects of the
    output."""
    expected, seen = Expected(coefficients), []
    with cached_ranges(pipe.transformer, [(blocks_of(pipe.transformer), expected)]):
        program.denoise(pipe, inputs, None, lambda i, x, v: seen.append((residual(v, x).float(), v.float())))
    rows = []
    for i, ((r_before, v_before), (r, v)) in enumerate(pairwise(seen), start=1):
        row = {"step": i, "residual": float(relative_l1(l1_norm(r - r_before), l1_norm(r)))}
        rows.append({**row, "output": relative_change(v, v_before), "teacache": expected.changes[i]})
    return rows


def trajectory(program, pipe, inputs, plan=None) -> np.ndarray:
    """Latents of the first prompt before each step and at the end, [T+1, elements]."""
    states = []
    states.append(program.denoise(pipe, inputs, plan, lambda i, x, v: states.append(x)))
    return torch.stack([x[0].float().flatten().cpu() for x in states]).numpy()


def on_plane(paths: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Trajectories [T+1, elements] → [T+1, 2]: along the uncached run from noise to picture (0 … 1), and across it,
    in the direction in which the plain cached run ends beside it (in the same unit)."""
    uncached, cached = paths["uncached"], paths["policy"]
    along = uncached[-1] - uncached[0]
    drift = cached[-1] - uncached[-1]
    across = drift - along * (drift @ along) / (along @ along)
    length = np.linalg.norm(along)
    basis = np.stack([along / length**2, across / (max(np.linalg.norm(across), 1e-30) * length)], axis=1)
    return {name: (path - uncached[0]) @ basis for name, path in paths.items()}
