"""Small random models, each as a pipeline of diffusers and as a file for ComfyUI.

Nothing has a text encoder or a VAE: prompts have random embeddings, and results are latents.
"""

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import safetensors.torch
import torch

SIDE, FRAMES, TOKENS = 8, 3, 8  # height and width of the latents, frames of a video's, tokens of the prompt
FLOW = "FlowMatchEulerDiscreteScheduler"
WAN_NAMES = {  # patterns of diffusers' names, and what ComfyUI has for them
    r"condition_embedder\.(time|text)_embedder\.linear_1": r"\1_embedding.0",
    r"condition_embedder\.(time|text)_embedder\.linear_2": r"\1_embedding.2",
    r"condition_embedder\.time_proj": "time_projection.1",
    r"\.attn1\.": ".self_attn.",
    r"\.attn2\.": ".cross_attn.",
    r"\.to_out\.0\.": ".o.",
    r"\.to_([qkv])\.": r".\1.",
    r"ffn\.net\.0\.proj": "ffn.0",
    r"ffn\.net\.2": "ffn.2",
    r"\.norm2\.": ".norm3.",
    r"^scale_shift_table": "head.modulation",
    r"\.scale_shift_table": ".modulation",
    r"^proj_out": "head.head",
}


def import_comfy(checkout: Path) -> None:
    """Make ComfyUI's package `comfy` importable, on the CPU."""
    sys.path.append(str(checkout))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True


def from_mmdit(state: dict) -> dict:
    """Rename FLUX's or SD3's weights by ComfyUI's own map."""
    from comfy.model_detection import convert_diffusers_mmdit

    return convert_diffusers_mmdit(state, "")


