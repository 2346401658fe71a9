"""Stock pipelines with the published transformer architectures and random weights.

The other components are missing or tiny. Tokenizers are those of the demos; a tiny text encoder returns states of the
published width and length.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Size:
    """Size of a model and of its run.

    Attributes:
        transformer: Arguments of the transformer where they differ from the class's defaults.
        text_length: Number of text tokens.
        settings: Settings of the model folder.
    """

    transformer: dict
    text_length: int
    settings: dict


@dataclass(frozen=True)
class Model:
    """A model in two sizes.

    Attributes:
        build: build(demo, size, new) returns the pipeline. It takes the tokenizers of the folder `demo`; new(cls, …)
            makes a module of a class.
        full: The published size.
        small: A toy size, for the CPU.
    """

    build: Callable
    full: Size
    small: Size


# --- pipelines around a random transformer -----------------------------------------------------------------------


def random_module(device: str, dtype: torch.dtype, cls, *arguments, **options) -> torch.nn.Module:
    """Return a module with random weights (seed 0), made on its device and in its dtype.

    Args:
        device: Of the module.
        dtype: Of its weights, but float32 for those that diffusers keeps in float32.
        cls: Class of the module.
        *arguments: Of the class.
        **options: Of the class.
    """
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.random.fork_rng():
            torch.manual_seed(0)
            module = cls(*arguments, **options).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default_dtype)
    kept_in_float32 = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, tensor in module.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(torch.float32 if kept_in_float32 & set(name.split(".")) else dtype)
    return module


def text_encoder(new, classes, tokenizer, width: int):
    """Return a text encoder of one tiny layer whose states have this width; `classes`: of its config and the model."""
    config, model = classes
    return new(model, config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1))


def build_flux(demo: Path, size: Size, new):
    """Return a `FluxPipeline` without a VAE."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

    clip = CLIPTokenizer.from_pretrained(demo / "tokenizer")
    t5 = T5Tokenizer.from_pretrained(demo / "tokenizer_2", model_max_length=size.text_length)
    transformer = new(FluxTransformer2DModel, **size.transformer)
    pooled = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=transformer.config.pooled_projection_dim,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=clip.model_max_length,
        eos_token_id=clip.eos_token_id,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=None,
        text_encoder=new(CLIPTextModel, pooled),
        tokenizer=clip,
        text_encoder_2=text_encoder(new, (T5Config, T5EncoderModel), t5, transformer.config.joint_attention_dim),
        tokenizer_2=t5,
        transformer=transformer,
    )


def build_wan(demo: Path, size: Size, new):
    """Return a `WanPipeline` without a VAE."""
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

    tokenizer = T5Tokenizer.from_pretrained(demo / "tokenizer", model_max_length=size.text_length)
    transformer = new(WanTransformer3DModel, **size.transformer)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder(new, (UMT5Config, UMT5EncoderModel), tokenizer, transformer.config.text_dim),
        transformer=transformer,
        vae=None,
        scheduler=UniPCMultistepScheduler(**flow),
    )


def cogvideox_scheduler():
    """Return the scheduler of CogVideoX-2B."""
    from diffusers import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
    )


def build_cogvideox(demo: Path, size: Size, new):
    """Return a `CogVideoXPipeline` with a tiny VAE."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(demo / "tokenizer", model_max_length=size.text_length)
    transformer = new(CogVideoXTransformer3DModel, **size.transformer)
    vae = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 16}
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder(new, (T5Config, T5EncoderModel), tokenizer, transformer.config.text_embed_dim),
        vae=new(AutoencoderKLCogVideoX, **vae),
        transformer=transformer,
        scheduler=cogvideox_scheduler(),
    )


def build_opensora(demo: Path, size: Size, new):
    """Return an `OpenSoraPipeline` with a tiny VAE."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    from opensora12 import AutoencoderOpenSora, OpenSoraPipeline, RFlowScheduler, STDiT3Transformer3DModel

    tokenizer = T5Tokenizer.from_pretrained(demo / "tokenizer", model_max_length=size.text_length)
    transformer = new(STDiT3Transformer3DModel, **size.transformer)
    vae = {f"{stage}_block_out_channels": (8, 8, 8, 8) for stage in ("spatial", "temporal")}
    vae |= {"spatial_norm_num_groups": 4, "temporal_norm_num_groups": 4}
    return OpenSoraPipeline(
        tokenizer,
        text_encoder(new, (T5Config, T5EncoderModel), tokenizer, transformer.config.caption_channels),
        new(AutoencoderOpenSora, **vae, spatial_layers_per_block=1, temporal_num_res_blocks=1),
        transformer,
        RFlowScheduler(),
    )


# --- sizes: the published configs of FLUX.1-dev, Wan2.1-T2V-1.3B, CogVideoX-2b and OpenSora-STDiT-v3 --------------

WAN = {"attention_head_dim": 128, "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
NARROW = {"attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 4}
SMALL_FLUX = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6)}
SMALL_COGVIDEOX = {"sample_height": 4, "sample_width": 4, "sample_frames": 9, "text_embed_dim": 32}
MODELS = {
    "ERTACache4FLUX": Model(
        build_flux,
        Size({"guidance_embeds": True}, 512, {"steps": 30, "height": 1024, "width": 1024}),
        Size(
            NARROW | SMALL_FLUX | {"num_single_layers": 4, "guidance_embeds": True},
            16,
            {"steps": 30, "height": 64, "width": 64},
        ),
    ),
    "ERTACache4Wan2.1": Model(
        build_wan,
        Size(WAN, 512, {"steps": 50, "height": 480, "width": 832, "frames": 81, "negative_prompt": ""}),
        Size(
            NARROW | {"ffn_dim": 64, "text_dim": 32, "freq_dim": 32},
            16,
            {"steps": 50, "height": 32, "width": 32, "frames": 5, "negative_prompt": ""},
        ),
    ),
    "ERTACache4CogVideoX-2B": Model(
        build_cogvideox,
        Size({}, 226, {"steps": 50, "height": 480, "width": 720, "frames": 49}),
        Size(
            NARROW | SMALL_COGVIDEOX | {"time_embed_dim": 32, "max_text_seq_length": 16},
            16,
            {"steps": 50, "height": 32, "width": 32, "frames": 9},
        ),
    ),
    "ERTACache4OpenSora1.2": Model(
        build_opensora,
        Size({}, 300, {"steps": 30, "height": 480, "width": 854, "frames": 51}),
        Size(
            {"hidden_size": 48, "depth": 2, "num_heads": 4, "caption_channels": 32, "model_max_length": 16},
            16,
            {"steps": 30, "height": 32, "width": 32, "frames": 17},
        ),
    ),
}
