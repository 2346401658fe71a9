"""Image pipelines of diffusers at tiny size, by class name: real classes, random weights, text states by prompt."""

import inspect
import sys
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SCMScheduler,
)
from PIL import Image

from more_tiny_pipelines import _flow_unipc, _states, cosmos2, kandinsky5, lumina2, zimage
from tiny_pipelines import FLUX, STEPS, Tiny, _image, _model, _wan_autoencoder, flux, qwenimage, sana, sd3

PIPELINES: dict[str, Callable[[], Tiny]] = {}
PROMPT = "a red star"


def made(pipeline, parts, branches=1, kind=Tiny, **arguments) -> Tiny:
    """The pipeline of this name from some of its parts; the others are None."""
    stock = getattr(diffusers, pipeline)
    pipe = stock(**{**dict.fromkeys(stock._get_signature_keys(stock)[0]), **parts})
    pipe.set_progress_bar_config(disable=True)
    return kind(pipe, arguments, branches)


def alive(model, std=0.1):
    """The model, with random weights where it begins with zeros."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=std)
    return model


def loud(model, std=0.2):
    """The model, with weights so large that the text matters."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def states(prompts, shape=(5, 16), pooled=16) -> dict[str, Callable[[], Any]]:
    """Ways to hand text states to a model, by a short name; the "other" are of no text."""
    count, length, width = len(prompts), *shape[:1], shape[-1]
    text, other = _states(prompts, *shape), _states([""] * count, *shape)
    return {
        "text": lambda: text,
        "other": lambda: other,
        "pooled": lambda: _states(prompts, pooled),
        "other_pooled": lambda: _states([""] * count, pooled),
        "texts": lambda: list(text),
        "others": lambda: list(other),
        "twice": lambda: _states(prompts, length, 2 * width),
        "other_twice": lambda: _states([""] * count, length, 2 * width),
        "layers": lambda: torch.stack([text] * 2),
        "other_layers": lambda: torch.stack([other] * 2),
        "mask": lambda: torch.ones(count, length, dtype=torch.int64),
        "bits": lambda: torch.ones(count, length, dtype=torch.bool),
        "no_bits": lambda: torch.zeros(count, length, dtype=torch.bool),
        "ids": lambda: torch.zeros(length, 3),
        "ids4": lambda: torch.zeros(count, length, 4),
        "lengths": lambda: length * torch.arange(count + 1, dtype=torch.int32),
        "none": lambda: None,
    }


def prompted(tiny, outputs, shape=(5, 16), method="encode_prompt", pooled=16, negative=False) -> Tiny:
    """Let `method` of the pipeline return text states of its prompt, named in `outputs`, and give the call a prompt.

    A prompt without text stands for as many as there were texts before it.
    """
    count = 1

    def encode(*given, prompt=None, prompts=None, **_):
        nonlocal count
        given = [each for each in (prompt, prompts, *given) if each and isinstance(each, (str, list))]
        texts = next((each for each in given if isinstance(each[0], str)), "")
        texts = [texts] if isinstance(texts, str) else texts
        count = len(texts) if any(texts) else count
        ways = states(texts if any(texts) else [""] * count, shape, pooled)
        made = tuple(ways[name]() for name in outputs.split())
        return made if len(made) > 1 else made[0]

    setattr(tiny.pipe, method, encode)
    steady(tiny.pipe)
    given = ("prompt", "negative_prompt", "pooled", "negative_pooled")
    tiny.arguments = {k: v for k, v in tiny.arguments.items() if not k.startswith(given)} | {"prompt": PROMPT}
    if negative:
        tiny.arguments["negative_prompt"] = ""
    return tiny


def steady(pipe):
    """Let the autoencoder give means: it draws no noise, and each of several prompts sees the noise it sees alone."""
    if not hasattr(getattr(pipe, "vae", None), "encode"):
        return
    encode = pipe.vae.encode

    def means(*given, **options):
        output = encode(*given, **options)
        states = output[0]
        if hasattr(states, "mode"):
            states.sample = lambda *_, **__: states.mode()
        return output

    pipe.vae.encode = means


