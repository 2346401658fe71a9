"""The equations of ERTACache, one short pure function each, in the paper's order.

Steps are counted in the order in which they run, i = 0 … T−1 (the paper counts down). `s_i` is the noise level
before step i, a sigma that falls from 1 (noise) to `s_T` = 0 (data); `x_i` the latent before step i; `v_i` the
velocity that the model gives for it, after guidance; S the set of cached steps. Where the print of the paper is
wrong or silent, the docstring says what is done instead; common/docs/algorithm.md has the derivations.
"""

import numpy as np
import torch

PHI_DEFINITIONS = ("none", "velocity", "difference")


def euler_step(x: torch.Tensor, v: torch.Tensor, s: torch.Tensor, s_next: torch.Tensor) -> torch.Tensor:
    """Eq. 4, x_{i+1} = x_i + Δ_i v_i with Δ_i = s_{i+1} − s_i.

    x, v: latents of one shape, any float dtype. s, s_next: sigmas, float32 scalars (zero-dimensional). The sum is
    formed in float32 and returned in the dtype of v, as diffusers' FlowMatchEulerDiscreteScheduler does, bit for bit.
    """
    return (x.to(torch.float32) + (s_next - s) * v).to(v.dtype)


def residual(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Eq. 5, r̃ = v_c − x_c: what the network added to its input at the computed step c."""
    return v - x


def reuse(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Eq. 6, ṽ_i = x_i + r̃: the velocity of a cached step, without a model call."""
    return x + r


def l1_norm(x: torch.Tensor) -> float:
    """‖x‖₁ = Σ|x_j|, summed in float64, so that it adds up over batches and processes."""
    return total(x.abs())


def total(x: torch.Tensor) -> float:
    """Σ x_j in float64; on the CPU where the device of x has no float64 (Apple's GPUs)."""
    return (x.cpu() if x.device.type == "mps" else x).sum(dtype=torch.float64).item()


def relative_l1(distance: np.ndarray | float, norm: np.ndarray | float) -> np.ndarray:
    """Eq. 12, ‖r_i − r̃‖₁ / ‖r_gt,i‖₁ from its two sums over the calibration set; ≥ 0, and ∞ where the norm is 0."""
    distance, norm = np.asarray(distance, np.float64), np.asarray(norm, np.float64)
    return np.divide(distance, norm, out=np.full(np.broadcast(distance, norm).shape, np.inf), where=norm > 0)


def select_cached(distance: np.ndarray, norm: np.ndarray, threshold: float) -> tuple[int, ...]:
    """Algorithm 2, lines 8–22: the cached steps S for one λ.

    distance: [T, T], entry (c, i) with c < i holds ‖r_i − r_c‖₁ summed over the calibration set. norm: [T], ‖r_gt,i‖₁.
    Step i is cached when its error against the newest computed step c stays below the threshold λ; otherwise it
    becomes the newest. The first and the last step are always computed.
    """
    cached, newest = [], 0
    for i in range(1, len(norm) - 1):
        if relative_l1(distance[newest, i], norm[i]) < threshold:
            cached.append(i)
        else:
            newest = i
    return tuple(cached)


def uniform_cached(steps: int, nfe: int) -> tuple[int, ...]:
    """The schedule without a policy: `nfe` computed steps spread evenly over 0 … T−1, the others cached."""
    computed = set(np.rint(np.linspace(0, steps - 1, nfe)).astype(int).tolist())
    return tuple(i for i in range(steps) if i not in computed)


def step_coefficient(error_l1: float, reference_l1: float) -> float:
    """Eq. 13, φ_i = clip(1 − ‖ṽ_i − v_i‖₁ / reference, 0, 1), the factor on the interval of a cached step.

    The reference makes the definition: "difference" is the print, ‖v_i − v_{i−1}‖₁ in our count; it is degenerate
    (φ = 0) for the first cached step of a run. "velocity" is ‖v_i‖₁. With nothing to compare with, φ = 1.
    """
    if reference_l1 <= 0:
        return 1.0
    return float(np.clip(1.0 - error_l1 / reference_l1, 0.0, 1.0))


def adjusted_sigmas(sigmas: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """Eq. 13–14, the grid on which φ_i shrinks the interval of each cached step. float32 [T+1], same ends.

    sigmas: the native grid, [T+1]. phi: [T] in [0, 1], 1 on computed steps. Eq. 14 spreads what is left of the whole
    interval over the remaining steps; on a grid that is not uniform the remaining native intervals are scaled by one
    factor so that they sum to it. The last step takes the rest. All φ = 1 returns the native grid itself.
    """
    native = np.asarray(sigmas, np.float64)
    if np.all(np.asarray(phi) == 1.0):
        return np.asarray(sigmas, np.float32)
    grid = [native[0]]
    for i, interval in enumerate(np.diff(native)[:-1]):
        scale = (native[-1] - grid[-1]) / (native[-1] - native[i])  # remaining budget / remaining native intervals
        grid.append(grid[-1] + phi[i] * scale * interval)
    return np.array([*grid, native[-1]], np.float32)


def linear_sigmoid(z):
    """Eq. 17, σ(z) ≈ z/4 + 1/2, the form in which σ is fitted and therefore the form in which it is used."""
    return z / 4 + 0.5


def fit_kb(n: float, sum_v: float, sum_e: float, sum_vv: float, sum_ve: float) -> tuple[float, float]:
    """Eq. 20–21, K and B of ε ≈ σ(K ṽ + B) by least squares, from running sums over all elements and prompts.

    n: number of elements; sums of ṽ, ε, ṽ², ṽ·ε in float64. K = 4 S_vε / S_vv and B = 4 (ε̄ − ½) − K v̄. (Eq. 21 and 35
    print 4 K v̄; K already carries the 4.) A constant ṽ has no slope: K = 0.
    """
    mean_v, mean_e = sum_v / n, sum_e / n
    s_vv, s_ve = sum_vv - n * mean_v**2, sum_ve - n * mean_v * mean_e
    k = 4 * s_ve / s_vv if s_vv > 1e-12 * sum_vv else 0.0
    return k, 4 * (mean_e - 0.5) - k * mean_v


def rectify(v: torch.Tensor, k: float, b: float) -> torch.Tensor:
    """Eq. 15 and Algorithm 1, line 17: ṽ − σ(K ṽ + B) with the linear σ, formed in float32, in the dtype of v.

    K = 0, B = −2 leaves v as it is.
    """
    wide = v.to(torch.float32)
    return (wide - linear_sigmoid(k * wide + b)).to(v.dtype)
