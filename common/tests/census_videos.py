"""Video and modular pipelines of diffusers, and those of Hunyuan, at tiny size, as in census_images.py."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import diffusers
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    ClassifierFreeGuidance,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeliosScheduler,
)
from diffusers.modular_pipelines import ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

import census_images
from census_images import PROMPT, Encoder, _autoencoder, alive, builds, made, prompted, states
from more_tiny_pipelines import (
    NoChecker,
    TinyModular,
    _flow_unipc,
    chronoedit,
    hunyuan15,
    kandinsky5,
    ltx2,
    ltx_condition,
    mochi,
)
from more_tiny_pipelines import modular as wan_modular
from tiny_pipelines import (
    STEPS,
    Tiny,
    _image,
    _model,
    _text,
    _video_autoencoder,
    _wan_autoencoder,
    cogvideox,
    hunyuan_video,
    ltx,
    wan,
)

PIPELINES: dict[str, Callable[[], Tiny]] = {}
_builds = partial(builds, PIPELINES)
VIDEO = [_image(16)] * 5
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 1,
}
MASKED = "text mask other mask"


def _vace():
    return alive(_model("WanVACETransformer3DModel", **WAN, rope_max_seq_len=32, vace_layers=[0], vace_in_channels=96))


def _animate():
    motion = {"channel_sizes": {"4": 8, "8": 8, "16": 8}, "size": 16, "dim": 16}
    motion = {f"motion_encoder_{name}": value for name, value in motion.items()}
    face = {"face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 1}
    size = {"image_dim": 16, "rope_max_seq_len": 32, "motion_style_dim": 8, "motion_dim": 4}
    return alive(_model("WanAnimateTransformer3DModel", **WAN, **motion, **face, **size))


@_builds(
    WanPipeline={},
    WanImageToVideoPipeline={"channels": 36, "image": _image(16)},
    WanVideoToVideoPipeline={"video": VIDEO, "strength": 0.75, "without": ["num_frames"]},
    WanVACEPipeline={"model": _vace, "video": VIDEO, "mask": [_image(16).convert("L")] * 5},
    WanAnimatePipeline={
        "model": _animate,
        "image": _image(16),
        "pose_video": VIDEO,
        "face_video": VIDEO,
        "segment_frame_length": 5,
        "without": ["num_frames"],
    },
    LucyEditPipeline={"channels": 32, "video": VIDEO, "options": {"expand_timesteps": True}},
)
def _wan(pipeline, model=None, options=None, without=(), **arguments) -> Tiny:
    parts = {**_wan_autoencoder(), **({"transformer": model()} if model else {})}
    tiny = wan(pipeline, parts=parts, **arguments)
    if options:
        parts = {**tiny.pipe.components, **options}
        tiny.pipe = type(tiny.pipe)(**parts)
        tiny.pipe.set_progress_bar_config(disable=True)
    tiny.arguments = {name: value for name, value in tiny.arguments.items() if name not in without}
    tiny.pipe.encode_image = lambda *_: _text(1, 4, 16)
    return prompted(tiny, "text other")


@_builds(ChronoEditPipeline={})
def _chronoedit(_) -> Tiny:
    return prompted(chronoedit(), "text other", shape=(512, 16))


FRAMES = [_image()] * 5


@_builds(
    CogVideoXPipeline={},
    CogVideoXImageToVideoPipeline={"channels": 8, "image": _image()},
    CogVideoXVideoToVideoPipeline={"video": FRAMES, "strength": 0.75, "without": ["num_frames"]},
    CogVideoXFunControlPipeline={"channels": 8, "control_video": FRAMES, "without": ["num_frames"]},
)
def _cogvideox(pipeline, without=(), **arguments) -> Tiny:
    tiny = cogvideox(pipeline, parts=_video_autoencoder(), **arguments)
    tiny.arguments = {name: value for name, value in tiny.arguments.items() if name not in without}
    return prompted(tiny, "text other")


@_builds(LTXPipeline={})
def _ltx(_) -> Tiny:
    return prompted(ltx(), MASKED)


@_builds(LTXConditionPipeline={"image": _image()}, LTXImageToVideoPipeline={"image": _image()})
def _ltx_condition(pipeline, **arguments) -> Tiny:
    """It gives the scheduler a time for each token."""
    tiny = ltx_condition(**arguments)
    return prompted(made(pipeline, tiny.pipe.components, **tiny.arguments), MASKED)


@_builds(
    LTX2Pipeline={},
    LTX2ImageToVideoPipeline={"image": _image(), "image_crf": 0},
    LTX2ConditionPipeline={},
    LTX2InContextPipeline={},
    LTX2HDRPipeline={},
)
def _ltx2(pipeline, **arguments) -> Tiny:
    """Video and audio, the audio on a copy of the scheduler."""
    tiny = ltx2(**arguments)
    names = getattr(diffusers, pipeline)._get_signature_keys(getattr(diffusers, pipeline))[0]
    parts = {name: part for name, part in tiny.pipe.components.items() if name in names}
    known = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    call = {name: value for name, value in tiny.arguments.items() if name in known}
    return prompted(made(pipeline, parts, **call), MASKED)


@_builds(
    HunyuanVideoPipeline={},
    HunyuanVideoImageToVideoPipeline={"channels": 9, "condition": "latent_concat", "image": _image()},
    HunyuanSkyreelsImageToVideoPipeline={"channels": 8, "branches": 2, "image": _image()},
)
def _hunyuan(pipeline, channels=4, condition=None, branches=1, **arguments) -> Tiny:
    base = hunyuan_video()
    config = {**base.pipe.transformer.config, "in_channels": channels, "image_condition_type": condition}
    if condition:
        config["guidance_embeds"] = condition == "token_replace"
    down, up = ("HunyuanVideoDownBlock3D",) * 4, ("HunyuanVideoUpBlock3D",) * 4
    size = {"block_out_channels": (4,) * 4, "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}
    parts = {
        "transformer": _model("HunyuanVideoTransformer3DModel", **config),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "vae": _model("AutoencoderKLHunyuanVideo", **size, down_block_types=down, up_block_types=up),
    }
    tiny = made(pipeline, parts, branches, height=32, width=32, num_frames=5, **arguments)
    return prompted(tiny, "text pooled mask", negative=branches == 2)


MATCH = {"downsample_match_channel": False, "upsample_match_channel": False}


@_builds(
    HunyuanDiTPipeline={},
    HunyuanDiTControlNetPipeline={"control_image": _image(16)},
    HunyuanDiTPAGPipeline={"pag_scale": 3.0},
)
def _hunyuandit(pipeline, **arguments) -> Tiny:
    """Its scheduler draws noise at each step."""
    width = {"num_attention_heads": 3, "attention_head_dim": 8, "hidden_size": 24, "pooled_projection_dim": 4}
    text = {"cross_attention_dim": 16, "cross_attention_dim_t5": 16, "text_len": 5, "text_len_t5": 5}
    size = {"in_channels": 4, "patch_size": 2, "sample_size": 16, "activation_fn": "gelu-approximate"}
    betas = {"beta_start": 0.00085, "beta_end": 0.018, "beta_schedule": "scaled_linear"}
    parts = {
        "transformer": alive(_model("HunyuanDiT2DModel", **width, **text, **size, num_layers=4)),
        "scheduler": DDPMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1, **betas),
        "vae": _autoencoder(),
    }
    if "ControlNet" in pipeline:
        model = _model("HunyuanDiT2DControlNetModel", **width, **text, **size, transformer_num_layers=4)
        parts["controlnet"] = alive(model)
    size = {"height": 16, "width": 16, "use_resolution_binning": False}
    return prompted(made(pipeline, parts, **size, **arguments), "text other mask mask")


@_builds(HunyuanImagePipeline={})
def _hunyuanimage(pipeline) -> Tiny:
    width = {"num_attention_heads": 2, "attention_head_dim": 8, "rope_axes_dim": (4, 4), "text_embed_dim": 16}
    layers = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_2_dim": 16}
    size = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 32, "layers_per_block": 1}
    parts = {
        "transformer": _model("HunyuanImageTransformer2DModel", **width, **layers, in_channels=4, out_channels=4),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "vae": _model(
            "AutoencoderKLHunyuanImage", **size, block_out_channels=(32, 32), spatial_compression_ratio=2, **MATCH
        ),
        "guider": AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=5),
        "ocr_guider": AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=38),
    }
    return prompted(made(pipeline, parts, 2, height=16, width=16), "text mask text mask")


@_builds(HunyuanImageRefinerPipeline={})
def _refiner(pipeline) -> Tiny:
    width = {"num_attention_heads": 2, "attention_head_dim": 8, "rope_axes_dim": (4, 2, 2), "text_embed_dim": 16}
    layers = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": (1, 1, 1)}
    size = {"in_channels": 8, "out_channels": 4, "guidance_embeds": True}
    blocks = {"block_out_channels": (32,) * 3, "layers_per_block": 1, "latent_channels": 2}
    ratios = {"spatial_compression_ratio": 4, "temporal_compression_ratio": 2}
    parts = {
        "transformer": _model("HunyuanImageTransformer2DModel", **width, **layers, **size),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=4.0),
        "vae": _model("AutoencoderKLHunyuanImageRefiner", **blocks, **ratios, **MATCH),
    }
    return prompted(made(pipeline, parts, height=16, width=16, image=_image(16)), "text mask")


@_builds(HunyuanVideo15Pipeline={}, HunyuanVideo15ImageToVideoPipeline={"image": _image(16)})
def _hunyuan15(pipeline, **arguments) -> Tiny:
    tiny = hunyuan15()
    parts = {name: part for name, part in tiny.pipe.components.items() if name != "guider"}
    parts["guider"] = ClassifierFreeGuidance(guidance_scale=5.0)
    size = {} if "Image" in pipeline else {"height": 16, "width": 16}
    made_one = made(pipeline, parts, 2, num_frames=5, **size, **arguments)
    made_one.pipe.vision_num_semantic_tokens = 2
    made_one.pipe.encode_image = lambda *_, batch_size=1, **__: _text(1, 2, 8).repeat(batch_size, 1, 1)
    return prompted(made_one, "text mask text mask")


@_builds(MochiPipeline={})
def _mochi(_) -> Tiny:
    """Its noise levels go up."""
    return prompted(mochi(), MASKED)


@_builds(AllegroPipeline={})
def _allegro(pipeline) -> Tiny:
    """Its scheduler draws noise at each step."""
    width = {"num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 16}
    size = {"num_layers": 1, "sample_width": 4, "sample_height": 4, "sample_frames": 4}
    model = alive(_model("AllegroTransformer3DModel", **width, **size))
    parts = {"transformer": model, "scheduler": EulerAncestralDiscreteScheduler()}
    return prompted(made(pipeline, parts, height=32, width=32, num_frames=8), MASKED)


@_builds(LattePipeline={})
def _latte(pipeline) -> Tiny:
    width = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 16}
    size = {"sample_size": 4, "num_layers": 1, "patch_size": 2, "in_channels": 4, "out_channels": 8, "video_length": 2}
    norm = {"norm_type": "ada_norm_single", "num_embeds_ada_norm": 1000, "norm_elementwise_affine": False}
    model = alive(_model("LatteTransformer3DModel", **width, **size, **norm, activation_fn="gelu-approximate"))
    parts = {"transformer": model, "scheduler": DDIMScheduler(clip_sample=False, beta_end=0.02, beta_start=0.0001)}
    return prompted(made(pipeline, parts, height=32, width=32, video_length=2), "text other")


PIXELS = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(5))


@_builds(
    EasyAnimatePipeline={},
    EasyAnimateControlPipeline={"channels": 12, "control_video": PIXELS},
    EasyAnimateInpaintPipeline={"channels": 9, "video": PIXELS, "mask_video": 255 * PIXELS[:, :1].round()},
)
def _easyanimate(pipeline, channels=4, **arguments) -> Tiny:
    width = {"num_attention_heads": 2, "attention_head_dim": 16, "time_embed_dim": 8, "text_embed_dim": 16}
    size = {"in_channels": channels, "out_channels": 4, "num_layers": 1, "mmdit_layers": 1, "patch_size": 2}
    down = ("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3)
    up = ("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3)
    blocks = {"down_block_types": down, "up_block_types": up, "block_out_channels": (4,) * 4, "layers_per_block": 1}
    parts = {
        "transformer": alive(_model("EasyAnimateTransformer3DModel", **width, **size)),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "vae": _model("AutoencoderKLMagvit", **blocks, latent_channels=4, norm_num_groups=2, spatial_group_norm=False),
    }
    parts["vae"].register_to_config(cache_mag_vae=True)  # asked for by the inpainting pipeline
    tiny = made(pipeline, parts, height=32, width=32, num_frames=5, **arguments)
    return prompted(tiny, "text other mask mask")


@_builds(
    SkyReelsV2Pipeline={},
    SkyReelsV2ImageToVideoPipeline={"channels": 36, "image": _image(16)},
    SkyReelsV2DiffusionForcingPipeline={},
    SkyReelsV2DiffusionForcingImageToVideoPipeline={"image": _image(16)},
    SkyReelsV2DiffusionForcingVideoToVideoPipeline={
        "video": VIDEO,
        "num_frames": 9,
        "overlap_history": 5,
        "base_num_frames": 9,
    },
)
def _skyreels(pipeline, channels=16, **arguments) -> Tiny:
    """With diffusion forcing, it steps each latent frame on a copy of its scheduler."""
    size = {"in_channels": channels, "out_channels": 16, "rope_max_seq_len": 32}
    if channels == 36:
        size |= {"image_dim": 16, "added_kv_proj_dim": 24}
    parts = {
        "transformer": _model("SkyReelsV2Transformer3DModel", **WAN, **size),
        "scheduler": _flow_unipc(8.0),
        **_wan_autoencoder(),
    }
    call = {"height": 16, "width": 16, "num_frames": 9, "guidance_scale": 6.0}
    tiny = made(pipeline, parts, 2, **{**call, **arguments})
    tiny.pipe.encode_image = lambda *_: _text(1, 4, 16)
    return prompted(tiny, "text other")


@_builds(SanaVideoPipeline={}, SanaImageToVideoPipeline={"image": _image()})
def _sanavideo(pipeline, **arguments) -> Tiny:
    heads = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "sample_size": 4}
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24}
    model = alive(_model("SanaVideoTransformer3DModel", **heads, **cross, caption_channels=16, rope_max_seq_len=32))
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    if "Image" in pipeline:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=8.0)
    parts = {"transformer": model, "scheduler": scheduler, **_wan_autoencoder()}
    size = {"height": 32, "width": 32, "frames": 5, "use_resolution_binning": False}
    return prompted(made(pipeline, parts, **size, **arguments), MASKED)


@_builds(Kandinsky5T2VPipeline={}, Kandinsky5I2VPipeline={"image": _image()})
def _kandinsky5(pipeline, **arguments) -> Tiny:
    """It writes each step's latents into the same tensor."""
    config = {**kandinsky5().pipe.transformer.config, "visual_cond": "image" in arguments}
    parts = {
        "transformer": alive(_model("Kandinsky5Transformer3DModel", **config)),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=10.0),
        "vae": _hunyuan("HunyuanVideoPipeline").pipe.vae,
    }
    return prompted(made(pipeline, parts, 2, height=32, width=32, num_frames=21, **arguments), "text pooled lengths")


