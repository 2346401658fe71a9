"""Tiny random diffusers pipelines whose denoiser is a UNet or a prior, or that make audio: one for each class."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDPMWuerstchenScheduler
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from diffusers.pipelines.stable_audio import StableAudioProjectionModel
from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image

from more_tiny_pipelines import _states
from tiny_pipelines import STEPS, Tiny, _autoencoder, _image, _model, _text

ROOT = Path(__file__).resolve().parents[2]
TOKENIZERS = ROOT / "ERTACache4FLUX" / "demo"
PROMPT = "a red star"
WIDE = 8  # of text and image encoders
LONG = 8  # of texts, in tokens


@dataclass
class TinyOutput(Tiny):
    """One whose call has no latents to give, or names its options in another way."""

    options: dict[str, Any] = field(default_factory=dict)
    which: int | slice = 0

    def run(self, steps=STEPS, seed=0, **changes) -> torch.Tensor:
        """The output of one call as a tensor."""
        options = {"num_inference_steps": steps, "return_dict": False, **self.options}
        generator = torch.Generator().manual_seed(seed)
        output = self.pipe(**{**self.arguments, **options, "generator": generator, **changes})[self.which]
        return output if isinstance(output, torch.Tensor) else torch.as_tensor(output)


class TinyEdit(Tiny):
    """LEdits++: one inverts an image, and then edits what this kept; the inversion takes the steps and the seed."""

    def run(self, steps=STEPS, seed=0, prompt=PROMPT, generator=None, **changes) -> torch.Tensor:
        generator = generator or torch.Generator().manual_seed(seed)
        self.pipe.invert(self.arguments["image"], num_inversion_steps=steps, generator=generator)
        options = {"editing_prompt": prompt, "use_intersect_mask": False, "output_type": "latent"}
        return self.pipe(**{**options, "return_dict": False, **changes})[0]


def _mask(size=16) -> Image.Image:
    mask = Image.new("L", (size, size))
    mask.paste(255, (size // 4, size // 4, size * 3 // 4, size))
    return mask


def _built(pipeline, parts, branches=1, options=None, which=0, **arguments) -> Tiny:
    """The pipeline of this name from those parts and with those arguments that it has, the other parts being None."""
    kind = getattr(diffusers, pipeline)
    required, optional = kind._get_signature_keys(kind)
    given = {name: parts[name] for name in (*required, *optional) if name in parts}
    pipe = kind(**{**dict.fromkeys(required), **given})
    pipe.set_progress_bar_config(disable=True)
    known = inspect.signature(kind.__call__).parameters
    arguments = {name: value for name, value in arguments.items() if name in known}
    return TinyOutput(pipe, arguments, branches, options, which) if options else Tiny(pipe, arguments, branches)


def _stir(model, std=0.1):
    """Give random weights to the layers that begin with zeros or nearly so, and would say nothing."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.abs().max() < 1e-3:
            torch.nn.init.normal_(parameter, std=std)
    return model


def _transformers(name, **config):
    torch.manual_seed(0)
    model = getattr(transformers, name)
    return model(model.config_class(**config)).eval().requires_grad_(False)


@cache
def _tokenizer():
    return transformers.CLIPTokenizer.from_pretrained(TOKENIZERS / "tokenizer", model_max_length=LONG)


@cache
def _t5_tokenizer():
    return transformers.T5TokenizerFast.from_pretrained(TOKENIZERS / "tokenizer_2", model_max_length=LONG)


