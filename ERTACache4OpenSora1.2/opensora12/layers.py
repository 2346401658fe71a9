"""What STDiT3 is made of: embeddings of position and text-conditioned blocks.

Letters: B videos (with guidance: branches × videos), T latent frames, S tokens a frame, N = T · S, L text tokens,
C channels, H heads of D = C / H channels.
"""

from math import sqrt

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.normalization import RMSNorm
from torch import nn

from ertacache.utils.errors import UserError


def inverse_frequencies(channels: int, device=None) -> torch.Tensor:
    """10000^(−2j / channels) for j = 0 … channels/2 − 1, float32."""
    return 1.0 / 10000 ** (torch.arange(0, channels, 2, device=device, dtype=torch.float32) / channels)


def coordinates(count: int, scale: float, base_size: int, device=None) -> torch.Tensor:
    """Places of `count` tokens along a side, float32 [count]: (index / scale) · (base_size / count).

    scale: side of the video over the side trained at. base_size: side of a square of as many tokens.
    """
    return torch.arange(count, device=device, dtype=torch.float32) / scale * (base_size / count)


def position_embedding(rows: torch.Tensor, columns: torch.Tensor, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """Sines and cosines of each token's column, then of its row: [S, C], tokens row-major.

    rows, columns: float32 coordinates. The frequencies are rounded to `dtype` as upstream's are with its weights; the
    angles are float32.
    """
    frequencies = inverse_frequencies(channels // 2, rows.device).to(dtype).float()

    def waves(places):
        angles = places[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # [count, C/2]

    shape = (len(rows), len(columns), channels // 2)
    parts = waves(columns)[None].expand(shape), waves(rows)[:, None].expand(shape)
    return torch.cat(parts, dim=-1).flatten(0, 1).to(dtype)


class PatchEmbed(nn.Module):
    """Latents [B, C_in, T, H, W], filled up with zeros to whole patches → tokens [B, T', S, C] with their positions.

    input_sq_size: pixels of the side that positions are scaled to.
    """

    def __init__(self, in_channels: int, channels: int, patch_size: tuple[int, int, int], input_sq_size: int):
        super().__init__()
        self.proj = nn.Conv3d(in_channels, channels, patch_size, patch_size)
        self.input_sq_size = input_sq_size

    def forward(self, latents: torch.Tensor, height: float, width: float) -> torch.Tensor:
        """height, width: of the video, in pixels."""
        sides = zip(latents.shape[2:], self.proj.kernel_size, strict=True)
        fill = [n for size, patch in sides for n in (-size % patch, 0)][::-1]  # F.pad begins with the width
        x = self.proj(F.pad(latents.to(self.proj.weight.dtype), fill))
        _, channels, _, rows, columns = x.shape
        scale, base_size = sqrt(height * width) / self.input_sq_size, round(sqrt(rows * columns))
        places = [coordinates(count, scale, base_size, x.device) for count in (rows, columns)]
        return x.flatten(3).permute(0, 2, 3, 1) + position_embedding(*places, channels, x.dtype)


class RotaryEmbedding(nn.Module):
    """Rotates the channel pairs (2j, 2j + 1) of queries and keys by position · freqs[j].

    freqs: [D/2], part of the checkpoint, never trained. Everything is in its dtype, also positions and angles.
    """

    def __init__(self, head_dim: int):
        super().__init__()
        self.register_buffer("freqs", inverse_frequencies(head_dim))

    def forward(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of positions 0 … length − 1, [length, D], each angle twice."""
        positions = torch.arange(length, device=self.freqs.device).to(self.freqs.dtype)
        angles = (positions[:, None] * self.freqs).repeat_interleave(2, dim=-1)
        return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """(a, b) → (a cos − b sin, b cos + a sin) on channel pairs of x [..., length, D]."""
    cos, sin = rotary
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin


class SelfAttention(nn.Module, AttentionModuleMixin):
    """Attention within each row of [rows, length, C], with normalised and, if given, rotated queries and keys."""

    _supports_qkv_fusion = False  # the checkpoint holds it fused
    is_cross_attention = False

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.norm_q = RMSNorm(channels // heads, eps=1e-6)
        self.norm_k = RMSNorm(channels // heads, eps=1e-6)
        self.to_out = nn.Linear(channels, channels)

    def forward(
        self, hidden_states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        qkv = self.to_qkv(hidden_states).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [rows, H, length, D] each
        q, k = self.norm_q(q), self.norm_k(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module, AttentionModuleMixin):
    """Attention of tokens [B, N, C] to the text [B, L, C] of their row."""

    _supports_qkv_fusion = False
    is_cross_attention = True

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(channels, 2 * channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """mask: bool [B, 1, 1, L], true where there is text; None where every row has L tokens."""
        q = self.to_q(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, N, D]
        k, v = self.to_kv(encoder_hidden_states).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.to_out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def pack_text(text: torch.Tensor, keep: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Text [B, L, C] and keep [B, L] → the kept tokens [B, L', C], and a mask [B, 1, 1, L'] if rows differ in length.

    Rows of one length, as with one prompt and its null text, need no mask, so that the fast kernels can run.
    """
    if keep is None:
        return text, None
    keep = keep.bool()
    lengths = keep.sum(1).tolist()
    if 0 in lengths:
        raise UserError(f"encoder_attention_mask keeps no token of row {lengths.index(0)}: keep its end token")
    if len(set(lengths)) == 1:
        return text[keep].unflatten(0, (len(text), -1)), None
    used = keep.any(0)
    return text[:, used], keep[:, None, None, used]


class STDiT3Block(nn.Module):
    """Self attention within each frame or, if temporal, along time at each place; cross attention; feed-forward."""

    def __init__(self, channels: int, heads: int, mlp_ratio: float, temporal: bool):
        super().__init__()
        self.temporal = temporal
        self.scale_shift_table = nn.Parameter(torch.randn(6, channels) / channels**0.5)
        self.norm1 = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(channels, heads)
        self.cross_attn = CrossAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.ff = FeedForward(channels, inner_dim=int(channels * mlp_ratio), activation_fn="gelu-approximate")

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        modulation: torch.Tensor,
        text_mask: torch.Tensor | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """hidden_states: [B, T, S, C]; encoder_hidden_states: [B, L, C]; modulation: [B, T or 1, 6, C]."""
        x = hidden_states
        table = (self.scale_shift_table + modulation).unsqueeze(3)  # [B, T or 1, 6, 1, C]
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = table.unbind(2)
        x = x + gate_a * self._attend(self.norm1(x) * (1 + scale_a) + shift_a, rotary)
        x = x + self.cross_attn(x.flatten(1, 2), encoder_hidden_states, text_mask).view_as(x)
        return x + gate_f * self.ff(self.norm2(x) * (1 + scale_f) + shift_f)

    def _attend(self, x: torch.Tensor, rotary) -> torch.Tensor:
        if not self.temporal:
            return self.attn(x.flatten(0, 1)).view_as(x)  # rows are frames
        x = x.transpose(1, 2)  # rows are places
        return self.attn(x.flatten(0, 1), rotary).view_as(x).transpose(1, 2)


# diffusers' block caches (FirstBlockCache, MagCache) look up here what a block returns.
TransformerBlockRegistry.register(STDiT3Block, TransformerBlockMetadata(return_hidden_states_index=0))
