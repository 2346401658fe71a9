"""STDiT3, the transformer of Open-Sora 1.2: attention within frames and along time, in turns.

Letters: B videos (with guidance: branches × videos), latents [B, C_in, T, H, W] of T' × H' × W' patches, S = H' W'
tokens a frame, C channels, L text tokens. Source: hpcaitech/Open-Sora v1.2.0; weights: hpcai-tech/OpenSora-STDiT-v3.
"""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from diffusers import CacheMixin, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from torch import nn

from ertacache.utils.errors import UserError

from .layers import PatchEmbed, RotaryEmbedding, STDiT3Block, pack_text

FREQUENCIES = 256  # of the sinusoids of time and frames per second


@dataclass(frozen=True)
class Conditioning:
    """What the blocks and the head are told about the time and the text.

    time: [B, 1, C]. modulation: [B, T' or 1, 6, C]. text: [B, L, C], text_mask: [B, 1, 1, L] or None (`pack_text`).
    x_mask: [B, T'] bool or None, false for frames of data, whose time is data_time [B, 1, C] (t = 0).
    """

    time: torch.Tensor
    modulation: torch.Tensor
    text: torch.Tensor
    text_mask: torch.Tensor | None
    x_mask: torch.Tensor | None = None
    data_time: torch.Tensor | None = None