def _autoencoder(channels=4, levels=2):
    """An image autoencoder: 2× down at each level but one."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    size = {"block_out_channels": (4,) * levels, "latent_channels": channels, "norm_num_groups": 2, "shift_factor": 0.0}
    return _model("AutoencoderKL", **blocks, **size)


class Pixels(Tiny):
    def run(self, steps=STEPS, seed=0, **changes) -> torch.Tensor:
        """The final pixels of one call, which gives no latents."""
        pixels = super().run(steps, seed, **{"output_type": "pt", **changes})
        return pixels if isinstance(pixels, torch.Tensor) else torch.stack(list(pixels))


def _mask(size=32) -> Image.Image:
    mask = Image.new("L", (size, size))
    mask.paste(255, (size // 4, size // 4, size * 3 // 4, size))
    return mask


def builds(into, **rows):
    """Note a function as the builder of pipelines, each with its own arguments."""

    def note(build):
        into.update({name: partial(build, name, **changes) for name, changes in rows.items()})
        return build

    return note


_builds = partial(builds, PIPELINES)


EDIT = {"image": _image(), "strength": 0.75}
PAINT = {**EDIT, "mask_image": _mask()}
CONTROL = {"control_image": _image()}
KONTEXT = {"max_area": 32 * 32, "_auto_resize": False}
SMALL = {"image": _image(8), "strength": 0.75}


@_builds(
    FluxPipeline={},
    FluxImg2ImgPipeline=EDIT,
    FluxInpaintPipeline=PAINT,
    FluxFillPipeline={"channels": 48, "image": _image(), "mask_image": _mask()},
    FluxControlPipeline={"channels": 32, **CONTROL},
    FluxControlImg2ImgPipeline={"channels": 32, **EDIT, **CONTROL},
    FluxControlInpaintPipeline={"channels": 32, **PAINT, **CONTROL},
    FluxControlNetPipeline=CONTROL,
    FluxControlNetImg2ImgPipeline={**EDIT, **CONTROL},
    FluxControlNetInpaintPipeline={**PAINT, **CONTROL},
    FluxKontextPipeline={"image": _image(), **KONTEXT},
    FluxKontextInpaintPipeline={**PAINT, **KONTEXT},
)
def _flux(pipeline, channels=16, **arguments) -> Tiny:
    tiny = flux(pipeline, **arguments)
    if channels != 16:
        model = _model(
            "FluxTransformer2DModel", **{**FLUX, "in_channels": channels}, guidance_embeds=True, out_channels=16
        )
        tiny.pipe.register_modules(transformer=model)
    return prompted(tiny, "text pooled ids")


@_builds(
    Flux2Pipeline={},
    Flux2KleinPipeline={"branches": 2},
    Flux2KleinInpaintPipeline={"branches": 2, **PAINT},
    Flux2KleinKVPipeline={"image": _image(64)},
)
def _flux2(pipeline, branches=1, parts=None, **arguments) -> Tiny:
    layers = {"num_layers": 1, "num_single_layers": 1, "timestep_guidance_channels": 8, "axes_dims_rope": (4, 4, 4, 4)}
    width = {"in_channels": 16, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    channels = {"block_out_channels": (4, 4), "latent_channels": 4, "norm_num_groups": 2, "layers_per_block": 1}
    guided = {"guidance_embeds": pipeline == "Flux2Pipeline"}
    parts = {
        "transformer": loud(_model("Flux2Transformer2DModel", **layers, **width, **guided)),
        "vae": _model("AutoencoderKLFlux2", **blocks, **channels),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        **(parts or {}),
    }
    return prompted(made(pipeline, parts, branches, height=32, width=32, **arguments), "text ids4")


@_builds(
    StableDiffusion3Pipeline={},
    StableDiffusion3Img2ImgPipeline=SMALL,
    StableDiffusion3InpaintPipeline={"channels": 16, **SMALL, "mask_image": _mask(8)},
    StableDiffusion3ControlNetPipeline={"extra": 0, "control_image": _image(8)},
    StableDiffusion3ControlNetInpaintingPipeline={
        "extra": 1,
        "control_image": _image(8),
        "control_mask": _mask(8),
    },
    StableDiffusion3PAGPipeline={"layers": 2, "pag_scale": 3.0},
    StableDiffusion3PAGImg2ImgPipeline={"layers": 2, "pag_scale": 3.0, **SMALL},
)
def _sd3(pipeline, extra=None, layers=1, channels=4, **arguments) -> Tiny:
    size = {"in_channels": channels, "out_channels": channels, "num_layers": layers}
    config = {**sd3().pipe.transformer.config, **size}
    parts = {
        "transformer": _model("SD3Transformer2DModel", **config),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": _autoencoder(channels),
    }
    if extra is not None:
        parts["controlnet"] = alive(_model("SD3ControlNetModel", **{**config, "extra_conditioning_channels": extra}))
    tiny = made(pipeline, parts, **{"height": 8, "width": 8, "guidance_scale": 7.0, **arguments})
    return prompted(tiny, "text other pooled other_pooled")


@_builds(
    QwenImagePipeline={},
    QwenImageImg2ImgPipeline=EDIT,
    QwenImageInpaintPipeline=PAINT,
    QwenImageControlNetPipeline={"extra": 0, **CONTROL},
    QwenImageControlNetInpaintPipeline={"extra": 4, **CONTROL, "control_mask": _mask()},
    QwenImageEditPipeline={"image": _image()},
    QwenImageEditInpaintPipeline=PAINT,
    QwenImageEditPlusPipeline={"image": [_image()]},
    QwenImageLayeredPipeline={"channels": 64, "image": _image().convert("RGBA"), "layers": 2},
)
def _qwen(pipeline, channels=16, extra=None, branches=2, **arguments) -> Tiny:
    base = qwenimage().pipe
    config = {**base.transformer.config, "in_channels": channels}
    parts = {**base.components, "text_encoder": Encoder()}
    if "Layered" in pipeline:  # four channels of pixels, which must not look like latents
        config |= {"use_additional_t_cond": True, "use_layer3d_rope": True, "out_channels": 16}
        parts["vae"] = _model("AutoencoderKLQwenImage", base_dim=4, z_dim=16, num_res_blocks=1, input_channels=4)
    parts["transformer"] = _model("QwenImageTransformer2DModel", **config)
    if extra is not None:
        config = {name: value for name, value in config.items() if name in CONTROLNET}
        parts["controlnet"] = alive(_model("QwenImageControlNetModel", **config, extra_condition_channels=extra))
    size = {} if "Layered" in pipeline else {"height": 32, "width": 32}
    kind = Pixels if "Layered" in pipeline else Tiny  # no latents come out of this one
    tiny = made(pipeline, parts, branches, kind=kind, true_cfg_scale=4.0, **size, **arguments)
    return small(prompted(tiny, "text mask", negative=True))


def small(tiny) -> Tiny:
    """Let the pipeline's module bring images to 32 by 32, in place of a million pixels."""
    module = sys.modules[type(tiny.pipe).__module__]
    if hasattr(module, "calculate_dimensions"):
        more = len(module.calculate_dimensions(1024, 1.0)) - 2
        module.calculate_dimensions = lambda *_: (32, 32, *[None] * more)
    return tiny


