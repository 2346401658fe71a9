"""The rectified flow of Open-Sora 1.2 (source: hpcaitech/Open-Sora v1.2.0, `RFLOW`).

Time runs from 1000 (noise) to 0 (data): x_t = (1 − σ) data + σ noise with σ = t / 1000, and the model's velocity is
v = data − noise, against time.
"""

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from ertacache.utils.errors import UserError


def timestep_shift(
    height: float, width: float, num_frames: int, dtype: torch.dtype = torch.float32, base_size: int = 512
) -> torch.Tensor:
    """r = √(height · width / base_size²) · √(5 ⌊frames / 17⌋), the second factor 1 for a picture; sizes in pixels.

    From 2 to 16 frames r would be 0, and is refused.

    dtype: in which the sizes are held and r is computed. Upstream's is bfloat16 with a bfloat16 model: 480 × 854 × 51
    has r = 4.84375 there and 4.84312 in float32.
    """
    if 1 < num_frames < 17:
        raise UserError(f"num_frames {num_frames}: there are no times for 2 to 16 frames, give 1 or at least 17")
    height, width, frames = torch.tensor([height, width, num_frames], dtype=torch.float64).to(dtype)
    latent_frames = torch.ones_like(frames) if num_frames == 1 else frames // 17 * 5
    return (height * width / base_size**2).sqrt() * latent_frames.sqrt()


def shift_sigmas(sigmas: torch.Tensor, shift: torch.Tensor | float) -> torch.Tensor:
    """σ' = r σ / (1 + (r − 1) σ): more of the steps in the noise for larger videos. Keeps 0 and 1."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


class RFlowScheduler(SchedulerMixin, ConfigMixin):
    """Euler steps of a rectified flow on a grid that depends on the size of the video.

    num_train_timesteps: the time of pure noise. base_size: side in pixels of the picture that r = 1 belongs to.
    timesteps: float32 [N], from the noise down. sigmas: float32 [N + 1], the shares of noise at these times and a 0.
    """

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, base_size: int = 512):
        self.timesteps, self.sigmas = None, None
        self._step_index = None

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        *,
        height: float,
        width: float,
        num_frames: int,
        size_dtype: torch.dtype = torch.float32,
    ) -> None:
        """The grid for N steps on videos of this size, in pixels and frames; size_dtype: see `timestep_shift`."""
        shift = timestep_shift(height, width, num_frames, size_dtype, self.config.base_size)
        end = self.config.num_train_timesteps
        base = torch.tensor([(1 - i / num_inference_steps) * end for i in range(num_inference_steps)])
        self.timesteps = (end * shift_sigmas(base / end, shift)).to(device)
        self.sigmas = torch.cat([self.timesteps / end, self.timesteps.new_zeros(1)])
        self._step_index = None

    @property
    def step_index(self) -> int | None:
        """The step that comes next; None before the first."""
        return self._step_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Take the next step from this place of the grid, whatever its timestep."""
        self._step_index = begin_index

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """x_{i+1} = x_i + (σ_i − σ_{i+1}) v, in float32 whatever the model's dtype.

        timestep: t_i; it finds the place in the grid at the first step, later steps follow each other.
        """
        if self._step_index is None:
            self._step_index = int((self.timesteps - timestep).abs().argmin())
        dt = self.sigmas[self._step_index] - self.sigmas[self._step_index + 1]
        self._step_index += 1
        sample = sample.float() + model_output.float() * dt
        return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = (1 − σ) data + σ noise, for training; timesteps: [B], of any value from 0 to 1000."""
        sigma = (timesteps / self.config.num_train_timesteps).to(original_samples)
        sigma = sigma.view(-1, *[1] * (original_samples.ndim - 1))
        return (1 - sigma) * original_samples + sigma * noise