@_builds(HeliosPipeline={})
def _helios(pipeline, **arguments) -> Tiny:
    size = {"rope_dim": (4, 4, 4)}
    parts = {
        "transformer": alive(_model("HeliosTransformer3DModel", **WAN, **size)),
        "scheduler": HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True),
        **_wan_autoencoder(),
    }
    call = {"height": 16, "width": 16, "num_frames": 9, "guidance_scale": 5.0}
    return prompted(made(pipeline, parts, 2, **call, **arguments), "text other")


@_builds(MotifVideoPipeline={}, MotifVideoImage2VideoPipeline={"image": _image(16)})
def _motif(pipeline, **arguments) -> Tiny:
    width = {"num_attention_heads": 2, "attention_head_dim": 12, "text_embed_dim": 16, "rope_axes_dim": (4, 4, 4)}
    layers = {"num_layers": 1, "num_single_layers": 1, "mlp_ratio": 1.0, "patch_size": 1}
    parts = {
        "transformer": _model("MotifVideoTransformer3DModel", **width, **layers),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "guider": AdaptiveProjectedGuidance(guidance_scale=8.0),
        **_wan_autoencoder(),
    }
    call = {"height": 16, "width": 16, "num_frames": 5}
    return prompted(made(pipeline, parts, 2, **call, **arguments), "text other mask mask")


