"""More stock diffusers pipelines at tiny size, each for a way of its own to step, to guide or to keep its parts."""

import zlib
from dataclasses import replace

import diffusers
import pytest
import torch
import transformers
from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.modular_pipelines import ModularPipelineBlocks, SequentialPipelineBlocks, WanModularPipeline
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from diffusers.pipelines.ltx2 import LTX2TextConnectors

from tiny_pipelines import STEPS, Tiny, _autoencoder, _image, _model, _text, _tiny, _wan_autoencoder, sd3, wan

MASK = torch.ones(1, 5, dtype=torch.int64)


def _states(prompts, *shape) -> torch.Tensor:
    """Return random text states that belong to each prompt."""
    seeds = [zlib.crc32(prompt.encode()) for prompt in prompts]
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def _both(length=5) -> dict[str, torch.Tensor]:
    """Return text states of a prompt and a negative prompt."""
    return {"prompt_embeds": _text(1, length, 16), "negative_prompt_embeds": _text(1, length, 16, seed=3)}


def _both_masked() -> dict[str, torch.Tensor]:
    return {**_both(), "prompt_attention_mask": MASK, "negative_prompt_attention_mask": MASK}


def _flow_unipc(shift):
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def lumina2(**arguments) -> Tiny:
    """Guidance ends where step / steps passes `cfg_trunc_ratio`."""
    width = {"hidden_size": 8, "num_attention_heads": 1, "num_kv_heads": 1, "multiple_of": 16, "cap_feat_dim": 16}
    size = {"sample_size": 4, "in_channels": 4, "num_layers": 1, "axes_dim_rope": (4, 2, 2)}
    model = _model("Lumina2Transformer2DModel", **width, **size)
    parts = {"transformer": model, "scheduler": FlowMatchEulerDiscreteScheduler(shift=6.0), "vae": _autoencoder()}
    call = {"height": 32, "width": 32, "guidance_scale": 4.0, **_both_masked()}
    return _tiny("Lumina2Pipeline", 2, parts, **{**call, **arguments})