class Encoder(torch.nn.Module):
    """What asks a pipeline's text encoder for its device and type finds them here."""

    device, dtype, image_processor = torch.device("cpu"), torch.float32, None

    @property
    def tokenizer(self):
        return self

    def apply_chat_template(self, *_, **__):
        return [[0]]

    def encode(self, _):
        return [0]


CONTROLNET = [
    "num_attention_heads",
    "attention_head_dim",
    "joint_attention_dim",
    "axes_dims_rope",
    "num_layers",
    "in_channels",
]


@_builds(
    ZImagePipeline={},
    ZImageImg2ImgPipeline=EDIT,
    ZImageInpaintPipeline=PAINT,
    ZImageControlNetPipeline={"control": 4, **CONTROL},
    ZImageControlNetInpaintPipeline={"control": 9, "image": _image(), "mask_image": _mask(), **CONTROL},
)
def _zimage(pipeline, control=0, **arguments) -> Tiny:
    parts = dict(zimage().pipe.components)
    if control:
        size = {"control_layers_places": [0], "control_refiner_layers_places": [0], "control_in_dim": control}
        model = _model("ZImageControlNetModel", **size, dim=32, n_refiner_layers=1, n_heads=2, n_kv_heads=2)
        parts["controlnet"] = alive(model)
    tiny = made(pipeline, parts, height=32, width=32, guidance_scale=4.0, **arguments)
    return prompted(tiny, "texts others")


