"""CogVideoX's scheduler steps as pure functions between any two noise levels.

diffusers' own steps go from t to t − stride, so that they cannot follow an adjusted grid (Eq. 14). These functions take
both ends of the step as ᾱ, the data's share of the variance (0 = noise … 1 = data). ᾱ is a zero-dimensional float64
tensor, as in the schedulers' tables, so that on the native grid the results equal the schedulers' bit for bit.

With ᾱ = cos²θ the latents are x = cos θ · data + sin θ · noise, and a v-prediction model returns v = dx/dθ.
"""

import torch


def predicted_data(x: torch.Tensor, v: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Return the data that v-prediction implies, cos θ · x − sin θ · v (Salimans & Ho 2022, Appendix D).

    Args:
        x: Latents.
        v: Model output, of the shape of x.
        alpha: ᾱ of x.
    """
    return alpha**0.5 * x - (1 - alpha) ** 0.5 * v


def ddim_step(x: torch.Tensor, v: torch.Tensor, alpha: torch.Tensor, alpha_next: torch.Tensor) -> torch.Tensor:
    """DDIM without noise (Song et al. 2021, Eq. 12): the rotation x' = cos(θ' − θ) x + sin(θ' − θ) v.

    Written as x' = a x + b · data, as in CogVideoXDDIMScheduler.

    Args:
        x: Latents.
        v: Model output, of the shape of x.
        alpha: ᾱ of x.
        alpha_next: ᾱ of x'.
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

    λ is the half log-SNR, ½ log(ᾱ / (1 − ᾱ)).

    Args:
        x: Latents.
        data: Predicted data at this step, of the shape of x.
        previous: Predicted data and ᾱ of the previous step; None for a first-order step.
        alpha: ᾱ of x.
        alpha_next: ᾱ of x'.
        noise: Standard normal, of the shape of x.
    """

    def half_log_snr(a):
        return ((a / (1 - a)) ** 0.5).log()

    h = half_log_snr(alpha_next) - half_log_snr(alpha)
    if previous is not None:
        data_previous, alpha_previous = previous
        r = (half_log_snr(alpha) - half_log_snr(alpha_previous)) / h
        data = (1 + 1 / (2 * r)) * data - 1 / (2 * r) * data_previous
    mean = ((1 - alpha_next) / (1 - alpha)) ** 0.5 * (-h).exp() * x - (-2 * h).expm1() * alpha_next**0.5 * data
    return mean + (1 - alpha_next) ** 0.5 * (1 - (-2 * h).exp()) ** 0.5 * noise
