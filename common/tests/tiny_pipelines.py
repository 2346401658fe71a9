"""Stock diffusers pipelines at tiny size: real classes, random weights with fixed seeds, text states given."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

STEPS = 8


@dataclass
class Tiny:
    """A pipeline, how it is called, and the transformer's calls at each step (guidance branches one by one)."""

    pipe: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    branches: int = 1

    def run(self, steps=STEPS, seed=0, **changes) -> torch.Tensor:
        """The final latents of one call."""
        options = {"num_inference_steps": steps, "output_type": "latent", "return_dict": False}
        generator = torch.Generator().manual_seed(seed)
        return self.pipe(**{**self.arguments, **options, "generator": generator, **changes})[0]


def in_dtype(tiny: Tiny, dtype: torch.dtype) -> Tiny:
    """The same with its weights in a dtype, and so is all that it is given or that a stand-in of an encoder makes."""

    def cast(value):
        if isinstance(value, torch.Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        return type(value)(map(cast, value)) if isinstance(value, list | tuple) else value

    def casting(encode):
        return lambda *given, **options: cast(encode(*given, **options))

    for part in tiny.pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(dtype)
    for name, method in list(vars(tiny.pipe).items()):
        if inspect.isfunction(method):
            setattr(tiny.pipe, name, casting(method))
    tiny.arguments = {name: cast(value) for name, value in tiny.arguments.items()}
    return tiny


def _tiny(pipeline, branches=1, parts=None, **arguments) -> Tiny:
    """The pipeline of this name from its parts; encoders and tokenizers are not there."""
    names = getattr(diffusers, pipeline)._get_signature_keys(getattr(diffusers, pipeline))[0]
    pipe = getattr(diffusers, pipeline)(**{name: (parts or {}).get(name) for name in names})
    pipe.set_progress_bar_config(disable=True)
    return Tiny(pipe, arguments, branches)


def _model(name, **config):
    torch.manual_seed(0)
    return getattr(diffusers, name)(**config).eval().requires_grad_(False)


def _text(*shape, seed=1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _image(size=32) -> Image.Image:
    pixels = torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    return Image.fromarray(pixels.numpy())


def _autoencoder():
    """Return an image autoencoder: 2× down, 4 channels."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    size = {"block_out_channels": (4, 4), "latent_channels": 4, "norm_num_groups": 2, "shift_factor": 0.0}
    return _model("AutoencoderKL", **blocks, **size)


FLUX = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}


def flux(pipeline="FluxPipeline", **arguments) -> Tiny:
    parts = {
        "vae": _autoencoder(),
        "transformer": _model("FluxTransformer2DModel", **FLUX, guidance_embeds=True),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }
    if "ControlNet" in pipeline:
        parts["controlnet"] = _model("FluxControlNetModel", **FLUX, guidance_embeds=True)
        for parameter in parts["controlnet"].parameters():  # its last layers begin with zeros, and would say nothing
            torch.nn.init.normal_(parameter, std=0.1)
    text = {"prompt_embeds": _text(1, 5, 16), "pooled_prompt_embeds": _text(1, 16)}
    return _tiny(pipeline, parts=parts, height=32, width=32, **text, **arguments)


def flux_img2img() -> Tiny:
    return flux("FluxImg2ImgPipeline", image=_image(), strength=0.75)


def flux_inpaint() -> Tiny:
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 32))
    return flux("FluxInpaintPipeline", image=_image(), mask_image=mask, strength=0.75)


def flux_controlnet_img2img() -> Tiny:
    return flux("FluxControlNetImg2ImgPipeline", image=_image(), control_image=_image(), strength=0.75)


def flux_controlnet() -> Tiny:
    return flux("FluxControlNetPipeline", control_image=_image())


def flux_kontext() -> Tiny:
    return flux("FluxKontextPipeline", image=_image(), max_area=32 * 32, _auto_resize=False)


def wan(pipeline="WanPipeline", channels=16, parts=None, **arguments) -> Tiny:
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 16}
    model = _model("WanTransformer3DModel", **config, num_layers=1, in_channels=channels, rope_max_seq_len=32)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    text = {"prompt_embeds": _text(1, 5, 16), "negative_prompt_embeds": _text(1, 5, 16, seed=3)}
    size = {"height": 16, "width": 16, "num_frames": 5}
    parts = {"transformer": model, "scheduler": scheduler, **(parts or {})}
    return _tiny(pipeline, 2, parts, guidance_scale=5.0, **size, **text, **arguments)


def wan_two_models() -> Tiny:
    """Wan2.2: the first model for times from 800 on, the second below."""
    tiny = wan()
    second = _model("WanTransformer3DModel", **tiny.pipe.transformer.config)
    for parameter in second.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tiny.pipe = diffusers.WanPipeline(**{**tiny.pipe.components, "transformer_2": second}, boundary_ratio=0.8)
    tiny.pipe.set_progress_bar_config(disable=True)
    return tiny


def wan_v2v() -> Tiny:
    tiny = wan("WanVideoToVideoPipeline", parts=_wan_autoencoder(), video=[_image(16)] * 5, strength=0.75)
    del tiny.arguments["num_frames"]  # those of the video
    return tiny


def wan_i2v() -> Tiny:
    return wan("WanImageToVideoPipeline", channels=36, parts=_wan_autoencoder(), image=_image(16))


def _wan_autoencoder():
    return {"vae": _model("AutoencoderKLWan", base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)}


def cogvideox(pipeline="CogVideoXPipeline", channels=4, parts=None, **arguments) -> Tiny:
    config = {"num_attention_heads": 2, "attention_head_dim": 16, "time_embed_dim": 8, "text_embed_dim": 16}
    size = {"sample_width": 4, "sample_height": 4, "sample_frames": 5, "max_text_seq_length": 5, "num_layers": 1}
    model = _model("CogVideoXTransformer3DModel", **config, **size, in_channels=channels, out_channels=4)
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, snr_shift_scale=3.0
    )
    text = {"prompt_embeds": _text(1, 5, 16), "negative_prompt_embeds": _text(1, 5, 16, seed=3)}
    call = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 6.0}
    return _tiny(
        pipeline, 1, {"transformer": model, "scheduler": scheduler, **(parts or {})}, **call, **text, **arguments
    )


def _video_autoencoder():
    """CogVideoX's: 8× down, 4× in time, 4 channels."""
    size = {"block_out_channels": (4, 4, 4, 4), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
    return {"vae": _model("AutoencoderKLCogVideoX", **size)}


def cogvideox_i2v() -> Tiny:
    return cogvideox("CogVideoXImageToVideoPipeline", channels=8, parts=_video_autoencoder(), image=_image())


def cogvideox_v2v() -> Tiny:
    video = {"video": [_image()] * 5, "strength": 0.75}
    tiny = cogvideox("CogVideoXVideoToVideoPipeline", parts=_video_autoencoder(), **video)
    del tiny.arguments["num_frames"]  # those of the video
    return tiny


def sd3(pipeline="StableDiffusion3Pipeline", parts=None, **arguments) -> Tiny:
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16, "num_layers": 1}
    size = {"sample_size": 4, "pos_embed_max_size": 8, "in_channels": 4, "out_channels": 4}
    model = _model("SD3Transformer2DModel", **heads, **size, joint_attention_dim=16, pooled_projection_dim=16)
    text = {name: _text(1, 5, 16, seed=n) for n, name in enumerate(("prompt_embeds", "negative_prompt_embeds"))}
    pooled = {name.replace("prompt", "pooled_prompt"): _text(1, 16, seed=n) for n, name in enumerate(text)}
    parts = {"transformer": model, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), **(parts or {})}
    return _tiny(pipeline, parts=parts, **{"height": 32, "width": 32, **text, **pooled, **arguments})


def sd3_img2img() -> Tiny:
    parts = {"vae": _autoencoder()}
    return sd3("StableDiffusion3Img2ImgPipeline", parts, image=_image(8), strength=0.75, height=8, width=8)


def qwenimage(pipeline="QwenImagePipeline", **arguments) -> Tiny:
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6)}
    model = _model("QwenImageTransformer2DModel", **heads, num_layers=1, in_channels=16, out_channels=4)
    text = {"prompt_embeds": _text(1, 5, 16), "negative_prompt_embeds": _text(1, 5, 16, seed=3)}
    text |= {f"{name}_mask": torch.ones(1, 5, dtype=torch.int64) for name in text}
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    vae = _model(
        "AutoencoderKLQwenImage", base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[0] * 4, latents_std=[1] * 4
    )
    parts = {"transformer": model, "scheduler": scheduler, "vae": vae}
    return _tiny(pipeline, 2, parts, height=32, width=32, true_cfg_scale=4.0, **text, **arguments)