@_builds(ChromaPipeline={}, ChromaImg2ImgPipeline=EDIT, ChromaInpaintPipeline=PAINT)
def _chroma(pipeline, **arguments) -> Tiny:
    config = {**FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    parts = {
        "transformer": _model("ChromaTransformer2DModel", **{k: v for k, v in config.items() if k[:6] != "pooled"}),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True),
        "vae": _autoencoder(),
    }
    parts["transformer"].register_to_config(guidance_embeds=False)  # asked for by the inpainting pipeline
    tiny = made(pipeline, parts, 2, height=32, width=32, guidance_scale=5.0, **arguments)
    return prompted(tiny, "text ids bits other ids bits")


@_builds(SanaPipeline={}, SanaPAGPipeline={"layers": 2})
def _sana(pipeline, layers=1, outputs="text mask other mask", parts=None, **arguments) -> Tiny:
    base = sana().pipe
    config = {**base.transformer.config, "num_layers": layers}
    parts = {**base.components, "transformer": _model("SanaTransformer2DModel", **config), **(parts or {})}
    size = {"height": 128, "width": 128, "use_resolution_binning": False}
    return prompted(made(pipeline, parts, **size, **arguments), outputs)


@_builds(PixArtAlphaPipeline={}, PixArtSigmaPipeline={}, PixArtSigmaPAGPipeline={"layers": 2, "pag_scale": 3.0})
def _pixart(pipeline, layers=1, **arguments) -> Tiny:
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 16}
    model = _model("PixArtTransformer2DModel", **heads, num_layers=layers, sample_size=4)
    parts = {"transformer": model, "scheduler": DPMSolverMultistepScheduler(), "vae": _autoencoder()}
    size = {"height": 8, "width": 8, "use_resolution_binning": False}
    return prompted(made(pipeline, parts, **size, **arguments), "text mask other mask")


@_builds(AuraFlowPipeline={})
def _auraflow(pipeline) -> Tiny:
    layers = {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "sample_size": 4, "pos_embed_max_size": 16}
    width = {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16}
    model = loud(_model("AuraFlowTransformer2DModel", **layers, **width))
    parts = {"transformer": model, "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.73)}
    return prompted(made(pipeline, parts, height=32, width=32), "text mask other mask")


@_builds(
    CogView3PlusPipeline={}, CogView4Pipeline={}, CogView4ControlPipeline={"channels": 8, "control_image": _image(16)}
)
def _cogview(pipeline, channels=4, **arguments) -> Tiny:
    third = pipeline == "CogView3PlusPipeline"
    width = {"num_attention_heads": 2, "attention_head_dim": 8, "text_embed_dim": 16, "time_embed_dim": 8}
    size = {"num_layers": 1, "in_channels": channels, "out_channels": 4, "condition_dim": 4, "pos_embed_max_size": 16}
    rope = {} if third else {"rope_axes_dim": (16, 16)}
    name = "CogView3PlusTransformer2DModel" if third else "CogView4Transformer2DModel"
    noise = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, snr_shift_scale=4.0
    )
    flow = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
    parts = {
        "transformer": _model(name, **width, **size, **rope, sample_size=4),
        "scheduler": noise if third else flow,
        "vae": _autoencoder(),
    }
    return prompted(made(pipeline, parts, 1 if third else 2, height=16, width=16, **arguments), "text other")