def zimage(**arguments) -> Tiny:
    """Its model takes and returns lists of images; both branches are one call. It lists its times before its loop."""
    layers = {"n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    size = {"in_channels": 4, "dim": 32, "cap_feat_dim": 16, "axes_dims": (8, 4, 4), "axes_lens": (256, 32, 32)}
    model = _model("ZImageTransformer2DModel", **layers, **size)
    model.x_pad_token.fill_(1.0), model.cap_pad_token.fill_(1.0)  # they begin as memory that nobody has set
    parts = {"transformer": model, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "vae": _autoencoder()}
    text = {name: list(states) for name, states in _both().items()}
    return _tiny("ZImagePipeline", 1, parts, **{"height": 32, "width": 32, "guidance_scale": 4.0, **text, **arguments})


def hunyuan15(guider=None, **arguments) -> Tiny:
    """Its guider says how many calls a step makes, and may keep a window of steps or a momentum.

    SkipLayerGuidance does not know its blocks (diffusers 0.42): give that one to `modular`.
    """
    width = {"num_attention_heads": 2, "attention_head_dim": 16, "rope_axes_dim": (4, 6, 6), "mlp_ratio": 1.0}
    text = {"text_embed_dim": 16, "text_embed_2_dim": 16, "image_embed_dim": 8, "num_refiner_layers": 1}
    model = _model(
        "HunyuanVideo15Transformer3DModel", **width, **text, num_layers=2, in_channels=9, out_channels=4, target_size=16
    )
    ratios = {"spatial_compression_ratio": 4, "temporal_compression_ratio": 2}
    size = {"block_out_channels": (16, 16), "latent_channels": 4, "layers_per_block": 1}
    match = {"downsample_match_channel": False, "upsample_match_channel": False}
    parts = {
        "transformer": model,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "vae": _model("AutoencoderKLHunyuanVideo15", **ratios, **size, **match),
        "guider": guider or ClassifierFreeGuidance(guidance_scale=5.0),
    }
    states = {**_both(), **{f"{name}_2": states.flip(1) for name, states in _both().items()}}
    states |= {name.replace("embeds", "embeds_mask"): MASK for name in states}
    call = {"height": 16, "width": 16, "num_frames": 5, **states}
    tiny = _tiny("HunyuanVideo15Pipeline", 2, parts, **{**call, **arguments})
    tiny.pipe.vision_num_semantic_tokens = 2  # in place of 729, all masked
    return tiny


def mochi(**arguments) -> Tiny:
    """Its noise levels go up from 0 to 1 (`invert_sigmas`)."""
    width = {"num_attention_heads": 2, "attention_head_dim": 8, "pooled_projection_dim": 16, "text_embed_dim": 16}
    size = {"num_layers": 1, "in_channels": 4, "time_embed_dim": 8, "max_sequence_length": 5}
    model = _model("MochiTransformer3DModel", **width, **size)
    torch.nn.init.normal_(model.pos_frequencies)
    parts = {"transformer": model, "scheduler": FlowMatchEulerDiscreteScheduler(invert_sigmas=True)}
    call = {"height": 32, "width": 32, "num_frames": 7, "guidance_scale": 4.5, **_both_masked()}
    return _tiny("MochiPipeline", 1, parts, **{**call, **arguments})


def ltx_condition(**arguments) -> Tiny:
    """It gives the scheduler a time for each token."""
    width = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 16}
    model = _model("LTXVideoTransformer3DModel", **width, num_layers=1, in_channels=8, out_channels=8)
    channels = {"latent_channels": 8, "block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    layers = {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5, "decoder_inject_noise": (False,) * 5}
    scaling = {f"{kind}spatio_temporal_scaling": (True, True, False, False) for kind in ("", "decoder_")}
    up = {"upsample_residual": (False,) * 4, "upsample_factor": (1,) * 4, "patch_size": 1, "patch_size_t": 1}
    vae = _model("AutoencoderKLLTXVideo", **channels, **layers, **scaling, **up)
    parts = {"transformer": model, "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": vae}
    call = {"height": 32, "width": 32, "num_frames": 9, "guidance_scale": 3.0, **_both_masked()}
    return _tiny("LTXConditionPipeline", 1, parts, **{**call, **arguments})


def ltx_condition_image(**arguments) -> Tiny:
    """The tokens of the first frame are at time 0 throughout."""
    return ltx_condition(**{"image": _image(), "strength": 1.0, **arguments})


def ltx2(**arguments) -> Tiny:
    """Video and audio, the audio on a copy of the scheduler; the audio is the second output of the call."""
    if not hasattr(transformers, "Gemma4ForConditionalGeneration"):
        pytest.skip("diffusers' LTX2Pipeline takes a later transformers")
    video = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "in_channels": 4}
    audio = {"num_attention_heads": 2, "attention_head_dim": 4, "cross_attention_dim": 8, "in_channels": 4}
    widths = {**video, "out_channels": 4, **{f"audio_{name}": value for name, value in audio.items()}}
    rope = {"rope_type": "split", "rope_double_precision": False}
    model = _model(
        "LTX2VideoTransformer3DModel", **widths, **rope, audio_out_channels=4, num_layers=1, caption_channels=16
    )
    connector = {"connector_num_attention_heads": 2, "connector_attention_head_dim": 8, "connector_num_layers": 1}
    connector["connector_num_learnable_registers"] = None
    both = {f"{kind}_{name}": value for kind in ("video", "audio") for name, value in connector.items()}
    text = {"caption_channels": 16, "text_proj_in_factor": 1, "connector_rope_base_seq_len": 8}
    connectors = LTX2TextConnectors(**both, **rope, **text).eval()
    scaling = {"spatio_temporal_scaling": (True,), "decoder_spatio_temporal_scaling": (True,)}
    layers = {"layers_per_block": (1,), "decoder_layers_per_block": (1, 1), "decoder_inject_noise": (False, False)}
    channels = {"latent_channels": 4, "block_out_channels": (8,), "decoder_block_out_channels": (8,)}
    ways = {"downsample_type": ("spatial",), "upsample_residual": (False,), "upsample_factor": (1,)}
    patches = {"patch_size": 1, "patch_size_t": 1}
    audio_size = {"base_channels": 4, "ch_mult": (1,), "num_res_blocks": 1, "latent_channels": 2, "mel_bins": 8}
    parts = {
        "transformer": model,
        "connectors": connectors,
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
        ),
        "vae": _model("AutoencoderKLLTX2Video", **channels, **layers, **scaling, **ways, **patches),
        "audio_vae": _model("AutoencoderKLLTX2Audio", **audio_size),
    }
    size = {"height": 32, "width": 32, "num_frames": 5, "frame_rate": 25.0}
    scales = {"guidance_scale": 3.0, "audio_guidance_scale": 7.0}
    off = {"stg_scale": 0.0, "modality_scale": 1.0, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0}
    return _tiny("LTX2Pipeline", 1, parts, **{**size, **scales, **off, **_both_masked(), **arguments})