def _clip(name="CLIPTextModel", **config):
    size = {"hidden_size": WIDE, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    ids = {f"{kind}_token_id": getattr(_tokenizer(), f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    ids["vocab_size"] = len(_tokenizer())
    model = _transformers(name, **{**size, **ids, "projection_dim": WIDE, **config})
    torch.nn.init.normal_(model.get_input_embeddings().weight)  # or the prompt would hardly matter
    return model


def _clip_image(name="CLIPVisionModelWithProjection", **config):
    size = {"hidden_size": WIDE, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = _transformers(name, **{**size, "image_size": 8, "patch_size": 4, "projection_dim": WIDE, **config})
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    return model


def _clip_pixels():
    return transformers.CLIPImageProcessor(crop_size=8, size=8)


def _unet(name="UNet2DConditionModel", **config):
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    blocks["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D")
    size = {"sample_size": 8, "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 2}
    return _stir(_model(name, **{**blocks, **size, "cross_attention_dim": WIDE, "attention_head_dim": 2, **config}))


SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
OFFSET = {"steps_offset": 1}


def _scheduler(name, *configs, **config):
    for given in configs:
        config = {**given, **config}
    return getattr(diffusers, name)(**config)


def _pndm(**config):
    return _scheduler("PNDMScheduler", SCALED, OFFSET, skip_prk_steps=True, set_alpha_to_one=False, **config)


def _ddim(**config):
    return _scheduler("DDIMScheduler", SCALED, OFFSET, **{"clip_sample": False, "set_alpha_to_one": False, **config})


UNIPC = partial(_scheduler, "UniPCMultistepScheduler", SCALED, OFFSET)
ANCESTRAL = partial(_scheduler, "EulerAncestralDiscreteScheduler", SCALED, OFFSET)


def _euler(**config):
    return _scheduler("EulerDiscreteScheduler", SCALED, OFFSET, **{"timestep_spacing": "leading", **config})


def _scene(size=16) -> dict[str, Any]:
    """What the calls take, those that have it."""
    images = {"image": _image(size), "control_image": _image(size), "mask_image": _mask(size)}
    return {"prompt": PROMPT, "height": size, "width": size, "strength": 0.75, **images}


def _t5() -> dict[str, Any]:
    size = {"d_model": WIDE, "d_ff": 8, "d_kv": 4, "num_heads": 2, "num_layers": 1, "vocab_size": len(_t5_tokenizer())}
    return {"text_encoder": _transformers("T5EncoderModel", **size), "tokenizer": _t5_tokenizer()}


def _movq(latent_channels=4):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    size = {"block_out_channels": (8, 8), "latent_channels": latent_channels, "norm_num_groups": 2}
    return _model("VQModel", **blocks, **size, num_vq_embeddings=12)


def _pixels_unet(channels=3, out=3, **config):
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    size = {"sample_size": 8, "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 2}
    size |= {"in_channels": channels, "out_channels": out, "attention_head_dim": 4}
    return _stir(_model("UNet2DModel", **blocks, **size, **config))


def _control(name="ControlNetModel", **config):
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    config = {"conditioning_embedding_out_channels": (4, 8), **config}
    size = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 2}
    return _stir(_model(name, **{**blocks, **size, "cross_attention_dim": WIDE, **config}), std=0.5)


def _prior(**config):
    size = {"num_attention_heads": 2, "attention_head_dim": 4, "embedding_dim": WIDE, "num_layers": 1}
    model = _stir(_model("PriorTransformer", **{**size, "num_embeddings": LONG, **config}))
    torch.nn.init.ones_(model.clip_std)
    return model


def _adapter(kind, down):
    size = {"in_channels": 3, "channels": [8, 8], "num_res_blocks": 1, "downscale_factor": down}
    return {"adapter": _stir(_model("T2IAdapter", **size, adapter_type=kind))}


def sd(pipeline, scheduler=_pndm, channels=4, unet=None, parts=None, **arguments) -> Tiny:
    both = {"vae": _autoencoder(), "text_encoder": _clip(), "tokenizer": _tokenizer(), "scheduler": scheduler()}
    both |= {"unet": _unet(in_channels=channels, **(unet or {}))}
    if "ControlNet" in pipeline:
        both["controlnet"] = _control()
    return _built(pipeline, {**both, **(parts or {})}, **{**_scene(), **arguments})


XL_BLOCKS = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
XL_BLOCKS |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True}
XL |= {"cross_attention_dim": 2 * WIDE, "projection_class_embeddings_input_dim": 6 * 4 + WIDE}
XL_CONTROL = {**XL, "down_block_types": XL_BLOCKS["down_block_types"]}
XL_UNION = {**XL_CONTROL, "num_trans_channel": 8, "num_trans_head": 2, "num_proj_channel": 8}


def sdxl(pipeline, scheduler=_euler, channels=4, unet=None, parts=None, **arguments) -> Tiny:
    both = {"vae": _autoencoder(), "scheduler": scheduler()}
    both |= {"unet": _unet(in_channels=channels, **XL, **XL_BLOCKS, **(unet or {}))}
    for end, name in (("", "CLIPTextModel"), ("_2", "CLIPTextModelWithProjection")):
        both |= {f"text_encoder{end}": _clip(name), f"tokenizer{end}": _tokenizer()}
    if "ControlNet" in pipeline:
        union = "Union" in pipeline
        both["controlnet"] = _control("ControlNetUnionModel", **XL_UNION) if union else _control(**XL_CONTROL)
    return _built(pipeline, {**both, **(parts or {})}, **{**_scene(), **arguments})


def adapter(pipeline) -> Tiny:
    if "XL" in pipeline:
        return sdxl(pipeline, parts=_adapter("full_adapter_xl", 4))
    return sd(pipeline, parts=_adapter("full_adapter", 2))


def upscale(pipeline) -> Tiny:
    parts = {"low_res_scheduler": _scheduler("DDPMScheduler", SCALED)}
    scheduler = partial(_ddim, prediction_type="v_prediction", beta_start=0.0001, beta_end=0.02)
    return sd(pipeline, scheduler, channels=7, unet={"num_class_embeds": 1000}, parts=parts, image=_image(8))


def latent_upscale(pipeline) -> Tiny:
    """Its UNet has blocks of its own kind and gives a fifth channel, which is left out."""
    blocks = {"down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D")}
    blocks |= {"up_block_types": ("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D")}
    blocks |= {"block_out_channels": (32, 64, 64), "mid_block_type": None}
    kind = {"time_embedding_type": "fourier", "timestep_post_act": "gelu", "act_fn": "gelu", "norm_num_groups": None}
    kind |= {"resnet_time_scale_shift": "scale_shift", "conv_in_kernel": 1, "conv_out_kernel": 1, "out_channels": 5}
    unet = {**blocks, **kind, "time_cond_proj_dim": 128 + WIDE, "attention_head_dim": 8}
    return sd(pipeline, partial(_euler, prediction_type="sample"), 8, unet)


def image_variation(pipeline) -> Tiny:
    return sd(pipeline, parts={"image_encoder": _clip_image(), "feature_extractor": _clip_pixels()})


def unclip(pipeline) -> Tiny:
    """The one from texts begins with the steps of a prior, which has a scheduler of its own."""
    squared = {"beta_schedule": "squaredcos_cap_v2"}
    parts = {
        "image_normalizer": StableUnCLIPImageNormalizer(embedding_dim=WIDE),
        "image_noising_scheduler": _scheduler("DDPMScheduler", squared),
        "image_encoder": _clip_image(),
        "feature_extractor": _clip_pixels(),
        "prior_tokenizer": _tokenizer(),
        "prior_text_encoder": _clip("CLIPTextModelWithProjection"),
        "prior": _prior(),
        "prior_scheduler": _scheduler("UnCLIPScheduler", variance_type="fixed_small_log", prediction_type="sample"),
    }
    unet = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * WIDE}
    scheduler = partial(_ddim, prediction_type="v_prediction")
    return sd(pipeline, scheduler, unet=unet, parts=parts, prior_num_inference_steps=4)


def lcm(pipeline) -> Tiny:
    """Its scheduler adds noise after each step; guidance is an input of the UNet."""
    return sd(pipeline, partial(_scheduler, "LCMScheduler", SCALED), unet={"time_cond_proj_dim": 8})


def kolors(pipeline) -> Tiny:
    unet = {**XL, **XL_BLOCKS, "encoder_hid_dim": 12, "encoder_hid_dim_type": "text_proj"}
    scheduler = _euler(num_train_timesteps=1100, beta_end=0.014)
    parts = {"vae": _autoencoder(), "scheduler": scheduler, "unet": _unet(**unet)}
    tiny = _built(pipeline, parts, **_scene())

    def encode_prompt(prompt, *_, **__):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        nothing = [""] * len(prompts)
        return _states(prompts, 5, 12), _states(nothing, 5, 12), _states(prompts, WIDE), _states(nothing, WIDE)

    tiny.pipe.encode_prompt = encode_prompt
    return tiny


def animatediff(pipeline, parts=None, **arguments) -> Tiny:
    size = {"block_out_channels": (8, 8), "motion_layers_per_block": 1, "motion_norm_num_groups": 2}
    size |= {"motion_num_attention_heads": 2, "use_motion_mid_block": "XL" not in pipeline}
    family = sdxl if "XL" in pipeline else sd
    motion = {"motion_adapter": _stir(_model("MotionAdapter", **size))}
    video = {"video": [_image(16)] * 3, "conditioning_frames": [_image(16)] * 3, "num_frames": 3}
    scheduler = partial(_ddim, beta_schedule="linear", set_alpha_to_one=True)
    return family(pipeline, scheduler, parts={**motion, **(parts or {})}, **{**video, **arguments})


def sparse_control(pipeline) -> Tiny:
    blocks = {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "norm_num_groups": 2}
    size = {"block_out_channels": (8, 8), "layers_per_block": 1, "motion_num_attention_heads": 2}
    size |= {"attention_head_dim": 2, "cross_attention_dim": WIDE}
    size |= {"conditioning_channels": 3, "conditioning_embedding_out_channels": (4, 8)}
    model = _stir(_model("SparseControlNetModel", **blocks, **size, use_simplified_condition_embedding=False))
    return animatediff(pipeline, {"controlnet": model}, conditioning_frames=[_image(16)], controlnet_frame_indices=[0])


def video_diffusion(pipeline) -> Tiny:
    """It has no prompt; guidance grows from frame to frame."""
    blocks = {"down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")}
    blocks["up_block_types"] = ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")
    size = {"block_out_channels": (32, 32), "num_attention_heads": 2, "layers_per_block": 1, "sample_size": 8}
    times = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 12, "cross_attention_dim": WIDE}
    vae = {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "layers_per_block": 1}
    sigmas = {"use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0, "timestep_type": "continuous"}
    parts = {
        "vae": _model("AutoencoderKLTemporalDecoder", **vae),
        "unet": _stir(_model("UNetSpatioTemporalConditionModel", in_channels=8, **blocks, **size, **times)),
        "image_encoder": _clip_image(image_size=224, patch_size=112),
        "feature_extractor": transformers.CLIPImageProcessor(),
        "scheduler": _euler(prediction_type="v_prediction", **sigmas),
    }
    return _built(pipeline, parts, **_scene(), num_frames=3)


TENSORS = {"output_type": "pt"}
SIMPLE = {"down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")}
SIMPLE |= {"up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), "encoder_hid_dim": WIDE}
SIMPLE |= {"block_out_channels": (32, 32), "mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}  # 32 groups
SIMPLE |= {"resnet_time_scale_shift": "scale_shift"}


def _kandinsky_prior(end="") -> dict[str, Any]:
    parts = {
        "prior": _prior(),
        "image_encoder": _clip_image(),
        "text_encoder": _clip("CLIPTextModelWithProjection"),
        "tokenizer": _tokenizer(),
        "scheduler": _scheduler("UnCLIPScheduler", variance_type="fixed_small_log", prediction_type="sample"),
        "image_processor": _clip_pixels(),
    }
    return {end + name: part for name, part in parts.items()}


def kandinsky_prior(pipeline) -> Tiny:
    return _built(pipeline, _kandinsky_prior(), options=TENSORS, **_scene())


def kandinsky(pipeline) -> Tiny:
    """Its UNet gives a variance too; it has no latents to return."""
    kind = {"addition_embed_type": "text_image", "encoder_hid_dim_type": "text_image_proj", "out_channels": 8}
    size = {"hidden_size": WIDE, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    size |= {"numDims": WIDE, "transformerDimensions": WIDE, "vocab_size": len(_t5_tokenizer()), "pad_token_id": 0}
    torch.manual_seed(0)
    encoder = MultilingualCLIP(MCLIPConfig(**size)).eval()
    torch.nn.init.normal_(encoder.transformer.get_input_embeddings().weight)
    parts = {
        "unet": _unet(in_channels=9 if "Inpaint" in pipeline else 4, **SIMPLE, **kind),
        "movq": _movq(),
        "scheduler": _ddim(beta_schedule="linear"),
        "text_encoder": encoder.requires_grad_(False),
        "tokenizer": _t5_tokenizer(),
        **_kandinsky_prior("prior_"),
    }
    states = {"image_embeds": _text(1, WIDE), "negative_image_embeds": _text(1, WIDE, seed=3)}
    return _built(pipeline, parts, options=TENSORS, **_scene(), **states, prior_num_inference_steps=4)


def kandinsky22(pipeline) -> Tiny:
    """The combined ones take a prompt; the others are given what belongs to an image."""
    hint = "Controlnet" in pipeline
    kind = {"addition_embed_type": "image_hint" if hint else "image", "encoder_hid_dim_type": "image_proj"}
    channels = {"in_channels": 9 if "Inpaint" in pipeline else 8 if hint else 4, "out_channels": 8}
    scheduler = _scheduler("DDPMScheduler", SCALED, beta_schedule="linear", clip_sample=False)
    parts = {"unet": _unet(**channels, **SIMPLE, **kind), "movq": _movq(), "scheduler": scheduler}
    states = {"image_embeds": _text(1, WIDE), "negative_image_embeds": _text(1, WIDE, seed=3)}
    states |= {"hint": _text(1, 3, 64, 64), "prior_num_inference_steps": 4}
    options = TENSORS if hint else None
    return _built(pipeline, {**parts, **_kandinsky_prior("prior_")}, options=options, **_scene(), **states)


def kandinsky3(pipeline) -> Tiny:
    size = {"time_embedding_dim": 8, "groups": 2, "attention_head_dim": 4, "layers_per_block": 2}
    wide = {"block_out_channels": (8, 8), "cross_attention_dim": WIDE, "encoder_hid_dim": WIDE}
    parts = {
        "unet": _stir(_model("Kandinsky3UNet", **size, **wide), std=0.02),
        "movq": _movq(),
        "scheduler": _scheduler("DDPMScheduler", OFFSET, beta_schedule="squaredcos_cap_v2"),
        **_t5(),
    }
    return _built(pipeline, parts, **_scene())


def _cascade_unet(**config):
    size = {"block_out_channels": (8, 8), "num_attention_heads": (2, 2), "conditioning_dim": 8, "dropout": (0.0, 0.0)}
    size |= {f"{way}_num_layers_per_block": (1, 1) for way in ("down", "up")}
    size |= {f"{way}_blocks_repeat_mappers": (1, 1) for way in ("down", "up")}
    types = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    size |= {"block_types_per_layer": (types, types), "timestep_ratio_embedding_dim": 8}
    size |= {"clip_text_pooled_in_channels": WIDE, "clip_seq": 2}
    return _stir(_model("StableCascadeUNet", **{**size, "in_channels": 4, "out_channels": 4, **config}))


def cascade(pipeline) -> Tiny:
    """Each step adds noise; the decoder's latents grow with the image states that the prior gives."""
    text = {"text_encoder": _clip("CLIPTextModelWithProjection"), "tokenizer": _tokenizer()}
    clip = {"clip_text_in_channels": WIDE, "clip_image_in_channels": WIDE}
    own = {"prior": _cascade_unet(switch_level=(False,), **clip), "scheduler": DDPMWuerstchenScheduler()}
    parts = {**text, **own, "decoder": _cascade_unet(effnet_in_channels=4), "latent_dim_scale": 2.0}
    parts["vqgan"] = PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2, embed_dim=8, levels=2).eval()
    parts |= {f"prior_{name}": part for name, part in {**text, **own}.items()}
    call = {"height": 128, "width": 128, "image_embeddings": _text(1, 4, 4, 4), "prior_num_inference_steps": 4}
    scales = {"decoder_guidance_scale": 2.0, "guidance_scale": 4.0}
    options, which = (TENSORS, 0) if "Prior" in pipeline else ({"output_type": "latent"}, slice(None))
    return _built(pipeline, parts, options=options, which=which, prompt=PROMPT, **call, **scales)


def deepfloyd(pipeline) -> Tiny:
    """It makes pixels, from the text states of a T5; the UNet gives a variance too."""
    kind = {"addition_embed_type": "text", "addition_embed_type_num_heads": 2, "cross_attention_norm": "group_norm"}
    larger = "SuperResolution" in pipeline
    kind |= {"cross_attention_dim": 32, "class_embed_type": "timestep" if larger else None}
    noise = {"beta_schedule": "squaredcos_cap_v2", "beta_start": 0.0001, "beta_end": 0.02}
    thresholds = {"thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5}
    parts = {
        "unet": _unet(in_channels=6 if larger else 3, out_channels=6, **SIMPLE, **kind),
        **_t5(),
        "scheduler": _scheduler("DDPMScheduler", noise, thresholds, variance_type="learned_range"),
        "image_noising_scheduler": _scheduler("DDPMScheduler", noise),
    }
    scene = {**_scene(), "image": _image(8 if larger else 16), "original_image": _image(16)}
    return _built(pipeline, parts, options=TENSORS, **scene, clean_caption=False)


def latent_text(pipeline) -> Tiny:
    parts = {"vqvae": _autoencoder(), "bert": _clip(), "tokenizer": _tokenizer(), "unet": _unet()}
    return _built(pipeline, {**parts, "scheduler": _ddim()}, options=TENSORS, guidance_scale=6.0, **_scene(64))


def latent_larger(pipeline) -> Tiny:
    parts = {"vqvae": _movq(latent_channels=3), "unet": _pixels_unet(6), "scheduler": _ddim()}
    return _built(pipeline, parts, options=TENSORS, image=_image(32))


def pixels(pipeline, scheduler) -> Tiny:
    """It takes no more than steps and seed."""
    parts = {"unet": _pixels_unet(), "scheduler": _scheduler(scheduler)}
    return _built(pipeline, parts, options={"output_type": "np"})


def consistency(pipeline) -> Tiny:
    scheduler = _scheduler("CMStochasticIterativeScheduler", num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0)
    parts = {"unet": _pixels_unet(num_class_embeds=4), "scheduler": scheduler}
    return _built(pipeline, parts, options=TENSORS, class_labels=1)


def marigold(pipeline) -> Tiny:
    parts = {
        "unet": _unet(in_channels=8),
        "vae": _autoencoder(),
        "text_encoder": _clip(),
        "tokenizer": _tokenizer(),
        "scheduler": _ddim(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True),
        "target_properties": {"target_names": ["albedo"]},
    }
    options = {"output_type": "pt", "output_latent": True}
    return _built(pipeline, parts, options=options, which=2, image=_image(16), processing_resolution=16)


def edit(pipeline) -> Tiny:
    solver = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
    scheduler = partial(_scheduler, "DPMSolverMultistepScheduler", SCALED, OFFSET, **solver)
    tiny = (sdxl if "XL" in pipeline else sd)(pipeline, scheduler)
    return TinyEdit(tiny.pipe, {"image": _image(), "prompt": PROMPT})


def shap_e(pipeline) -> Tiny:
    """Its scheduler is of second order: two calls at each step but the last."""
    kind = {"additional_embeddings": 0, "time_embed_act_fn": "gelu", "norm_in_type": "layer", "added_emb_type": None}
    kind |= {"encoder_hid_proj_type": None, "embedding_proj_norm_type": "layer" if "Img2Img" in pipeline else None}
    size = {"embedding_proj_dim": WIDE, "time_embed_dim": 8, "clip_embed_dim": 2 * WIDE, "num_embeddings": 4}
    noise = {"beta_schedule": "exp", "num_train_timesteps": 1024, "clip_sample": True, "clip_sample_range": 1.0}
    parts = {
        "prior": _prior(**kind, **size),
        "text_encoder": _clip("CLIPTextModelWithProjection"),
        "tokenizer": _tokenizer(),
        "image_encoder": _clip_image("CLIPVisionModel"),
        "image_processor": _clip_pixels(),
        "scheduler": _scheduler("HeunDiscreteScheduler", noise, prediction_type="sample", use_karras_sigmas=True),
    }
    return _built(pipeline, parts, prompt=PROMPT, image=_image(16))


def stable_audio(pipeline) -> Tiny:
    """With a deterministic solver: that of Stable Audio Open adds noise, and needs torchsde."""
    width = {"num_attention_heads": 2, "num_key_value_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    size = {"in_channels": 4, "out_channels": 4, "sample_size": 8, "cross_attention_dim": 16, "time_proj_dim": 8}
    text = {"cross_attention_input_dim": WIDE, "global_states_input_dim": 2 * WIDE}
    span = {"text_encoder_dim": WIDE, "conditioning_dim": WIDE, "min_value": 0, "max_value": 32}
    solver = {"sigma_min": 0.3, "sigma_max": 500.0, "sigma_data": 1.0, "sigma_schedule": "exponential"}
    parts = {
        "transformer": _stir(_model("StableAudioDiTModel", **width, **size, **text)),
        "projection_model": _stir(StableAudioProjectionModel(**span)),
        "vae": _oobleck(),
        **_t5(),
        "scheduler": _scheduler("EDMDPMSolverMultistepScheduler", solver, prediction_type="v_prediction"),
    }
    return _built(pipeline, parts, prompt=PROMPT)


def _oobleck():
    size = {"encoder_hidden_size": 4, "downsampling_ratios": [1, 2], "channel_multiples": [1, 2], "sampling_rate": 4}
    return _model("AutoencoderOobleck", **size, decoder_channels=4, decoder_input_channels=4)


def stable_audio3(pipeline) -> Tiny:
    width = {"embed_dim": 16, "depth": 1, "num_heads": 2, "ff_mult": 2, "num_memory_tokens": 2, "io_channels": 4}
    text = {"cond_token_dim": WIDE, "global_cond_dim": WIDE, "timestep_features_dim": 8, "local_add_cond_dim": 5}
    vae = {"patch_size": 2, "encoder_channels": 8, "encoder_c_mults": (2,), "encoder_strides": (2,), "latent_dim": 4}
    vae |= {"encoder_transformer_depths": (1,), "dim_heads": 4, "ff_mult": 2, "sampling_rate": 16}
    parts = {
        "transformer": _stir(_model("StableAudio3DiTModel", **width, **text)),
        "duration_embedder": StableAudio3DurationEmbedder(output_dim=WIDE, fourier_dim=8).eval(),
        "vae": _stir(_model("AutoencoderSAME", **vae)),
        **_t5(),
        "scheduler": _scheduler("FlowMatchEulerDiscreteScheduler", num_train_timesteps=1),
    }
    audio = {"audio": _text(1, 2, 32), "mask_start_seconds": 0.5, "mask_end_seconds": 1.5, "init_noise_level": 0.7}
    return _built(pipeline, parts, prompt=PROMPT, duration=2.0, guidance_scale=7.0, **audio)


def ace_step(pipeline) -> Tiny:
    """Its guidance has a momentum."""
    width = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    width |= {"head_dim": 8, "rope_theta": 10000.0, "sliding_window": 16}
    size = {"num_hidden_layers": 1, "in_channels": 12, "audio_acoustic_hidden_dim": 4}
    layers = {"num_lyric_encoder_hidden_layers": 1, "num_timbre_encoder_hidden_layers": 1}
    torch.manual_seed(0)
    conditions = AceStepConditionEncoder(**width, **layers, text_hidden_dim=WIDE, timbre_hidden_dim=4).eval()
    parts = {
        "transformer": _stir(_model("AceStepTransformer1DModel", **width, **size)),
        "condition_encoder": _stir(conditions.requires_grad_(False)),
        "vae": _oobleck(),
        **_t5(),
        "tokenizer": transformers.T5TokenizerFast.from_pretrained(TOKENIZERS / "tokenizer_2"),
        "scheduler": _scheduler("FlowMatchEulerDiscreteScheduler", num_train_timesteps=1),
    }
    return _built(pipeline, parts, prompt=PROMPT, lyrics="", audio_duration=4.0, guidance_scale=7.0)


def longcat_audio(pipeline) -> Tiny:
    width = {"dit_dim": 16, "dit_depth": 1, "dit_heads": 2, "dit_text_dim": WIDE, "latent_dim": 4, "text_conv": False}
    vae = {"channels": 4, "c_mults": [1, 2], "strides": [2], "latent_dim": 4, "encoder_latent_dim": 8}
    parts = {
        "transformer": _stir(_model("LongCatAudioDiTTransformer", **width)),
        "vae": _model("LongCatAudioDiTVae", **vae, downsampling_ratio=2, sample_rate=24),
        **_t5(),
    }
    return _built(pipeline, parts, 2, prompt=PROMPT, audio_duration_s=1.0)


def audioldm2(pipeline) -> Tiny:
    """Its UNet reads two text states, which a CLAP, a T5 and a GPT-2 make."""
    blocks = {"block_out_channels": (8, 8), "cross_attention_dim": ((None, WIDE, 12),) * 2}
    sounds = {"upsample_initial_channel": 8, "upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4]}
    sounds |= {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1]], "model_in_dim": 16}
    parts = {
        "unet": _unet("AudioLDM2UNet2DConditionModel", **XL_BLOCKS, **blocks),
        "vae": _autoencoder(),
        "vocoder": _transformers("SpeechT5HifiGan", **sounds),
        "text_encoder_2": _t5()["text_encoder"],
        "language_model": _transformers("GPT2LMHeadModel", n_embd=WIDE, n_head=2, n_layer=1, vocab_size=8),
        "scheduler": _ddim(),
    }
    tiny = _built(pipeline, parts, prompt=PROMPT, guidance_scale=3.5)

    def encode_prompt(prompt, *_, **__):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        both = [""] * len(prompts) + prompts
        return _states(both, 5, 12), torch.ones(len(both), 5, dtype=torch.int64), _states(both, 4, WIDE)

    tiny.pipe.encode_prompt = encode_prompt
    return tiny


# A builder, and the names of its pipelines: what they begin with, and what comes between that and "Pipeline".
FAMILIES: tuple[tuple[Callable[[str], Tiny], str, str], ...] = (
    (sd, "StableDiffusion", ",Img2Img,PAG,PAGImg2Img,ControlNetPAG,ControlNetPAGInpaint,Panorama"),
    (partial(sd, channels=9), "StableDiffusion", "Inpaint,PAGInpaint"),
    (partial(sd, scheduler=UNIPC), "StableDiffusionControlNet", ",Img2Img"),
    (partial(sd, scheduler=_ddim), "StableDiffusionControlNet", "Inpaint"),
    (partial(sd, scheduler=ANCESTRAL, channels=8), "StableDiffusion", "InstructPix2Pix"),
    (partial(sd, channels=5, depth_map=_text(1, 8, 8)), "StableDiffusion", "Depth2Img"),
    (partial(sd, branches=2), "StableDiffusion", "SAG"),
    (upscale, "StableDiffusion", "Upscale"),
    (latent_upscale, "StableDiffusion", "LatentUpscale"),
    (image_variation, "StableDiffusion", "ImageVariation"),
    (adapter, "StableDiffusion", "Adapter,XLAdapter"),
    (unclip, "StableUnCLIP", ",Img2Img"),
    (sdxl, "StableDiffusionXL", ",Img2Img,PAG,PAGImg2Img,PAGInpaint"),
    (sdxl, "StableDiffusionXLControlNet", ",Img2Img,Inpaint,PAG,PAGImg2Img"),
    (partial(sdxl, control_mode=[0]), "StableDiffusionXLControlNetUnion", ",Img2Img,Inpaint"),
    (partial(sdxl, channels=9), "StableDiffusionXL", "Inpaint"),
    (partial(sdxl, channels=8), "StableDiffusionXL", "InstructPix2Pix"),
    (lcm, "LatentConsistencyModel", ",Img2Img"),
    (kolors, "Kolors", ",Img2Img,PAG"),
    (animatediff, "AnimateDiff", ",ControlNet,SDXL,VideoToVideo,VideoToVideoControlNet,PAG"),
    (partial(animatediff, channels=9), "PIA", ""),
    (sparse_control, "AnimateDiff", "SparseControlNet"),
    (video_diffusion, "StableVideoDiffusion", ""),
    (kandinsky, "Kandinsky", ",Img2Img,Inpaint,Combined,Img2ImgCombined,InpaintCombined"),
    (kandinsky22, "KandinskyV22", ",Img2Img,Inpaint,Controlnet,ControlnetImg2Img"),
    (kandinsky22, "KandinskyV22", "Combined,Img2ImgCombined,InpaintCombined"),
    (kandinsky_prior, "Kandinsky", "Prior,V22Prior,V22PriorEmb2Emb"),
    (kandinsky3, "Kandinsky3", ",Img2Img"),
    (cascade, "StableCascade", "Prior,Decoder,Combined"),
    (deepfloyd, "IF", ",Img2Img,Inpainting,SuperResolution,Img2ImgSuperResolution,InpaintingSuperResolution"),
    (latent_text, "LDM", "TextToImage"),
    (latent_larger, "LDM", "SuperResolution"),
    (partial(pixels, scheduler="DDIMScheduler"), "DDIM", ""),
    (partial(pixels, scheduler="DDPMScheduler"), "DDPM", ""),
    (consistency, "ConsistencyModel", ""),
    (marigold, "Marigold", "Depth,Normals,Intrinsics"),
    (shap_e, "ShapE", ",Img2Img"),
    (stable_audio, "StableAudio", ""),
    (stable_audio3, "StableAudio3", ",AudioToAudio,Inpaint"),
    (audioldm2, "AudioLDM2", ""),
    (ace_step, "AceStep", ""),
    (longcat_audio, "LongCatAudioDiT", ""),
)
EDITORS = ("LEditsPPPipelineStableDiffusion", "LEditsPPPipelineStableDiffusionXL")


def _names(start, ends):
    return [f"{start}{end}Pipeline" for end in ends.split(",")]


PIPELINES: dict[str, Callable[[], Tiny]] = {
    **{name: partial(build, name) for build, start, ends in FAMILIES for name in _names(start, ends)},
    **{name: partial(edit, name) for name in EDITORS},
}
CANNOT: dict[str, str] = {}

# The arguments besides the prompt of which a call with a list of prompts needs a list as long.
PER_PROMPT: dict[str, tuple[str, ...]] = {
    **{name: ("image", "mask_image") for name in PIPELINES if "Inpaint" in name and name.startswith(("StableD", "IF"))},
    **dict.fromkeys((name for name in PIPELINES if "Upscale" in name or "Adapter" in name), ("image",)),
    "StableUnCLIPImg2ImgPipeline": ("image",),
    "AnimateDiffVideoToVideoPipeline": ("video",),
    "AnimateDiffVideoToVideoControlNetPipeline": ("video", "conditioning_frames"),
    "KandinskyPipeline": ("image_embeds", "negative_image_embeds"),
    "KandinskyImg2ImgPipeline": ("image", "image_embeds", "negative_image_embeds"),
    "KandinskyInpaintPipeline": ("image", "mask_image", "image_embeds", "negative_image_embeds"),
    "KandinskyImg2ImgCombinedPipeline": ("image",),
    "Kandinsky3Img2ImgPipeline": ("image",),
    "StableCascadeDecoderPipeline": ("image_embeddings",),
    "IFImg2ImgPipeline": ("image",),
    "IFSuperResolutionPipeline": ("image",),
    "IFImg2ImgSuperResolutionPipeline": ("image", "original_image"),
    "IFInpaintingSuperResolutionPipeline": ("image", "original_image", "mask_image"),
    "AceStepPipeline": ("lyrics",),
}

# The pipelines whose call with a list of prompts fails or gives something else than calls one by one, and why.
ONE_PROMPT: dict[str, str] = {
    "AnimateDiffControlNetPipeline": "its control frames are those of one video",
    **dict.fromkeys(EDITORS, "a list of prompts is several edits of one image"),
    "StableDiffusionPanoramaPipeline": "it pairs the halves of its batch in another order than it made them",
    "PIAPipeline": "its image is that of one video",
}