@_builds(LuminaPipeline={})
def _lumina(pipeline) -> Tiny:
    width = {"hidden_size": 16, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16}
    model = alive(_model("LuminaNextDiT2DModel", **width, sample_size=4, num_layers=1, cross_attention_dim=16))
    parts = {"transformer": model, "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": _autoencoder()}
    return prompted(made(pipeline, parts, height=32, width=32), "text mask other mask")


@_builds(Lumina2Pipeline={})
def _lumina2(_) -> Tiny:
    return prompted(lumina2(), "text mask other mask")


@_builds(Cosmos2TextToImagePipeline={})
def _cosmos2(_) -> Tiny:
    """Its last step goes nowhere."""
    return prompted(cosmos2(), "text other")


@_builds(HiDreamImagePipeline={})
def _hidream(pipeline) -> Tiny:
    layers = {"num_layers": 1, "num_single_layers": 1, "llama_layers": (0, 1), "max_resolution": (16, 16)}
    width = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (4, 2, 2), "text_emb_dim": 32}
    size = {"patch_size": 2, "in_channels": 4, "out_channels": 4, "caption_channels": [16, 16]}
    model = _model("HiDreamImageTransformer2DModel", **layers, **width, **size)
    parts = {"transformer": model, "scheduler": _flow_unipc(3.0), "vae": _autoencoder()}
    tiny = made(pipeline, parts, height=16, width=16)
    tiny.pipe.default_sample_size = 8
    tiny = prompted(tiny, "text other layers other_layers pooled other_pooled", pooled=32)
    return tiny


@_builds(BriaPipeline={}, BriaFiboPipeline={}, BriaFiboEditPipeline={"image": _image()})
def _bria(pipeline, **arguments) -> Tiny:
    fibo = "Fibo" in pipeline
    layers = {"num_layers": 1, "num_single_layers": 1, "in_channels": 16, "axes_dims_rope": [0, 4, 4]}
    width = {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32 if fibo else 16}
    name = "BriaFiboTransformer2DModel" if fibo else "BriaTransformer2DModel"
    parts = {
        "transformer": _model(name, **layers, **width, **({"text_encoder_dim": 16} if fibo else {})),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": _wan_autoencoder()["vae"] if fibo else _autoencoder(),
    }
    outputs = "twice other_twice ids mask mask layers other_layers" if fibo else "text other ids"
    tiny = prompted(made(pipeline, parts, height=32, width=32, guidance_scale=5.0, **arguments), outputs)
    if "Edit" in pipeline:
        tiny.pipe.check_inputs = lambda *_, **__: None  # wants a prompt in JSON
    return tiny