def qwenimage_img2img() -> Tiny:
    return qwenimage("QwenImageImg2ImgPipeline", image=_image(), strength=0.75)


def qwenimage_inpaint() -> Tiny:
    return qwenimage("QwenImageInpaintPipeline", image=_image(), mask_image=_image().convert("L"), strength=0.75)


def hunyuan_video() -> Tiny:
    layers = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "rope_axes_dim": (4, 6, 6)}
    width = {"num_attention_heads": 2, "attention_head_dim": 16, "text_embed_dim": 16, "pooled_projection_dim": 16}
    model = _model("HunyuanVideoTransformer3DModel", **layers, **width, in_channels=4, out_channels=4)
    mask = torch.ones(1, 5, dtype=torch.int64)
    text = {"prompt_embeds": _text(1, 5, 16), "pooled_prompt_embeds": _text(1, 16), "prompt_attention_mask": mask}
    parts = {"transformer": model, "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0)}
    return _tiny("HunyuanVideoPipeline", 1, parts, height=32, width=32, num_frames=5, **text)


def ltx() -> Tiny:
    width = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 16}
    model = _model("LTXVideoTransformer3DModel", **width, num_layers=1, in_channels=4, out_channels=4)
    mask = torch.ones(1, 5, dtype=torch.int64)
    text = {"prompt_embeds": _text(1, 5, 16), "negative_prompt_embeds": _text(1, 5, 16, seed=3)}
    text |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
    )
    parts = {"transformer": model, "scheduler": scheduler}
    return _tiny("LTXPipeline", 1, parts, height=64, width=64, num_frames=9, **text)


def sana() -> Tiny:
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 4}
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    model = _model("SanaTransformer2DModel", **heads, **cross, caption_channels=16, in_channels=4, out_channels=4)
    mask = torch.ones(1, 5, dtype=torch.int64)
    text = {"prompt_embeds": _text(1, 5, 16), "negative_prompt_embeds": _text(1, 5, 16, seed=3)}
    text |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "negative_prompt": None}
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = {"transformer": model, "scheduler": scheduler}
    return _tiny("SanaPipeline", 1, parts, height=128, width=128, use_resolution_binning=False, **text)


BUILDERS = {
    build.__name__: build
    for build in (
        flux,
        flux_img2img,
        flux_inpaint,
        flux_controlnet,
        flux_kontext,
        wan,
        wan_i2v,
        cogvideox,
        cogvideox_i2v,
        sd3,
        qwenimage,
        hunyuan_video,
        ltx,
        sana,
    )
}