class STDiT3Transformer3DModel(ModelMixin, ConfigMixin, CacheMixin):
    """Velocity, data − noise, of latents at a time, with a text; the defaults are STDiT3-XL/2's.

    in_channels: C_in. patch_size: (1, 2, 2) latents a token. hidden_size: C. depth: pairs of a spatial and a temporal
    block. caption_channels: of the text states. model_max_length: L. pred_sigma: the output has a second half of
    channels, which samplers drop. input_sq_size: pixels of the side that positions are scaled to.

    `patch_embed`, `condition`, `run_blocks` and `head` are the forward pass in four parts, for loops that skip some.
    diffusers' caches find the blocks by name: transformer_blocks[0] runs first, temporal_transformer_blocks[-1] last.
    """

    _no_split_modules = ("STDiT3Block",)
    _repeated_blocks = ("STDiT3Block",)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        pred_sigma: bool = True,
        input_sq_size: int = 512,
    ):
        super().__init__()
        self.out_channels = in_channels * (2 if pred_sigma else 1)
        self.patch_embed = PatchEmbed(in_channels, hidden_size, patch_size, input_sq_size)
        self.sinusoid = Timesteps(FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(FREQUENCIES, hidden_size)
        self.fps_embed = TimestepEmbedding(FREQUENCIES, hidden_size)
        self.time_modulation = nn.Linear(hidden_size, 6 * hidden_size)
        self.caption_projection = PixArtAlphaTextProjection(caption_channels, hidden_size)
        null_text = torch.randn(model_max_length, caption_channels) / caption_channels**0.5
        self.register_buffer("y_embedding", null_text)  # the text states of no prompt, [L, caption_channels]
        self.rope = RotaryEmbedding(hidden_size // num_heads)

        def blocks(temporal):
            return nn.ModuleList(STDiT3Block(hidden_size, num_heads, mlp_ratio, temporal) for _ in range(depth))

        self.transformer_blocks = blocks(temporal=False)
        self.temporal_transformer_blocks = blocks(temporal=True)
        self.norm_out = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)
        self.proj_out = nn.Linear(hidden_size, prod(patch_size) * self.out_channels)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None,
        fps: torch.Tensor | float,
        height: float,
        width: float,
        x_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Latents [B, C_in, T, H, W] → float32 [B, C_in or 2 C_in, T, H, W].

        height, width: of the video, in pixels. For the other arguments see `condition`.
        """
        tokens = self.patch_embed(self._check_latents(hidden_states), height, width)
        conditioning = self.condition(timestep, encoder_hidden_states, encoder_attention_mask, fps, x_mask)
        sample = self.head(self.run_blocks(tokens, conditioning), conditioning, hidden_states.shape[2:])
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    def condition(
        self,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None,
        fps: torch.Tensor | float,
        x_mask: torch.Tensor | None = None,
    ) -> Conditioning:
        """Everything that the blocks are told besides the tokens.

        timestep: [B], 1000 = noise … 0 = data, rounded to the weights' dtype. encoder_hidden_states: [B, L,
        caption_channels]. encoder_attention_mask: [n, L] of the tokenizer, not 0 where there is text, or None for all;
        with n < B it is repeated, so that null texts after n prompts take the lengths of those prompts. fps: frames a
        second, a number or [n]; 120 for a picture. x_mask: [B, T] bool, false for frames that are given as data.
        """
        text = encoder_hidden_states
        self._check_text(text, encoder_attention_mask)
        count, dtype, device = len(text), self.patch_embed.proj.weight.dtype, text.device
        fps = torch.as_tensor(fps, device=device).reshape(-1)
        fps = self._embed(self.fps_embed, fps.repeat(count // len(fps)))
        time = (self._embed(self.time_embed, timestep) + fps).unsqueeze(1)  # [B, 1, C]
        modulation = self._modulation(time)
        if encoder_attention_mask is not None:
            encoder_attention_mask = encoder_attention_mask.repeat(count // len(encoder_attention_mask), 1)
        text = pack_text(self.caption_projection(text.to(dtype)), encoder_attention_mask)
        if x_mask is None:
            return Conditioning(time, modulation, *text)
        data_time = (self._embed(self.time_embed, torch.zeros_like(timestep)) + fps).unsqueeze(1)
        modulation = torch.where(x_mask[:, :, None, None], modulation, self._modulation(data_time))
        return Conditioning(time, modulation, *text, x_mask, data_time)

    @apply_forward_hook
    def run_blocks(self, tokens: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Tokens [B, T', S, C] → tokens, through spatial block 0, temporal block 0, spatial block 1, …"""
        rotary = self.rope(tokens.shape[1])
        c = conditioning
        for spatial, temporal in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            tokens = spatial(tokens, c.text, c.modulation, c.text_mask)
            tokens = temporal(tokens, c.text, c.modulation, c.text_mask, rotary)
        return tokens

    @apply_forward_hook
    def head(self, tokens: torch.Tensor, conditioning: Conditioning, size: tuple[int, int, int]) -> torch.Tensor:
        """Tokens [B, T', S, C] → float32 [B, C_out, T, H, W]; size: (T, H, W) of the latents."""
        x = self._modulate_out(tokens, conditioning.time)
        if conditioning.x_mask is not None:  # frames of data are normalised twice, as the published model does
            data = self._modulate_out(x, conditioning.data_time)
            x = torch.where(conditioning.x_mask[:, :, None, None], x, data)
        a, b, c = self.config.patch_size
        frames, height, width = size
        layout = "B T (h w) (a b c C) -> B C (T a) (h b) (w c)"
        x = rearrange(self.proj_out(x), layout, h=-(-height // b), a=a, b=b, c=c)
        return x[:, :, :frames, :height, :width].float()

    def _embed(self, embedder: TimestepEmbedding, numbers: torch.Tensor) -> torch.Tensor:
        """[B] → [B, C]; the numbers are rounded to the weights' dtype, the sinusoids are made in float32."""
        dtype = self.patch_embed.proj.weight.dtype
        return embedder(self.sinusoid(numbers.to(dtype)).to(dtype))

    def _modulation(self, time: torch.Tensor) -> torch.Tensor:
        return self.time_modulation(F.silu(time)).unflatten(-1, (6, -1))

    def _modulate_out(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift, scale = (self.scale_shift_table + time.unsqueeze(2)).unsqueeze(3).unbind(2)  # [B, 1, 1, C] each
        return self.norm_out(x) * (1 + scale) + shift

    def _check_latents(self, latents: torch.Tensor) -> torch.Tensor:
        if latents.ndim != 5 or latents.shape[1] != self.config.in_channels:
            wanted = f"[B, {self.config.in_channels}, T, H, W]"
            raise UserError(f"hidden_states of shape {list(latents.shape)}: give latents {wanted}")
        return latents

    def _check_text(self, text: torch.Tensor, mask: torch.Tensor | None) -> None:
        length, channels = self.config.model_max_length, self.config.caption_channels
        if text.ndim != 3 or text.shape[1:] != (length, channels):
            raise UserError(f"encoder_hidden_states of shape {list(text.shape)}: give states [B, {length}, {channels}]")
        if mask is not None and (mask.ndim != 2 or mask.shape[1] != length or len(text) % len(mask)):
            wanted = f"[n, {length}] with n dividing {len(text)}"
            raise UserError(f"encoder_attention_mask of shape {list(mask.shape)}: give the tokenizer's mask, {wanted}")
