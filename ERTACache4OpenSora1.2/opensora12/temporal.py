"""The second stage of Open-Sora 1.2's autoencoder: a causal 3-D convolutional network that shortens time.

Shapes: [B, C, F, H, W], F frames; height and width never change. Every convolution sees its own and earlier frames
only, with zeros before the first, so that a frame's latent depends on no later frame, group norms apart.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


class CausalConv3d(nn.Conv3d):
    """A convolution over k × k × k of the frame and the k − 1 before it; with time_stride s, F frames become ⌊F/s⌋."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, time_stride: int = 1, bias=True):
        side = kernel_size // 2
        stride, padding = (time_stride, 1, 1), (0, side, side)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.front = kernel_size - time_stride  # frames of zeros: fewer with a stride, which starts inside them

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(x, (0, 0, 0, 0, self.front, 0)))


class TemporalUpsample(CausalConv3d):
    """Twice the frames: channel c at frame 2t + s is channel 2c + s of the convolution at frame t."""

    def __init__(self, channels: int):
        super().__init__(channels, 2 * channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x).unflatten(1, (-1, 2))  # [B, C, 2, F, H, W]
        return x.transpose(2, 3).flatten(2, 3)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1 × 1 × 1 convolution on x where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, bias=False)
        self.norm2 = nn.GroupNorm(num_groups, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, bias=False)
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = CausalConv3d(in_channels, out_channels, kernel_size=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


def res_blocks(in_channels: int, out_channels: int, count: int, num_groups: int) -> nn.Sequential:
    """`count` residual blocks, the first of which changes the width."""
    widths = [in_channels] + [out_channels] * count
    return nn.Sequential(*(ResBlock(a, b, num_groups) for a, b in pairwise(widths)))


class TemporalEncoder(nn.Module):
    """[B, C, F, H, W] → [B, C', F/s, H, W], with s = 2 to the number of levels that `downsample`."""

    def __init__(self, in_channels: int, out_channels: int, widths, downsample, num_res_blocks: int, num_groups: int):
        super().__init__()
        self.conv_in = CausalConv3d(in_channels, widths[0], bias=False)
        inputs = [widths[0], *widths[:-1]]
        self.levels = nn.ModuleList(
            res_blocks(a, b, num_res_blocks, num_groups) for a, b in zip(inputs, widths, strict=True)
        )
        self.downsamplers = nn.ModuleList(
            CausalConv3d(width, width, time_stride=2) if down else nn.Identity()
            for width, down in zip(widths, [*downsample, False], strict=True)
        )
        self.mid = res_blocks(widths[-1], widths[-1], num_res_blocks, num_groups)
        self.norm_out = nn.GroupNorm(num_groups, widths[-1])
        self.conv_out = CausalConv3d(widths[-1], out_channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for level, downsampler in zip(self.levels, self.downsamplers, strict=True):
            x = downsampler(level(x))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class TemporalDecoder(nn.Module):
    """[B, C', F', H, W] → [B, C, s F', H, W]; levels are numbered as the encoder's, run backwards."""

    def __init__(self, in_channels: int, out_channels: int, widths, downsample, num_res_blocks: int, num_groups: int):
        super().__init__()
        self.conv_in = CausalConv3d(in_channels, widths[-1])
        self.mid = res_blocks(widths[-1], widths[-1], num_res_blocks, num_groups)
        inputs = [*widths[1:], widths[-1]]
        self.levels = nn.ModuleList(
            res_blocks(a, b, num_res_blocks, num_groups) for a, b in zip(inputs, widths, strict=True)
        )
        self.upsamplers = nn.ModuleList(
            TemporalUpsample(width) if up else nn.Identity() for width, up in zip(widths[1:], downsample, strict=True)
        )
        self.norm_out = nn.GroupNorm(num_groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], out_channels)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.levels[-1](self.mid(self.conv_in(z)))
        for upsampler, level in zip(reversed(self.upsamplers), reversed(self.levels[:-1]), strict=True):
            x = level(upsampler(x))
        return self.conv_out(F.silu(self.norm_out(x)))


class TemporalAutoencoder(nn.Module):
    """Frames' latents [B, C, F, H, W] ↔ latents in time [B, C', ⌈F/s⌉, H, W]; both ends are one chunk of a video.

    channels: C. latent_channels: C'. widths: channels of each level. downsample: whether time is halved after a level,
    one flag fewer than levels.
    """

    def __init__(self, channels: int, latent_channels: int, widths, downsample, num_res_blocks: int, num_groups: int):
        super().__init__()
        sizes = (widths, downsample, num_res_blocks, num_groups)
        self.factor = 2 ** sum(downsample)
        self.encoder = TemporalEncoder(channels, 2 * latent_channels, *sizes)
        self.quant_conv = CausalConv3d(2 * latent_channels, 2 * latent_channels, kernel_size=1)
        self.post_quant_conv = CausalConv3d(latent_channels, latent_channels, kernel_size=1)
        self.decoder = TemporalDecoder(latent_channels, channels, *sizes)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Mean and log-variance, joined along the channels. Zeros fill the front up to a multiple of the factor."""
        front = -x.shape[2] % self.factor
        return self.quant_conv(self.encoder(F.pad(x, (0, 0, 0, 0, front, 0))))

    def decode(self, z: torch.Tensor, num_frames: int) -> torch.Tensor:
        """The last `num_frames` of the decoded frames: those in front stand for the zeros of `encode`."""
        return self.decoder(self.post_quant_conv(z))[:, :, -num_frames % self.factor :]