@_builds(AnyFlowPipeline={}, AnyFlowFARPipeline={})
def _anyflow(pipeline, **arguments) -> Tiny:
    """AnyFlowFAR makes a video in chunks, each with a loop of its own, and calls its model to fill a cache as well."""
    far = {"chunk_partition": (1, 1)} if "FAR" in pipeline else {}
    name = "AnyFlowFARTransformer3DModel" if far else "AnyFlowTransformer3DModel"
    parts = {
        "transformer": _model(name, **WAN, rope_max_seq_len=32, **far),
        "scheduler": FlowMapEulerDiscreteScheduler(shift=5.0),
        **_wan_autoencoder(),
    }
    return prompted(made(pipeline, parts, height=32, width=32, num_frames=5, **arguments), "text none")


def _cosmos_autoencoder():
    blocks = {"encoder_block_out_channels": (4,) * 3, "decode_block_out_channels": (4,) * 3, "num_layers": 1}
    size = {"latent_channels": 4, "resolution": 32, "patch_size": 4, "attention_resolutions": (4,)}
    ratios = {"spatial_compression_ratio": 4, "temporal_compression_ratio": 4}
    return {"vae": _model("AutoencoderKLCosmos", **blocks, **size, **ratios)}


FIRST = {"scheduler": partial(EDMEulerScheduler, final_sigmas_type="sigma_min"), "vae": _cosmos_autoencoder}


