"""ERTACache for FLUX.1: text to image. `sh run.sh` runs it; README.md explains the flags.

Shapes: B images, L = (H/16)(W/16) latent tokens, C channels per token; FLUX.1-dev at 1024²: L = 4096, C = 64.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ertacache.algorithm import euler_step, rectify
from ertacache.demos import emoji
from ertacache.numerics.jump import follow

FOLDER = Path(__file__).resolve().parent
grammar = emoji  # what the demo draws
SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)


@torch.no_grad()
def denoise(pipe, inputs, plan=None, on_step=None):
    """Algorithm 1. x: latents [B, L, C]; v: velocity, noise − data; s: sigma, 1 = noise … 0 = data; i counts up.

    plan=None is FluxPipeline's own loop, bit for bit. on_step(i, x, v) sees each step; a velocity that it returns
    is used in place of v (this is how calibration watches and steers the same loop).
    """
    if plan is not None:
        inputs = inputs.on(plan.grid(inputs.sigmas))  # s_0 … s_T, with φ (Eq. 13–14)
    if plan is not None and plan.kind == "budget":
        return follow(lambda x, t: velocity(pipe, inputs, x, t), inputs, plan, on_step)
    x, s = inputs.latents, inputs.sigmas  # x_0 ~ N(0, I)
    with open_site(pipe, inputs, plan.site if plan else "output") as site:
        for i, t in enumerate(inputs.times):
            if plan is None or i not in plan.cached:  # i ∉ S
                v = velocity(pipe, inputs, x, t)  # v_i = v_θ(x_i, s_i)
                r = site.residual(x, v) if plan else None  # r̃ = v_i − x_i (Eq. 5)
            else:
                v = site.reuse(x, t, r)  # ṽ_i = x_i + r̃ (Eq. 6)
                if plan.rectified:
                    v = rectify(v, plan.k[i], plan.b[i])  # ṽ_i − σ(K_i ṽ_i + B_i) (Eq. 15)
            if on_step is not None:
                steered = on_step(i, x, v)
                v = v if steered is None else steered
            x = euler_step(x, v, s[i], s[i + 1])  # x_{i+1} = x_i + Δ_i v_i (Eq. 4)
    return x


def velocity(pipe, inputs, x, t):
    """Call the model once: x [B, L, C], t a scalar time → v [B, L, C]. Guidance is an input of this distilled model."""
    with pipe.transformer.cache_context("cond"):
        return pipe.transformer(x, timestep=one_each(x, t) / 1000, **inputs.conditioning, return_dict=False)[0]


def one_each(x, t):
    """Return the time 1000 … 0 per image, [B], rounded to the model's dtype as in FluxPipeline."""
    return t.expand(x.shape[0]).to(x.dtype)


def first_order(pipe, inputs, i, k):
    """Return (a, w) of the first-order jump x_k = a x_i + w v_i by Euler, which budget plans improve on."""
    return 1.0, (inputs.sigmas[k] - inputs.sigmas[i]).item()


def open_site(pipe, inputs, site):
    """Return the site where the residual is cached: `output` (Eq. 5) or `blocks`, around the block stack."""
    from ertacache.numerics.cache_sites import BlocksSite, OutputSite

    if site == "output":
        return OutputSite()
    model, c = pipe.transformer, inputs.conditioning

    def around(x, t, add):
        hidden = add("cond", model.x_embedder(x))  # [B, L, D]
        guidance = () if c["guidance"] is None else (c["guidance"].to(x.dtype) * 1000,)
        temb = model.time_text_embed(one_each(x, t) / 1000 * 1000, *guidance, c["pooled_projections"])
        return model.proj_out(model.norm_out(hidden, temb))

    return BlocksSite(model, embed=model.x_embedder, head=model.norm_out, around=around)


@dataclass(frozen=True)
class Inputs:
    """Inputs of `denoise`. sigmas: float32 [T+1], falling to 0. conditioning: the model's other arguments."""

    latents: torch.Tensor
    sigmas: torch.Tensor
    conditioning: dict[str, Any]
    height: int
    width: int

    @property
    def times(self):
        """The model's time at each step, [T]."""
        return self.sigmas[:-1] * 1000

    def on(self, sigmas):
        """Return the same inputs on another grid."""
        return replace(self, sigmas=sigmas)


def settings_of(pipe, steps=30, guidance=3.5, height=None, width=None):
    """Return checked settings; sizes default to those that the model was trained at."""
    from ertacache.demos.model_folder import check_loop_scheduler, check_number, check_size, check_steps

    check_loop_scheduler(pipe, SCHEDULERS)
    sizes = {
        name: pipe.vae.config.sample_size if n is None else n for name, n in (("height", height), ("width", width))
    }
    check_steps(steps)
    check_number("guidance", guidance, minimum=0)
    for name, value in sizes.items():
        check_size(name, value, multiple=2 * pipe.vae_scale_factor)  # the VAE's factor times FLUX's 2 × 2 packing
    return {"steps": steps, "guidance": guidance, **sizes}


@torch.no_grad()
def prepare(pipe, prompts, seeds, *, steps=30, guidance=3.5, height=None, width=None):
    """Return embeddings, initial noise and grid, as in FluxPipeline. The noise of a seed does not depend on B."""
    import numpy as np
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    steps, guidance, height, width = settings_of(pipe, steps, guidance, height, width).values()
    device, length = pipe._execution_device, min(512, pipe.tokenizer_2.model_max_length)
    embeds, pooled, text_ids = pipe.encode_prompt(list(prompts), None, device=device, max_sequence_length=length)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    channels = pipe.transformer.config.in_channels // 4
    latents, image_ids = pipe.prepare_latents(
        len(prompts), channels, height, width, embeds.dtype, device, generators
    )  # [B, L, C]
    config = pipe.scheduler.config
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(latents.shape[1], *(config[name] for name in names))
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device, mu=mu)
    scale = torch.full([1], guidance, device=device, dtype=torch.float32).expand(len(prompts))
    conditioning = {
        "guidance": scale if pipe.transformer.config.guidance_embeds else None,
        "pooled_projections": pooled,
        "encoder_hidden_states": embeds,
        "txt_ids": text_ids,
        "img_ids": image_ids,
    }
    return Inputs(latents, pipe.scheduler.sigmas.clone(), conditioning, height, width)


@torch.no_grad()
def decode(pipe, latents, inputs):
    """Decode latents [B, L, C] → float32 images in [0, 1], [B, H, W, 3]."""
    z = pipe._unpack_latents(latents, inputs.height, inputs.width, pipe.vae_scale_factor)
    z = z / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return pipe.image_processor.postprocess(pipe.vae.decode(z, return_dict=False)[0], output_type="np")


def load(model="demo", device="cpu", dtype=torch.float32, offload="none"):
    """Load a pipeline: "demo", a local directory in diffusers' format, or a hub id OWNER/NAME."""
    from diffusers import FluxPipeline

    from ertacache.pipelines.load import load_pipeline

    pipe = load_pipeline(FluxPipeline, FOLDER / "demo" if model == "demo" else model, device, dtype, offload)
    # FluxPipeline's own default is 128 latents a side for every model, 1024 × 1024 even for the demo.
    pipe.default_sample_size = pipe.vae.config.sample_size // pipe.vae_scale_factor
    return pipe


def main():
    import sys

    from ertacache.cli import folder_command

    folder_command.main(sys.modules[__name__])


if __name__ == "__main__":
    from ertacache.utils.errors import run_program

    run_program(main)
