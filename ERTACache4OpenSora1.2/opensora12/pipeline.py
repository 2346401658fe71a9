"""Text to video with Open-Sora 1.2, in the manner of diffusers.

Shapes: B videos [B, F, height, width, 3] (np) or [B, F, 3, height, width] (pt) in [0, 1]; latents [B, C, F', H', W']
in float32, for sizes see `AutoencoderOpenSora`; text states [B, L, D], L = 300 tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from ertacache.utils.errors import UserError

from .autoencoder import AutoencoderOpenSora
from .prompts import append_scores, clean
from .scheduler import RFlowScheduler
from .transformer import STDiT3Transformer3DModel

Generators = torch.Generator | list[torch.Generator]


@dataclass
class OpenSoraPipelineOutput(BaseOutput):
    """frames: videos [B, F, height, width, 3] or [B, F, 3, height, width] in [0, 1], or latents."""

    frames: np.ndarray | torch.Tensor


class OpenSoraPipeline(DiffusionPipeline):
    """Tokenizer and T5 encoder → STDiT3 along a rectified flow → video autoencoder.

    sample_height, sample_width, sample_frames: of a video when none are asked for, in pixels.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: T5EncoderModel,
        vae: AutoencoderOpenSora,
        transformer: STDiT3Transformer3DModel,
        scheduler: RFlowScheduler,
        sample_height: int = 480,
        sample_width: int = 854,
        sample_frames: int = 51,
    ):
        super().__init__()
        self.register_to_config(sample_height=sample_height, sample_width=sample_width, sample_frames=sample_frames)
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self.video_processor = VideoProcessor()
        self._current_timestep = None
        self._check_components()

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The time of the step that runs, 1000 … 0, for caches that ask; None between runs."""
        return self._current_timestep

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.0,
        aesthetic_score: float | None = 6.5,
        motion_score: float | None = None,
        camera_motion: str | None = None,
        fps: float | None = None,
        generator: Generators | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "np",
        callback_on_step_end: Callable | None = None,
        return_dict: bool = True,
    ) -> OpenSoraPipelineOutput | tuple:
        """Videos of the prompts; a width of 854 gives 848, the whole patches of the autoencoder.

        guidance_scale: g of v_null + g (v_cond − v_null); at most 1 is no guidance and half the work. fps: frames a
        second that the model is told, by default 24, and 120 for a single frame. generator: one, or one a prompt.
        latents: the noise to start from. output_type: np, pt or latent. callback_on_step_end(pipe, i, t, {"latents":
        …}) may return a dict with other latents.
        """
        height = self.config.sample_height if height is None else height
        width = self.config.sample_width if width is None else width
        num_frames = self.config.sample_frames if num_frames is None else num_frames
        prompts = [prompt] if isinstance(prompt, str) else prompt
        self.check_inputs(prompts, height, width, num_frames, num_inference_steps, generator, output_type)
        device, size = self._execution_device, (num_frames, height, width)
        self.set_timesteps(num_inference_steps, *size, device)
        latents = self.prepare_latents(len(prompts), *size, device, generator, latents)
        text, mask = self.encode_prompt(prompts, aesthetic_score, motion_score, camera_motion, device)
        conditioning = self.conditioning(text, mask, *size, fps, guided=guidance_scale > 1)
        latents = self.denoise(latents, conditioning, guidance_scale, callback_on_step_end)
        frames = latents if output_type == "latent" else self.decode_latents(latents, num_frames, output_type)
        self.maybe_free_model_hooks()
        return OpenSoraPipelineOutput(frames=frames) if return_dict else (frames,)

    def encode_prompt(
        self,
        prompts: list[str],
        aesthetic_score: float | None = 6.5,
        motion_score: float | None = None,
        camera_motion: str | None = None,
        device: torch.device | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Text states [B, L, D] of the prompts with their scores, and the tokenizer's mask [B, L]."""
        texts = [clean(append_scores(p, aesthetic_score, motion_score, camera_motion)) for p in prompts]
        length = self.transformer.config.model_max_length
        options = {"padding": "max_length", "truncation": True, "return_attention_mask": True, "return_tensors": "pt"}
        tokens = self.tokenizer(texts, max_length=length, **options).to(device or self._execution_device)
        text = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return text, tokens.attention_mask

    def prepare_latents(
        self,
        batch_size: int,
        num_frames: int,
        height: int,
        width: int,
        device: torch.device,
        generator: Generators | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Float32 noise [B, C, F', H', W'] of standard deviation 1; given latents are checked and moved."""
        shape = (batch_size, self.vae.config.latent_channels, *self.vae.latent_size(num_frames, height, width))
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if latents.shape != shape:
            raise UserError(f"latents of shape {list(latents.shape)}: these prompts and sizes need {list(shape)}")
        return latents.to(device, torch.float32)

    def set_timesteps(
        self, num_inference_steps: int, num_frames: int, height: int, width: int, device: torch.device | None = None
    ) -> None:
        """Set the scheduler's grid, from sizes in the dtype of the transformer as upstream holds them."""
        self.scheduler.set_timesteps(
            num_inference_steps,
            device,
            height=height,
            width=width,
            num_frames=num_frames,
            size_dtype=self.transformer.dtype,
        )

    def conditioning(
        self,
        text: torch.Tensor,
        mask: torch.Tensor,
        num_frames: int,
        height: int,
        width: int,
        fps: float | None = None,
        guided: bool = True,
    ) -> dict[str, Any]:
        """What the transformer is told besides latents and time: texts [cond; null] if guided, their mask, and sizes.

        Null rows read as many tokens of the null text as their prompts have. Height, width and fps are rounded to the
        dtype of the transformer, as upstream's are: in bfloat16 a width of 854 is 856.
        """
        if guided:
            text = torch.cat([text, self.transformer.y_embedding.to(text).expand_as(text)])
        numbers = [height, width, fps or (24 if num_frames > 1 else 120)]
        height, width, fps = torch.tensor(numbers, dtype=self.transformer.dtype).tolist()
        sizes = {"fps": fps, "height": height, "width": width}
        return {"encoder_hidden_states": text, "encoder_attention_mask": mask, **sizes}

    def denoise(
        self,
        latents: torch.Tensor,
        conditioning: dict[str, Any],
        guidance_scale: float = 7.0,
        callback_on_step_end: Callable | None = None,
    ) -> torch.Tensor:
        """Noise → latents of videos along the scheduler's grid, told the `conditioning`."""
        self.scheduler.set_begin_index()
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            self._current_timestep = t
            v = self.velocity(latents, t, conditioning, guidance_scale)
            latents = self.scheduler.step(v, t, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                latents = (callback_on_step_end(self, i, t, {"latents": latents}) or {}).get("latents", latents)
        self._current_timestep = None
        return latents

    def velocity(
        self, latents: torch.Tensor, t: torch.Tensor, conditioning: dict[str, Any], guidance_scale: float = 7.0
    ) -> torch.Tensor:
        """Guided velocity of latents at time t, a scalar from 1000 to 0: one call with the batch [cond; null]."""
        guided, channels = guidance_scale > 1, latents.shape[1]
        latents = torch.cat([latents, latents]) if guided else latents
        with self.transformer.cache_context("cond_uncond" if guided else "cond"):
            v = self.transformer(latents, t.expand(len(latents)), **conditioning, return_dict=False)[0]
        v = v[:, :channels]  # the other half is the sigma that training predicts besides
        if not guided:
            return v
        cond, null = v.chunk(2)
        return null + guidance_scale * (cond - null)

    def decode_latents(self, latents: torch.Tensor, num_frames: int, output_type: str = "np"):
        """Latents [B, C, F', H', W'] → videos in [0, 1], np [B, F, height, width, 3] or pt [B, F, 3, height, width]."""
        videos = self.vae.decode(latents.to(self.vae.dtype), num_frames, return_dict=False)[0]
        return self.video_processor.postprocess_video(videos.float(), output_type)

    def check_inputs(
        self,
        prompts: list[str],
        height: int,
        width: int,
        num_frames: int,
        num_inference_steps: int,
        generator: Generators | None = None,
        output_type: str = "np",
    ) -> None:
        """Refuse what cannot run, by its value."""
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise UserError(f"prompt {prompts!r}: give a text or a list of texts")
        patch = self.vae.spatial_factor
        numbers = {"height": (height, patch), "width": (width, patch), "num_frames": (num_frames, 1)}
        for name, (value, minimum) in (numbers | {"num_inference_steps": (num_inference_steps, 1)}).items():
            if not isinstance(value, int) or value < minimum:
                raise UserError(f"{name} {value}: give a whole number of at least {minimum}")
        if isinstance(generator, list) and len(generator) != len(prompts):
            raise UserError(f"generators: {len(generator)}, prompts: {len(prompts)}; give one, or one a prompt")
        if output_type not in ("np", "pt", "latent"):
            raise UserError(f"output_type {output_type!r}: give np, pt or latent")

    def _check_components(self) -> None:
        if self.transformer is None:
            return
        config = self.transformer.config
        if self.text_encoder is not None and self.text_encoder.config.d_model != config.caption_channels:
            raise UserError(
                f"the text encoder gives {self.text_encoder.config.d_model} channels, the transformer takes "
                f"{config.caption_channels}: load the text encoder that it was trained with"
            )
        if self.vae is not None and self.vae.config.latent_channels != config.in_channels:
            raise UserError(
                f"the autoencoder's latents have {self.vae.config.latent_channels} channels, the transformer takes "
                f"{config.in_channels}: load the autoencoder that it was trained with"
            )
