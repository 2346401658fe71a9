"""CogVideoX's scheduler steps as pure functions between any two noise levels.

diffusers' own steps go from t to t − stride, so that they cannot follow an adjusted grid (Eq. 14). These take both
ends, as ᾱ (the data's share of the variance, 0 = noise … 1 = data): zero-dimensional float64 tensors, as the
schedulers' tables hold them, so that on the native grid the results equal the schedulers' bit for bit.

With ᾱ = cos²θ the latent is x = cos θ · data + sin θ · noise, and v = dx/dθ is the output of a v-prediction model.
"""

import torch


def predicted_data(x: torch.Tensor, v: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """The data that v-prediction implies, cos θ · x − sin θ · v (Salimans & Ho 2022, Appendix D)."""
    return alpha**0.5 * x - (1 - alpha) ** 0.5 * v


def ddim_step(x: torch.Tensor, v: torch.Tensor, alpha: torch.Tensor, alpha_next: torch.Tensor) -> torch.Tensor:
    """DDIM without noise (Song et al. 2021, Eq. 12): the rotation x' = cos(θ' − θ) x + sin(θ' − θ) v.

    Written as x' = a x + b · data, as CogVideoXDDIMScheduler does; x, v: latents of one shape.
    """
    a = ((1 - alpha_next) / (1 - alpha)) ** 0.5
    return a * x + (alpha_next**0.5 - alpha**0.5 * a) * predicted_data(x, v, alpha)


def dpm_step(
    x: torch.Tensor,
    data: torch.Tensor,
    previous: tuple[torch.Tensor, torch.Tensor] | None,
    alpha: torch.Tensor,
    alpha_next: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """The stochastic second-order DPM-Solver++ step (Lu et al. 2022, Eq. 9 and SDE variant) of CogVideoXDPMScheduler.

    data: predicted at this step; previous: (predicted data, ᾱ) of the step before, or None for a first-order step.
    noise: standard normal, of the shape of x. λ is the half log-SNR, ½ log(ᾱ / (1 − ᾱ)).
    """

    def half_log_snr(a):
        return ((a / (1 - a)) ** 0.5).log()

    h = half_log_snr(alpha_next) - half_log_snr(alpha)
    if previous is not None:
        earlier, alpha_earlier = previous
        r = (half_log_snr(alpha) - half_log_snr(alpha_earlier)) / h
        data = (1 + 1 / (2 * r)) * data - 1 / (2 * r) * earlier
    drift = ((1 - alpha_next) / (1 - alpha)) ** 0.5 * (-h).exp() * x - (-2 * h).expm1() * alpha_next**0.5 * data
    return drift + (1 - alpha_next) ** 0.5 * (1 - (-2 * h).exp()) ** 0.5 * noise