@_builds(PRXPipeline={}, PRXPixelPipeline={"channels": 3})
def _prx(pipeline, channels=4, **arguments) -> Tiny:
    width = {"context_in_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1.0, "axes_dim": [4, 4]}
    pixel = {"bottleneck_size": 8, "resolution_embeds": True} if channels == 3 else {}
    model = alive(_model("PRXTransformer2DModel", **width, **pixel, in_channels=channels, depth=1))
    parts = {"transformer": model, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "vae": _autoencoder()}
    if channels == 3:
        del parts["vae"]
    size = {"height": 16, "width": 16, "use_resolution_binning": False}
    tiny = made(pipeline, parts, kind=Pixels if channels == 3 else Tiny, **size, **arguments)
    return prompted(tiny, "text bits other bits")


@_builds(
    LongCatImagePipeline={"enable_prompt_rewrite": False},
    LongCatImageEditPipeline={"image": _image()},
    OvisImagePipeline={},
)
def _longcat(pipeline, branches=2, **arguments) -> Tiny:
    ovis = pipeline == "OvisImagePipeline"
    config = {**FLUX, "in_channels": 16 if ovis else 64}
    config = {name: value for name, value in config.items() if not (ovis and name[:6] == "pooled")}
    name = "OvisImageTransformer2DModel" if ovis else "LongCatImageTransformer2DModel"
    model = _model(name, **config, **({"out_channels": 16} if ovis else {}))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    parts = {"transformer": model, "scheduler": scheduler, "vae": _autoencoder(4 if ovis else 16)}
    size = {} if "Edit" in pipeline else {"height": 32, "width": 32}
    if "Edit" in pipeline:
        parts["text_processor"] = Encoder()
    tiny = made(pipeline, parts, branches, **size, **arguments)
    return small(prompted(tiny, "text other ids ids" if ovis else "text ids"))


@_builds(Krea2Pipeline={})
def _krea2(pipeline) -> Tiny:
    width = {"attention_head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "axes_dims_rope": (4, 2, 2)}
    text = {"hidden_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
    layers = {"num_layers": 1, "num_text_layers": 2, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1}
    size = {"in_channels": 16, "intermediate_size": 16, "timestep_embed_dim": 8}
    text = {f"text_{name}": value for name, value in text.items()}
    parts = {
        "transformer": alive(_model("Krea2Transformer2DModel", **width, **text, **layers, **size)),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        "vae": qwenimage().pipe.vae,
    }
    return prompted(made(pipeline, parts, 2, height=32, width=32), "text bits", shape=(5, 2, 16), negative=True)


@_builds(GlmImagePipeline={})
def _glm(pipeline) -> Tiny:
    width = {"attention_head_dim": 8, "num_attention_heads": 2, "text_embed_dim": 16, "time_embed_dim": 16}
    size = {"in_channels": 4, "out_channels": 4, "num_layers": 1, "condition_dim": 8}
    model = _model("GlmImageTransformer2DModel", **width, **size, prior_vq_quantizer_codebook_size=16)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
    parts = {"transformer": model, "scheduler": scheduler, "vae": _autoencoder()}
    tiny = prompted(made(pipeline, parts, 2, height=32, width=32), "text other")
    tokens = torch.arange(64) % 16

    def prior(prompt, **_):
        return tokens.expand(1 if isinstance(prompt, str) else len(prompt), -1), None, None

    tiny.pipe.generate_prior_tokens = prior
    return tiny


@_builds(ErnieImagePipeline={})
def _ernie(pipeline) -> Tiny:
    width = {"hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 16, "rope_axes_dim": (4, 2, 2)}
    model = _model(
        "ErnieImageTransformer2DModel", **width, num_layers=1, in_channels=16, out_channels=16, text_in_dim=16
    )
    parts = {**_flux2("Flux2KleinPipeline").pipe.components, "transformer": alive(model)}
    parts |= {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "pe": None, "pe_tokenizer": None}
    parts.pop("is_distilled", None)
    return prompted(made(pipeline, parts, height=32, width=32, use_pe=False), "texts")


@_builds(NucleusMoEImagePipeline={})
def _nucleus(pipeline) -> Tiny:
    width = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4)}
    size = {"in_channels": 16, "out_channels": 4, "num_layers": 1, "moe_enabled": False, "capacity_factors": [8.0]}
    model = _model("NucleusMoEImageTransformer2DModel", **width, **size)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = {"transformer": model, "scheduler": scheduler, "vae": qwenimage().pipe.vae}
    return prompted(made(pipeline, parts, 2, height=32, width=32), "text mask", negative=True)


@_builds(Kandinsky5T2IPipeline={}, Kandinsky5I2IPipeline={"image": _image()})
def _kandinsky5(pipeline, **arguments) -> Tiny:
    """It writes each step's latents into the same tensor."""
    config = {**kandinsky5().pipe.transformer.config, "visual_cond": "image" in arguments}
    parts = {
        "transformer": alive(_model("Kandinsky5Transformer3DModel", **config)),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": _autoencoder(levels=4),
    }
    tiny = made(pipeline, parts, 2, height=32, width=32, **arguments)
    tiny.pipe.resolutions = [(32, 32)]
    return prompted(tiny, "text pooled lengths")


@_builds(SanaSprintPipeline={}, SanaSprintImg2ImgPipeline={"image": _image(), "strength": 0.75})
def _sprint(pipeline, **arguments) -> Tiny:
    """Its scheduler draws noise at each step."""
    config = {**sana().pipe.transformer.config, "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    model = alive(_model("SanaTransformer2DModel", **config))
    parts = {"transformer": model, "scheduler": SCMScheduler(), "vae": _deep()}
    size = {"height": 32, "width": 32, "use_resolution_binning": False, "intermediate_timesteps": None}
    return prompted(made(pipeline, parts, **size, **arguments), "text mask")


def _deep():
    """Return Sana's autoencoder: 2× down."""
    blocks = {"layers_per_block": (1, 1), "block_out_channels": (8, 8)}
    blocks = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in blocks.items()}
    return _model("AutoencoderDC", latent_channels=4, **blocks, **{f"{p}_qkv_multiscales": ((), ()) for p in PARTS})


PARTS = ("encoder", "decoder")


@_builds(SanaControlNetPipeline={})
def _sana_controlnet(pipeline, **arguments) -> Tiny:
    config = dict(sana().pipe.transformer.config)
    names = inspect.signature(diffusers.SanaControlNetModel.__init__).parameters
    controlnet = _model("SanaControlNetModel", **{name: value for name, value in config.items() if name in names})
    parts = {"controlnet": alive(controlnet), "vae": _deep()}
    return _sana(pipeline, parts=parts, control_image=_image(128))


@_builds(
    JoyImageEditPipeline={"branches": 2, "image": _image()}, JoyImageEditPlusPipeline={"images": [_image(), _image()]}
)
def _joy(pipeline, branches=1, **arguments) -> Tiny:
    width = {"hidden_size": 32, "num_attention_heads": 2, "text_dim": 16, "rope_dim_list": [4, 6, 6]}
    name = "JoyImageEditPlusTransformer3DModel" if "Plus" in pipeline else "JoyImageEditTransformer3DModel"
    parts = {
        "transformer": alive(_model(name, **width, num_layers=1, mlp_width_ratio=1.0)),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.5),
        **_wan_autoencoder(),
        "text_encoder": Encoder(),
    }
    tiny = made(pipeline, parts, branches, height=32, width=32, **arguments)
    for name in ("image_processor", "vae_image_processor"):
        if hasattr(tiny.pipe, name):
            getattr(tiny.pipe, name).get_default_height_width = lambda *_, **__: (32, 32)
    return prompted(tiny, "text mask", method="encode_prompt_multiple_images")


@_builds(Ideogram4Pipeline={})
def _ideogram4(pipeline) -> Tiny:
    """Its branches are two models."""
    width = {"attention_head_dim": 16, "num_attention_heads": 2, "intermediate_size": 16, "mrope_section": (4, 2, 2)}
    size = {"in_channels": 16, "num_layers": 1, "adaln_dim": 8, "llm_features_dim": 16}
    models = [alive(_model("Ideogram4Transformer2DModel", **width, **size), std) for std in (0.1, 0.2)]
    vae = _flux2("Flux2KleinPipeline").pipe.vae
    parts = {"transformer": models[0], "unconditional_transformer": models[1], "vae": vae}
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler()
    call = {"guidance_scale": 4.0, "guidance_schedule": None, "max_sequence_length": 5}
    tiny = prompted(made(pipeline, parts, 2, height=32, width=32, **call), "text")
    states = tiny.pipe.encode_prompt

    def packed(prompt, grid_h, grid_w, **_):
        text = torch.nn.functional.pad(states(prompt), (0, 0, 0, grid_h * grid_w))
        return text, *tiny.pipe._prepare_ids([5] * len(text), grid_h, grid_w, 5, "cpu")

    tiny.pipe.encode_prompt = packed
    return tiny


@_builds(DreamLitePipeline={}, DreamLiteMobilePipeline={})
def _dreamlite(pipeline) -> Tiny:
    """It takes one prompt at a time."""
    down = ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D")
    up = ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D")
    width = {"block_out_channels": (16, 16), "cross_attention_dim": 16, "attention_head_dim": 8, "norm_num_groups": 8}
    size = {"sample_size": 8, "down_block_types": down, "up_block_types": up, "layers_per_block": 1}
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = {"unet": _model("DreamLiteUNetModel", **width, **size), "scheduler": scheduler, "vae": _autoencoder()}
    parts["text_encoder"] = Encoder()
    return prompted(made(pipeline, parts, height=32, width=32), "text mask", negative="Mobile" not in pipeline)


class Classes(Tiny):
    def run(self, steps=STEPS, seed=0, prompt=PROMPT, **changes) -> torch.Tensor:
        """The images of one call, whose classes stand for the prompts."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        labels = {"class_labels": [zlib.crc32(each.encode()) % 10 for each in prompts]}
        return torch.from_numpy(super().run(steps, seed, **{"output_type": "np", **labels, **changes}))


@_builds(DiTPipeline={})
def _dit(pipeline) -> Tiny:
    """It takes classes, and no prompt."""
    size = {"num_attention_heads": 2, "attention_head_dim": 8, "out_channels": 8, "num_layers": 1, "sample_size": 8}
    model = alive(_model("DiTTransformer2DModel", **size, num_embeds_ada_norm=1000, norm_type="ada_norm_zero"))
    parts = {"transformer": model, "scheduler": DDIMScheduler(clip_sample=False), "vae": _autoencoder()}
    return made(pipeline, parts, kind=Classes)


@_builds(QwenImage21Pipeline={})
def _qwen21(pipeline) -> Tiny:
    width = {"num_attention_heads": 2, "attention_head_dim": 16, "context_in_dim": 16, "axes_dims_rope": (4, 6, 6)}
    model = _model("QwenImage21Transformer2DModel", **width, num_layers=1, in_channels=16, out_channels=16, mlp_ratio=1)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = {"transformer": model, "scheduler": scheduler, "processor": Encoder()}
    tiny = made(pipeline, parts, 2, height=64, width=64, true_cfg_scale=4.0)
    return prompted(tiny, "text mask no_bits", negative=True)


class Cloze(Tiny):
    def run(self, steps=STEPS, seed=0, prompt=PROMPT, **changes) -> torch.Tensor:
        """The final latents of one call, whose prompt is a `content_prompt`."""
        return super().run(steps, seed, **{"content_prompt": prompt, **changes})


@_builds(VisualClozeGenerationPipeline={})
def _cloze(pipeline) -> Tiny:
    """It takes a `content_prompt`, and rows of images, the last without its target."""
    tiny = _flux("FluxFillPipeline", channels=48)
    parts = {name: part for name, part in tiny.pipe.components.items() if name in ("vae", "transformer", "scheduler")}
    call = {"task_prompt": "as above", "content_prompt": PROMPT, "image": [[_image(), _image()], [_image(), None]]}
    tiny = prompted(made(pipeline, {**parts, "resolution": 32}, kind=Cloze, **call), "text pooled ids")
    states = tiny.pipe.encode_prompt
    tiny.pipe.encode_prompt = lambda content_prompt, **_: states(content_prompt)
    del tiny.arguments["prompt"]
    return tiny


ONE_PROMPT = {  # the pipelines that take one prompt at a time
    "QwenImageLayeredPipeline",
    "PRXPipeline",
    "PRXPixelPipeline",
    "QwenImageEditPlusPipeline",
    "LongCatImageEditPipeline",
    "VisualClozeGenerationPipeline",
    "DreamLitePipeline",
    "DreamLiteMobilePipeline",
}
FOR_EACH = {  # what the call wants as many of as prompts
    "StableDiffusion3Img2ImgPipeline": "image",
    "StableDiffusion3PAGImg2ImgPipeline": "image",
    "JoyImageEditPlusPipeline": "images",
    "ZImageControlNetInpaintPipeline": "mask_image",
    "Kandinsky5I2IPipeline": "image",
}
CANNOT: dict[str, str] = {
    "BriaFibo2Pipeline": "a tiny model of it fails in its attention",
    "VisualClozePipeline": "two pipelines in one call: VisualClozeGenerationPipeline, then FluxFillPipeline",
    "OmniGenPipeline": "its model reads the token ids of a Llama tokenizer",
    "ZImageOmniPipeline": "it needs a SigLIP encoder, and a denoiser made for its states",
    "Kandinsky6SRPipeline": "it sharpens tiles of a given video, and takes no prompt",
    "FluxPriorReduxPipeline": "it makes text states, and does not denoise",
}
