"""Fixed grids of noise levels, and NeuralSolver's solvers, on the scale of a model folder."""

from collections.abc import Sequence

import numpy as np

from ertacache.evaluation.rivals import tables
from ertacache.evaluation.rivals.tables import NEURAL_SOLVER

LARGEST_DIFFERENCE = 0.1  # of the speed-up of a published number of steps from the one asked for


def log_linear(levels: Sequence[float], steps: int) -> np.ndarray:
    """Return falling noise levels [N+1] interpolated in their logarithm, with 0 for the last, as ComfyUI does.

    Args:
        levels: Published ones, above 0.
        steps: N; levels that are as many stay as they are.
    """
    logarithms = np.log(levels)
    if len(levels) != steps + 1:
        logarithms = np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(levels)), logarithms)
    return np.append(np.exp(logarithms[:-1]), 0.0)


def published_grids(denoiser: str, rotates: bool, steps: int) -> dict[str, np.ndarray]:
    """Return ComfyUI's fixed grids [N+1] for a model, falling to 0, on the scale of its folder's noise levels.

    OSS's lists are noise levels of flow matching; a model that has none of its own gets both. AYS and GITS are lists
    for a diffusion model, brought over by equal ratio r of noise to data: s = r / (1 + r) in flow matching, the angle
    arctan r / (π/2) in a model of rotations. That is ours; ComfyUI has no such conversion.

    DMN's grids (arXiv 2402.17376) are left out: their bound is over half-log-SNRs between finite ends, and flow
    matching starts at −∞, as does a schedule of zero terminal SNR.

    Args:
        denoiser: Class name.
        rotates: Whether the model's steps are rotations, not x' = x + w v.
        steps: N.
    """
    known = {"FluxTransformer2DModel": ["FLUX"], "WanTransformer3DModel": ["Wan"]}.get(denoiser, ["FLUX", "Wan"])
    lists = {"FLUX": tables.OSS_FLUX, "Wan": tables.OSS_WAN}
    grids = {} if rotates else {f"OSS's list for {name}": log_linear(lists[name], steps) for name in known}
    ratios = {"AYS": log_linear(tables.AYS, steps)}
    ratios["GITS"] = log_linear(tables.GITS[min(steps, len(tables.GITS) + 1) - 2], steps)
    for name, ratio in ratios.items():
        grids[name] = np.arctan(ratio) / (np.pi / 2) if rotates else ratio / (1 + ratio)
    return grids


def shift_of(sigmas: np.ndarray) -> float:
    """Return the shift of a native grid: s = shift · u / (1 + (shift − 1) u) of equal distances u, the median over it.

    Args:
        sigmas: Noise levels, [T+1], falling from about 1.
    """
    s, u = np.asarray(sigmas, float)[1:-1], np.linspace(1, 0, len(sigmas))[1:-1]
    return float(np.median(s * (1 - u) / (u * (1 - s))))


def nearest_published(steps: int, budget: int) -> int | None:
    """Return the number of steps that NeuralSolver has a solver for, with a speed-up nearest to T/N.

    None where it differs by more than a tenth.
    """
    count = min(NEURAL_SOLVER, key=lambda count: abs(steps / count - steps / budget))
    return count if abs(budget / count - 1) < LARGEST_DIFFERENCE + 1e-9 else None


def neural_solver(count: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Return NeuralSolver's grid [N+1], 1 to 0, and the jumps on it [N, N], newest velocity first, for dx/ds = v.

    The grid goes through the model's shift, and the lengths of the steps with it. Published lengths are divided by
    their sum, which rounding moves off 1.

    Args:
        count: N.
        shift: Of the model.
    """
    lengths, coefficients = NEURAL_SOLVER[count]
    times = np.cumsum([0.0, *lengths]) / np.sum(lengths)
    s = 1 - times
    s[-1] = 0.0
    sigmas = shift * s / (1 + (shift - 1) * s)
    weights = np.zeros((count, count))
    for i, row in enumerate(coefficients):
        weights[i, : i + 1] = [*row, 1 - sum(row)][::-1]
    return sigmas, weights * np.diff(sigmas)[:, None]