@_builds(
    CosmosTextToWorldPipeline={"channels": 4, **FIRST},
    CosmosVideoToWorldPipeline={"channels": 5, **FIRST, "image": _image()},
    Cosmos2VideoToWorldPipeline={"image": _image()},
    Cosmos2_5_PredictBasePipeline={"scheduler": partial(_flow_unipc, 5.0)},
)
def _cosmos(pipeline, channels=17, branches=2, scheduler=None, vae=None, **arguments) -> Tiny:
    width = {"num_attention_heads": 2, "attention_head_dim": 16, "mlp_ratio": 2, "text_embed_dim": 16}
    size = {
        "in_channels": channels,
        "out_channels": channels // 4 * 4,
        "num_layers": 1,
        "adaln_lora_dim": 4,
        "max_size": (4, 32, 32),
    }
    parts = {
        "transformer": _model(
            "CosmosTransformer3DModel", **width, **size, extra_pos_embed_type=None, concat_padding_mask=False
        ),
        "scheduler": scheduler() if scheduler else FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        "safety_checker": NoChecker(),
        **(vae() if vae else _wan_autoencoder()),
    }
    call = {"height": 32, "width": 32, "num_frames": 5}
    return prompted(made(pipeline, parts, branches, **call, **arguments), "text other")


class Sections(Tiny):
    def run(self, steps=STEPS, seed=0, **changes) -> torch.Tensor:
        """The latents after the last section of one call."""
        return super().run(steps, seed, **changes)[-1]