def audio_of(tiny: Tiny, steps=STEPS, seed=0, **changes) -> torch.Tensor:
    """Return the final audio latents of one call of `ltx2`."""
    options = {"num_inference_steps": steps, "output_type": "latent", "return_dict": False}
    generator = torch.Generator().manual_seed(seed)
    return tiny.pipe(**{**tiny.arguments, **options, "generator": generator, **changes})[1]


class NoChecker(torch.nn.Module):
    """A safety checker that takes any prompt."""

    device, dtype = torch.device("cpu"), torch.float32

    def to(self, *_, **__):
        return self

    def check_text_safety(self, prompt):
        return True


def cosmos2(**arguments) -> Tiny:
    """Its last step goes nowhere: it sets the last noise level to the one before, after `set_timesteps`."""
    width = {"num_attention_heads": 2, "attention_head_dim": 16, "mlp_ratio": 2, "text_embed_dim": 16}
    size = {"in_channels": 16, "out_channels": 16, "num_layers": 1, "adaln_lora_dim": 4, "max_size": (4, 32, 32)}
    rope = {"patch_size": (1, 2, 2), "rope_scale": (2.0, 1.0, 1.0), "concat_padding_mask": False}
    model = _model("CosmosTransformer3DModel", **width, **size, **rope)
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    parts = {"transformer": model, "scheduler": scheduler, "safety_checker": NoChecker(), **_wan_autoencoder()}
    call = {"height": 32, "width": 32, "guidance_scale": 7.0, **_both()}
    return _tiny("Cosmos2TextToImagePipeline", 2, parts, **{**call, **arguments})


def skyreels(**arguments) -> Tiny:
    """It steps each latent frame on a copy of its scheduler."""
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 16}
    size = {"num_layers": 1, "in_channels": 16, "out_channels": 16, "rope_max_seq_len": 32}
    model = _model("SkyReelsV2Transformer3DModel", **config, **size)
    parts = {"transformer": model, "scheduler": _flow_unipc(8.0), **_wan_autoencoder()}
    call = {"height": 16, "width": 16, "num_frames": 9, "prompt": None, "guidance_scale": 6.0, **_both()}
    return _tiny("SkyReelsV2DiffusionForcingPipeline", 2, parts, **{**call, **arguments})


def wan_low_noise_only() -> Tiny:
    """Wan2.2 with its second model alone, for all times; `pipe.transformer` is None."""
    tiny = wan()
    parts = {**tiny.pipe.components, "transformer": None, "transformer_2": tiny.pipe.transformer}
    tiny.pipe = diffusers.WanPipeline(**parts, boundary_ratio=1.01)
    tiny.pipe.set_progress_bar_config(disable=True)
    return tiny


def sd3_skip_layers(**arguments) -> Tiny:
    """One call more at step 1 of 8, without the first of two layers: with the stock window of steps, 0.01 to 0.2."""
    config = {**sd3().pipe.transformer.config, "num_layers": 2}
    guidance = {"guidance_scale": 5.0, "skip_guidance_layers": [0]}
    return sd3(parts={"transformer": _model("SD3Transformer2DModel", **config)}, **{**guidance, **arguments})


def chronoedit(**arguments) -> Tiny:
    """With `enable_temporal_reasoning` it cuts latents and solver state at a step."""
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 16}
    size = {"num_layers": 1, "in_channels": 36, "out_channels": 16, "rope_max_seq_len": 32}
    model = _model("ChronoEditTransformer3DModel", **config, **size, image_dim=16, added_kv_proj_dim=24)
    parts = {"transformer": model, "scheduler": _flow_unipc(2.0), **_wan_autoencoder()}
    call = {"height": 16, "width": 16, "image": _image(16), "guidance_scale": 5.0, **_both(512)}
    tiny = _tiny("ChronoEditPipeline", 2, parts, **{**call, **arguments})
    tiny.pipe.encode_image = lambda *_: _text(1, 4, 16, seed=6)
    return tiny


def kandinsky5(**arguments) -> Tiny:
    """It writes each step's latents into the same tensor."""
    size = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 16, "axes_dims": (4, 6, 6)}
    width = {"model_dim": 32, "time_dim": 16, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 1}
    model = _model("Kandinsky5Transformer3DModel", **size, **width)
    for parameter in model.parameters():  # its gates begin with zeros, and would let no text in
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    parts = {"transformer": model, "scheduler": FlowMatchEulerDiscreteScheduler(shift=10.0)}
    text = {f"{name}_qwen": states for name, states in _both().items()}
    text |= {f"{name}_clip": states.mean(1) for name, states in _both().items()}
    text |= {f"{name}_cu_seqlens": torch.tensor([0, 5]) for name in ("prompt", "negative_prompt")}
    call = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 5.0, **text}
    return _tiny("Kandinsky5T2VPipeline", 2, parts, **{**call, **arguments})


