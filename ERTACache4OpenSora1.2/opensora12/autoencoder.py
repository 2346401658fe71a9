"""The video autoencoder of Open-Sora 1.2: AutoencoderKL on each frame, then a causal network in time.

Shapes: videos [B, 3, F, H, W] in [−1, 1]; latents [B, C, F', H', W'], normalised as the transformer takes them. With
the published sizes C = 4, H' = ⌊H/8⌋, W' = ⌊W/8⌋; each full chunk of 17 frames gives 5 latent frames, a rest of r
frames ⌈r/4⌉, so that 51 frames are 15. Chunks do not see each other.

Source: hpcaitech/Open-Sora v1.2.0, `VideoAutoencoderPipeline`; weights: hpcai-tech/OpenSora-VAE-v1.2.
"""

import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from ertacache.utils.errors import UserError

from .temporal import TemporalAutoencoder


class AutoencoderOpenSora(ModelMixin, ConfigMixin):
    """Both stages and the normalisation between latents of the network and of the transformer.

    in_channels: of the video. spatial_*: sizes of the 2-D stage, one level for each entry of
    `spatial_block_out_channels`, and the factor on its latents. latent_channels: C. temporal_*: sizes of the stage in
    time; `temporal_downsample` has one flag fewer than levels. latents_shift, latents_scale: [C] each; normalised
    latents are (z − shift) / scale. micro_frame_size: frames of a chunk. micro_batch_size: frames that the 2-D stage
    takes at once, which changes memory and not the result.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        spatial_latent_channels: int = 4,
        spatial_block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        spatial_layers_per_block: int = 2,
        spatial_norm_num_groups: int = 32,
        spatial_scaling_factor: float = 0.18215,
        latent_channels: int = 4,
        temporal_block_out_channels: tuple[int, ...] = (128, 256, 256, 512),
        temporal_downsample: tuple[bool, ...] = (False, True, True),
        temporal_num_res_blocks: int = 4,
        temporal_norm_num_groups: int = 32,
        latents_shift: tuple[float, ...] = (-0.10, 0.34, 0.27, 0.98),
        latents_scale: tuple[float, ...] = (3.85, 2.32, 2.33, 3.06),
        micro_frame_size: int = 17,
        micro_batch_size: int = 4,
    ):
        super().__init__()
        if not len(latents_shift) == len(latents_scale) == latent_channels:
            raise UserError(
                f"latents_shift has {len(latents_shift)} and latents_scale {len(latents_scale)} numbers, "
                f"latent_channels is {latent_channels}: give one of each for every channel"
            )
        levels = len(spatial_block_out_channels)
        self.spatial = AutoencoderKL(
            in_channels=in_channels,
            out_channels=in_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=spatial_block_out_channels,
            layers_per_block=spatial_layers_per_block,
            latent_channels=spatial_latent_channels,
            norm_num_groups=spatial_norm_num_groups,
        )
        levels = (temporal_block_out_channels, temporal_downsample)
        sizes = (*levels, temporal_num_res_blocks, temporal_norm_num_groups)
        self.temporal = TemporalAutoencoder(spatial_latent_channels, latent_channels, *sizes)

    @property
    def spatial_factor(self) -> int:
        """Pixels a latent, in height and width."""
        return 2 ** (len(self.config.spatial_block_out_channels) - 1)

    def latent_frames(self, num_frames: int) -> int:
        """F' for F frames: each chunk is rounded up by itself."""
        chunks, rest = divmod(num_frames, self.config.micro_frame_size)
        return chunks * self._chunk_latents(self.config.micro_frame_size) + self._chunk_latents(rest)

    def latent_size(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(F', H', W') of a video; pixels beyond a multiple of the spatial factor are lost."""
        return self.latent_frames(num_frames), height // self.spatial_factor, width // self.spatial_factor

    @apply_forward_hook
    def encode(
        self, x: torch.Tensor, sample_frames: bool = True, generator: torch.Generator | None = None
    ) -> AutoencoderKLOutput:
        """Videos [B, 3, F, H, W] → `.latent_dist` over normalised latents, with `sample()` and `mode()`.

        sample_frames: whether what enters the second stage is drawn from the first one's posterior, as upstream does,
        or is its mode.
        """
        frames = self.encode_frames(x, sample_frames, generator)
        chunks = frames.split(self.config.micro_frame_size, dim=2)
        mean, logvar = torch.cat([self.temporal.encode(chunk) for chunk in chunks], dim=2).chunk(2, dim=1)
        shift, scale = self._statistics(mean)
        moments = torch.cat([(mean - shift) / scale, logvar.clamp(-30, 20) - 2 * scale.log()], dim=1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    @apply_forward_hook
    def decode(self, z: torch.Tensor, num_frames: int, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Normalised latents [B, C, F', H', W'] of F = `num_frames` frames → videos [B, 3, F, 8 H', 8 W']."""
        if z.shape[2] != self.latent_frames(num_frames):
            raise UserError(
                f"num_frames {num_frames} has {self.latent_frames(num_frames)} latent frames, the latents have "
                f"{z.shape[2]}: give the number of frames that they were made for"
            )
        shift, scale = self._statistics(z)
        size = self.config.micro_frame_size
        chunks = (z * scale + shift).split(self._chunk_latents(size), dim=2)
        counts = [min(size, num_frames - start) for start in range(0, num_frames, size)]
        frames = [self.temporal.decode(chunk, count) for chunk, count in zip(chunks, counts, strict=True)]
        video = self.decode_frames(torch.cat(frames, dim=2))
        return DecoderOutput(sample=video) if return_dict else (video,)

    def forward(
        self, x: torch.Tensor, sample_posterior: bool = False, generator: torch.Generator | None = None
    ) -> DecoderOutput:
        """Encode and decode; `sample_posterior` says whether both stages draw their latents or take the mode."""
        posterior = self.encode(x, sample_posterior, generator).latent_dist
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, num_frames=x.shape[2])

    def encode_frames(
        self, x: torch.Tensor, sample: bool = True, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """The first stage: [B, 3, F, H, W] → scaled latents of the frames [B, C, F, H', W']."""

        def encode(frames):
            posterior = self.spatial.encode(frames).latent_dist
            return posterior.sample(generator) if sample else posterior.mode()

        return self._each_frame(encode, x) * self.config.spatial_scaling_factor

    def decode_frames(self, z: torch.Tensor) -> torch.Tensor:
        """The inverse of `encode_frames`."""
        z = z / self.config.spatial_scaling_factor
        return self._each_frame(lambda frames: self.spatial.decode(frames).sample, z)

    def _each_frame(self, function, x: torch.Tensor) -> torch.Tensor:
        frames = x.transpose(1, 2).flatten(0, 1).split(self.config.micro_batch_size)  # [≤ 4, C, H, W] each
        return torch.cat([function(batch) for batch in frames]).unflatten(0, (x.shape[0], -1)).transpose(1, 2)

    def _chunk_latents(self, frames: int) -> int:
        return -(-frames // self.temporal.factor)

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shift and scale as [1, C, 1, 1, 1], rounded to the dtype that they meet."""
        pair = torch.tensor([self.config.latents_shift, self.config.latents_scale])
        return pair.view(2, 1, -1, 1, 1, 1).to(like).unbind()