@_builds(HunyuanVideoFramepackPipeline={})
def _framepack(pipeline) -> Tiny:
    """It makes a video in sections, each with a loop of its own and latents of its own."""
    base = _hunyuan("HunyuanVideoPipeline").pipe
    config = {name: value for name, value in base.transformer.config.items() if name != "image_condition_type"}
    image = {"has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True}
    model = _model("HunyuanVideoFramepackTransformer3DModel", **{**config, **image})
    parts = {**base.components, "transformer": model}
    call = {"height": 32, "width": 32, "num_frames": 5, "image": _image(), "latent_window_size": 2}
    tiny = made(pipeline, parts, kind=Sections, **call)
    tiny.pipe.encode_image = lambda *_, **__: _text(1, 4, 16)
    return prompted(tiny, "text pooled mask")


@_builds(HeliosPyramidPipeline={})
def _pyramid(pipeline) -> Tiny:
    """It goes up three sizes, with steps of its own for each: `num_inference_steps` is no argument of its call."""
    tiny = _helios(pipeline)
    tiny.pipe.register_modules(scheduler=HeliosScheduler(use_dynamic_shifting=True, gamma=0.33))
    tiny.arguments |= {"pyramid_num_inference_steps_list": [3, 3, 2], "height": 64, "width": 64}
    return Pyramid(tiny.pipe, tiny.arguments, tiny.branches)


class Pyramid(Tiny):
    def run(self, steps=STEPS, seed=0, **changes) -> torch.Tensor:
        """The final latents of one call; steps are for all sizes together."""
        each = [steps - steps // 3 * 2, steps // 3, steps // 3]
        options = {"pyramid_num_inference_steps_list": each, "output_type": "latent", "return_dict": False}
        generator = torch.Generator().manual_seed(seed)
        return self.pipe(**{**self.arguments, **options, "generator": generator, **changes})[0]


@_builds(Kandinsky6TI2VAPipeline={})
def _kandinsky6(pipeline) -> Tiny:
    """Video and audio, the audio on a copy of the scheduler."""
    size = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 16, "axes_dims": (4, 6, 6)}
    width = {"model_dim": 32, "time_dim": 16, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 1}
    audio = {"in_audio_dim": 4, "out_audio_dim": 4, "model_dim_a": 32, "time_dim_a": 16, "ff_dim_a": 32}
    model = alive(_model("Kandinsky6Transformer3DModel", **size, **width, **audio, axes_dims_a=(4, 6, 6)))
    parts = {"transformer": model, "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0)}
    tiny = made(pipeline, parts, 2, height=32, width=32, num_frames=5)
    tiny.pipe.audio_vae = tiny.pipe.vocoder = Encoder()
    return prompted(tiny, "text pooled bits other other_pooled bits")


class Seeded(Tiny):
    def run(self, steps=STEPS, seed=0, **changes) -> torch.Tensor:
        """The final latents of one call, whose noise comes from a seed and not from the generator."""
        call = replace(self, arguments={**self.arguments, "seed": seed})
        return super(Seeded, call).run(steps, **changes)


@_builds(LTXI2VLongMultiPromptPipeline={})
def _long(pipeline) -> Tiny:
    """It goes over the video in windows, each with a loop of its own."""
    parts = ltx_condition().pipe.components
    size = {"height": 32, "width": 32, "num_frames": 9}
    return prompted(made(pipeline, parts, kind=Seeded, skip_steps_sigma_threshold=None, **size), MASKED)


@_builds(WanModularPipeline={})
def _wan_modular(_) -> Tiny:
    return wan_modular(prompt="a red star")


class TextStates(ModularPipelineBlocks):
    """The text states of prompts: what later blocks call them, and the ways to hand them."""

    def __init__(self, model_name, named):
        self.model_name, self.named = model_name, named
        super().__init__()

    @property
    def inputs(self):
        return [InputParam("prompt", required=True)]

    @property
    def intermediate_outputs(self):
        return [OutputParam(name) for name in self.named]

    def __call__(self, components, state):
        block = self.get_block_state(state)
        ways = states([block.prompt] if isinstance(block.prompt, str) else block.prompt)
        for name, way in self.named.items():
            setattr(block, name, ways[way]())
        self.set_block_state(state, block)
        return components, state


TEXT = {"prompt_embeds": "text", "negative_prompt_embeds": "other"}
POOLED = {"pooled_prompt_embeds": "pooled", "negative_pooled_prompt_embeds": "other_pooled"}
MASKS = {"prompt_embeds_mask": "mask", "negative_prompt_embeds_mask": "mask"}


def modular(pipeline, core, like, named, branches=2, config=None, **arguments) -> Tiny:
    """Its own blocks up to the denoised latents, after a block for the text states; `like` lends the parts."""
    folder = getattr(diffusers, pipeline).__module__.rsplit(".", 1)[0]
    names = (name for _, name, _ in pkgutil.iter_modules(importlib.import_module(folder).__path__))
    modules = [importlib.import_module(f"{folder}.{name}") for name in names if name.startswith("modular_blocks")]
    core = next(getattr(module, core) for module in modules if hasattr(module, core))()
    blocks = {"text": TextStates(core.model_name, named), **core.sub_blocks}
    pipe = getattr(diffusers, pipeline)(SequentialPipelineBlocks.from_blocks_dict(blocks))
    lent = {**like().pipe.components, "guider": ClassifierFreeGuidance(guidance_scale=5.0)}
    if config:
        model = lent["transformer"]
        lent["transformer"] = _model(type(model).__name__, **{**model.config, **config})
    wanted = {component.name for component in core.expected_components}
    pipe.update_components(**{name: part for name, part in lent.items() if name in wanted})
    pipe.set_progress_bar_config(disable=True)
    return TinyModular(pipe, {"prompt": PROMPT, "height": 32, "width": 32, **arguments}, branches)


@_builds(
    FluxModularPipeline={
        "core": "FluxCoreDenoiseStep",
        "like": "FluxPipeline",
        "named": {"prompt_embeds": "text", "pooled_prompt_embeds": "pooled"},
        "branches": 1,
    },
    Flux2ModularPipeline={
        "core": "Flux2CoreDenoiseStep",
        "like": "Flux2Pipeline",
        "named": {"prompt_embeds": "text", "txt_ids": "ids4"},
        "branches": 1,
    },
    Flux2KleinModularPipeline={
        "core": "Flux2KleinCoreDenoiseStep",
        "like": "Flux2KleinPipeline",
        "named": {"prompt_embeds": "text", "txt_ids": "ids4"},
        "branches": 1,
    },
    Flux2KleinBaseModularPipeline={
        "core": "Flux2KleinBaseCoreDenoiseStep",
        "like": "Flux2KleinPipeline",
        "named": {**TEXT, "txt_ids": "ids4", "negative_txt_ids": "ids4"},
    },
    FluxKontextModularPipeline={
        "core": "FluxKontextCoreDenoiseStep",
        "like": "FluxKontextPipeline",
        "named": {"prompt_embeds": "text", "pooled_prompt_embeds": "pooled"},
        "branches": 1,
    },
    StableDiffusion3ModularPipeline={
        "core": "StableDiffusion3T2ICoreDenoiseStep",
        "like": "StableDiffusion3Pipeline",
        "named": {**TEXT, **POOLED},
    },
    QwenImageModularPipeline={
        "core": "QwenImageCoreDenoiseStep",
        "like": "QwenImagePipeline",
        "named": {**TEXT, **MASKS},
    },
    ZImageModularPipeline={
        "core": "ZImageCoreDenoiseStep",
        "like": "ZImagePipeline",
        "named": {"prompt_embeds": "texts", "negative_prompt_embeds": "others"},
    },
    ErnieImageModularPipeline={
        "core": "ErnieImageCoreDenoiseStep",
        "like": "ErnieImagePipeline",
        "named": {"prompt_embeds": "texts", "negative_prompt_embeds": "others"},
    },
    LTXModularPipeline={
        "core": "LTXCoreDenoiseStep",
        "like": "LTXPipeline",
        "named": {**TEXT, "prompt_attention_mask": "mask", "negative_prompt_attention_mask": "mask"},
        **{"height": 64, "width": 64, "num_frames": 9},
    },
    HunyuanVideo15ModularPipeline={
        "core": "HunyuanVideo15CoreDenoiseStep",
        "like": "HunyuanVideo15Pipeline",
        "config": {"in_channels": 65, "out_channels": 32},
        "named": {f"{name}{end}": way for end in ("", "_2") for name, way in {**TEXT, **MASKS}.items()},
    },
)
def _modular(pipeline, core, like, named, **arguments) -> Tiny:
    if like in PIPELINES:
        return modular(pipeline, core, PIPELINES[like], named, **{"num_frames": 5, **arguments})
    return modular(pipeline, core, census_images.PIPELINES[like], named, **arguments)


def _sdxl() -> Tiny:
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    blocks = {"down_block_types": down, "up_block_types": up, "block_out_channels": (16, 16), "layers_per_block": 1}
    text = {"cross_attention_dim": 16, "addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    size = {"sample_size": 16, "norm_num_groups": 4, "attention_head_dim": 2, "use_linear_projection": True}
    unet = _model("UNet2DConditionModel", **blocks, **text, **size, projection_class_embeddings_input_dim=40)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = EulerDiscreteScheduler(**betas, timestep_spacing="leading", steps_offset=1)
    return made("StableDiffusionXLPipeline", {"unet": unet, "scheduler": scheduler, "vae": _autoencoder()})


@_builds(StableDiffusionXLModularPipeline={})
def _sdxl_modular(pipeline) -> Tiny:
    return modular(pipeline, "StableDiffusionXLCoreDenoiseStep", _sdxl, {**TEXT, **POOLED})


ONE_PROMPT = {  # the pipelines that take one prompt at a time
    "WanVACEPipeline",
    "EasyAnimateControlPipeline",
    "EasyAnimateInpaintPipeline",
    "MotifVideoImage2VideoPipeline",
    "HunyuanVideoFramepackPipeline",
    "LTXI2VLongMultiPromptPipeline",
    "HeliosPyramidPipeline",  # noise between the sizes is drawn from the first generator
    "Kandinsky5I2VPipeline",  # the first frames are brought to the mean of all videos at the end
}
FOR_EACH = {  # what the call wants as many of as prompts
    "CogVideoXImageToVideoPipeline": "image",
    "CogVideoXVideoToVideoPipeline": "video",
    "CogVideoXFunControlPipeline": "control_video",
    "LTXImageToVideoPipeline": "image",
    "LTX2ImageToVideoPipeline": "image",
    "HunyuanVideoImageToVideoPipeline": "image",
    "HunyuanSkyreelsImageToVideoPipeline": "image",
    "CosmosVideoToWorldPipeline": "image",
    "Cosmos2VideoToWorldPipeline": "image",
    "LucyEditPipeline": "video",
}
CANNOT: dict[str, str] = {
    "ConsisIDPipeline": "it needs OpenCV",
    "Cosmos2_5_TransferPipeline": "it goes over the video in chunks, with a ControlNet",
    "Cosmos3OmniPipeline": "one model of text and video, which reads token ids",
    "SanaWMPipeline": "it needs a camera path",
    "LTX2DFRPipeline": "it needs a model of LTX-2.5, with keyframe slots",
    "LTX2DFRTemporalRefinePipeline": "it refines the keyframes of LTX2DFRPipeline",
}