class TextStates(ModularPipelineBlocks):
    """The text states of prompts, and of no text."""

    model_name = "wan"

    @property
    def inputs(self):
        return [InputParam("prompt", required=True)]

    @property
    def intermediate_outputs(self):
        return [OutputParam("prompt_embeds"), OutputParam("negative_prompt_embeds")]

    def __call__(self, components, state):
        block = self.get_block_state(state)
        prompts = [block.prompt] if isinstance(block.prompt, str) else block.prompt
        block.prompt_embeds = _states(prompts, 5, 16)
        block.negative_prompt_embeds = _states([""] * len(prompts), 5, 16)
        self.set_block_state(state, block)
        return components, state


class TinyModular(Tiny):
    def run(self, steps=STEPS, seed=0, **changes) -> torch.Tensor:
        """The final latents of one call, which has an `output` and no `output_type`."""
        options = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed), "output": "latents"}
        return self.pipe(**{**self.arguments, **options, **changes})


def modular(guider=None, **arguments) -> Tiny:
    """Wan's modular pipeline: diffusers' own blocks up to the denoised latents, after a block for the text states.

    Called as `pipe(prompt="a red star", num_inference_steps=8, height=16, width=16, num_frames=5, generator=…,
    output="latents")`. A prompt is a text or a list of them. It has `transformer`, `scheduler` and `guider`, any of
    diffusers': SkipLayerGuidance with `skip_layer_config=LayerSkipConfig(indices=[0], fqn="blocks")`.
    """
    parts = wan().pipe.components
    blocks = {"text": TextStates(), **WanCoreDenoiseStep().sub_blocks}
    pipe = WanModularPipeline(SequentialPipelineBlocks.from_blocks_dict(blocks))
    pipe.update_components(transformer=parts["transformer"], scheduler=parts["scheduler"])
    pipe.update_components(guider=guider or ClassifierFreeGuidance(guidance_scale=5.0))
    pipe.set_progress_bar_config(disable=True)
    return TinyModular(
        pipe, {"prompt": "a small blue ring", "height": 16, "width": 16, "num_frames": 5, **arguments}, branches=2
    )


def with_prompts(tiny: Tiny) -> Tiny:
    """As in helpers.py, for all of these: text states that belong to each prompt, in place of given ones.

    Its runs need a prompt: `with_prompts(zimage()).run(prompt=["a red star"])`.
    """
    name, given = type(tiny.pipe).__name__, tiny.arguments.get("prompt_embeds", _text(1, 5, 16))
    shape = given.shape[1:] if isinstance(given, torch.Tensor) else (5, 16)

    def encode_prompt(prompt=None, *_, batch_size=1, **__):
        """`prompt` is None for the negative prompt of HunyuanVideo 1.5."""
        prompt = [prompt or ""] * batch_size if prompt is None or isinstance(prompt, str) else prompt
        nothing, mask = [""] * len(prompt), torch.ones(len(prompt), 5, dtype=torch.int64)
        text, other, pooled = _states(prompt, *shape), _states(nothing, *shape), _states(prompt, 16)
        lengths = 5 * torch.arange(len(prompt) + 1)
        return {
            "ZImagePipeline": (list(text), list(other)),
            "HunyuanVideo15Pipeline": (text, mask, text.flip(1), mask),
            "StableDiffusion3Pipeline": (text, other, pooled, _states(nothing, 16)),
            "Kandinsky5T2VPipeline": (text, pooled, lengths),
            **dict.fromkeys(TWO_STATES, (text, other)),
        }.get(name, (text, mask, other, mask))

    tiny.pipe.encode_prompt = encode_prompt
    return replace(tiny, arguments={k: v for k, v in tiny.arguments.items() if "prompt" not in k})


TWO_STATES = (
    "ChronoEditPipeline",
    "CogVideoXPipeline",
    "Cosmos2TextToImagePipeline",
    "SkyReelsV2DiffusionForcingPipeline",
    "WanPipeline",
)
MORE = {
    build.__name__: build
    for build in (
        lumina2,
        zimage,
        hunyuan15,
        mochi,
        ltx_condition,
        ltx_condition_image,
        ltx2,
        cosmos2,
        skyreels,
        wan_low_noise_only,
        sd3_skip_layers,
        chronoedit,
        kandinsky5,
        modular,
    )
}