def from_unet(state: dict) -> dict:
    """Rename SDXL's weights by ComfyUI's own map, for one transformer block in each place."""
    from comfy.utils import unet_to_diffusers

    config = {"num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth_middle": 1}
    config |= {"transformer_depth": [0, 0, 1, 1, 1, 1], "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1]}
    names = unet_to_diffusers(config)
    return {names[name]: tensor for name, tensor in state.items()}


def from_wan(state: dict) -> dict:
    """Rename Wan's weights."""

    def renamed(name: str) -> str:
        for pattern, other in WAN_NAMES.items():
            name = re.sub(pattern, other, name)
        return name

    return {renamed(name): tensor for name, tensor in state.items()}


def uncut(timesteps: torch.Tensor, scheduler: Any) -> torch.Tensor:
    """Return the times of the scheduler's noise levels next to timesteps that it cut to whole numbers."""
    times = scheduler.config.num_train_timesteps * scheduler.sigmas
    return times[(times - timesteps.reshape(-1, 1)).abs().argmin(1)].reshape(timesteps.shape)


@dataclass(frozen=True)
class Model:
    """A model at a small size.

    Attributes:
        title: Its name.
        denoiser: Class and config in diffusers.
        pipelines: Classes in diffusers, for text and, where there is one, for an image.
        scheduler: Class and config.
        convert: Makes ComfyUI's weights of diffusers'.
        latents: ComfyUI's class of their format, its node that makes empty ones, and their shape [C, (F,) H, W].
        text: Widths of the prompt's embeddings and of the pooled ones.
        encoded: What `encode_prompt` of the pipelines returns: names of `Small.embeddings`.
        call: Arguments of the pipelines beside steps and size.
        cfg: Guidance of ComfyUI's CFGGuider, 1 without an unconditional prediction; None: BasicGuider.
        asked: ComfyUI's timesteps from those of the pipeline and its scheduler, where one of the two rounds them.
    """

    title: str
    denoiser: tuple[str, dict[str, Any]]
    pipelines: tuple[str, ...]
    scheduler: tuple[str, dict[str, Any]]
    convert: Callable[[dict], dict]
    latents: tuple[str, str, tuple[int, ...]]
    text: tuple[int, int]
    encoded: tuple[str, ...]
    call: dict[str, Any] = field(default_factory=dict)
    cfg: float | None = None
    asked: Callable[[torch.Tensor, Any], torch.Tensor] | None = None

    @property
    def batch(self) -> int:
        """Batch of each model call in ComfyUI, which puts both predictions of a guided one in one call."""
        return 2 if (self.cfg or 1) > 1 else 1


IMAGE, GUIDED = (16, SIDE, SIDE), ("text", "no_text", "pooled", "no_pooled")
MODELS = {
    "flux": Model(
        "FLUX",
        (
            "FluxTransformer2DModel",
            {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "guidance_embeds": True},
        ),
        ("FluxPipeline", "FluxImg2ImgPipeline"),
        (FLOW, {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}),
        from_mmdit,
        ("Flux", "EmptySD3LatentImage", IMAGE),
        (4096, 768),
        ("text", "pooled", "ids"),
        {"guidance_scale": 3.5},
    ),
    "wan": Model(
        "Wan2.1",
        ("WanTransformer3DModel", {"num_layers": 2, "num_attention_heads": 1, "ffn_dim": 256}),
        ("WanPipeline",),
        (FLOW, {"shift": 5.0}),
        from_wan,
        ("Wan21", "EmptyHunyuanLatentVideo", (16, FRAMES, SIDE, SIDE)),
        (4096, 0),
        ("text", "no_text"),
        {"guidance_scale": 5.0, "num_frames": 4 * FRAMES - 3},
        cfg=5.0,
    ),
    "sd3": Model(
        "SD3",
        (
            "SD3Transformer2DModel",
            {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128, "pos_embed_max_size": 16},
        ),
        ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
        (FLOW, {"shift": 3.0}),
        from_mmdit,
        ("SD3", "EmptySD3LatentImage", IMAGE),
        (4096, 2048),
        GUIDED,
        {"guidance_scale": 7.0},
        cfg=7.0,
    ),
    "sdxl": Model(
        "SDXL",
        (
            "UNet2DConditionModel",
            {
                "block_out_channels": (64, 128, 256),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "attention_head_dim": (1, 2, 4),
                "use_linear_projection": True,
                "cross_attention_dim": 2048,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
        ),
        ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
        (
            "EulerDiscreteScheduler",
            {
                **{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
                **{"timestep_spacing": "leading", "steps_offset": 1},
            },
        ),
        from_unet,
        ("SDXL", "EmptyLatentImage", (4, SIDE, SIDE)),
        (2048, 1280),
        GUIDED,
        {"guidance_scale": 5.0},
        cfg=5.0,
    ),
    "qwen-image": Model(
        "Qwen-Image",
        ("QwenImageTransformer2DModel", {"num_layers": 2, "num_attention_heads": 2}),
        ("QwenImagePipeline", "QwenImageImg2ImgPipeline"),
        (
            FLOW,
            {
                **{"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02},
                **{"base_image_seq_len": 256, "max_image_seq_len": 8192},
            },
        ),
        dict,  # the names are the same
        ("Wan21", "EmptySD3LatentImage", (16, 1, SIDE, SIDE)),
        (3584, 0),
        ("text", "mask"),
        {"true_cfg_scale": 1.0},
        cfg=1.0,
    ),
}

MODELS["wan-unipc"] = replace(
    MODELS["wan"],
    title="Wan2.1 with UniPC",
    scheduler=(
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ),
    asked=uncut,
)
MODELS["sdxl-linspace"] = replace(
    MODELS["sdxl"],
    title="SDXL with timestep spacing linspace",
    scheduler=("EulerDiscreteScheduler", MODELS["sdxl"].scheduler[1] | {"timestep_spacing": "linspace"}),
    asked=lambda timesteps, scheduler: timesteps.round(),
)


class Small:
    """A model with weights, pipelines and latents.

    Args:
        name: Of `MODELS`.
        work: Of `comfyui_server.working_folder`; its weights are written there.
        checkout: ComfyUI's folder.

    Attributes:
        pipelines: As in `Model`, with a denoiser in common.
        file: Of the weights in ComfyUI's format, in the folder `diffusion_models`.
        millions: Of parameters.
        format: ComfyUI's latent format.
    """

    def __init__(self, name: str, work: Path, checkout: Path):
        import_comfy(checkout)
        import comfy.latent_formats

        self.name, self.work, self.model, self.file = name, work, MODELS[name], f"{name}.safetensors"
        kind, config = self.model.denoiser
        with torch.random.fork_rng():
            torch.manual_seed(0)
            denoiser = getattr(diffusers, kind)(**config).eval().requires_grad_(False)
        state = {key: tensor.clone() for key, tensor in denoiser.state_dict().items()}  # some maps write into it
        state = {key: tensor.contiguous() for key, tensor in self.model.convert(state).items()}
        safetensors.torch.save_file(state, work / "diffusion_models" / self.file)
        self.millions = sum(tensor.numel() for tensor in denoiser.parameters()) / 1e6
        self.pipelines = [self.pipeline(getattr(diffusers, kind), denoiser) for kind in self.model.pipelines]
        if self.model.asked:
            denoiser.register_forward_pre_hook(self.ask, with_kwargs=True)
        self.format = getattr(comfy.latent_formats, self.model.latents[0])()

    def ask(self, denoiser, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Give a pipeline's denoiser the timesteps of ComfyUI: for a UNet the second argument, else by name."""
        scheduler = self.pipelines[0].scheduler
        if "timestep" in kwargs:
            return args, kwargs | {"timestep": self.model.asked(kwargs["timestep"], scheduler)}
        return (args[0], self.model.asked(args[1], scheduler), *args[2:]), kwargs

    def pipeline(self, kind: type, denoiser: torch.nn.Module):
        """Return a pipeline whose prompts have random embeddings."""

        def encode_prompt(pipe, prompt, **_):
            return tuple(self.embeddings(prompt)[name] for name in self.model.encoded)

        changed = type(kind.__name__, (kind,), {"encode_prompt": encode_prompt, "check_inputs": lambda *_, **__: None})
        names = inspect.signature(kind.__init__).parameters
        parts = {name: None for name, one in names.items() if one.default is inspect.Parameter.empty and name != "self"}
        scheduler, config = self.model.scheduler
        parts |= {"unet" if "unet" in names else "transformer": denoiser}
        pipe = changed(**parts | {"scheduler": getattr(diffusers, scheduler)(**config)})
        pipe.vae = SimpleNamespace(config=SimpleNamespace(latent_channels=self.model.latents[2][0]))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def embeddings(self, prompt: str) -> dict[str, torch.Tensor | None]:
        """Return random embeddings of a prompt and of none, [1, TOKENS, width] and [1, pooled width]."""
        made = {"ids": torch.zeros(TOKENS, 3), "mask": None}
        width, pooled = self.model.text
        for prefix, text in (("", prompt), ("no_", "")):
            generator = torch.Generator().manual_seed(sum(text.encode()))
            made[f"{prefix}text"] = torch.randn(1, TOKENS, width, generator=generator)
            made[f"{prefix}pooled"] = torch.randn(1, pooled, generator=generator)
        return made

    def noise(self, seed: int) -> torch.Tensor:
        """Return the noise that ComfyUI makes for a seed, [1, C, (F,) H, W]."""
        return torch.randn(1, *self.model.latents[2], generator=torch.manual_seed(seed))

    def save_latents(self, latents: torch.Tensor, path: Path) -> None:
        """Write latents as the model has them to a file for ComfyUI's LoadLatent."""
        stored = {"latent_tensor": self.format.process_out(latents), "latent_format_version_0": torch.tensor([])}
        safetensors.torch.save_file(stored, path)

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipelines for the size, and their own."""
        return {"height": 8 * SIDE, "width": 8 * SIDE, **self.model.call}

    def run(self, pipe, seed: int, **options) -> torch.Tensor:
        """Return the result of a pipeline for the prompt "a lighthouse", as the model has it, [1, C, (F,) H, W]."""
        options |= {"generator": torch.manual_seed(seed), "output_type": "latent", "return_dict": False}
        made = pipe("a lighthouse", **options, **self.call)[0]
        return pipe._unpack_latents(made, 8 * SIDE, 8 * SIDE, 8) if hasattr(pipe, "_unpack_latents") else made
