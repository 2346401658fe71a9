"""ERTACache for Open-Sora 1.2: text to video. `sh run.sh` runs it; README.md explains the flags.

Shapes: B videos of F frames, latents [B, C, F', H', W'] with H' = ⌊H/8⌋, W' = ⌊W/8⌋ and F' = 5 for 17 frames; the
paper's 480 × 854 and 51 frames: C = 4, F' = 15, H' = 60, W' = 106.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ertacache.algorithm import euler_step, rectify
from ertacache.demos import moving_scenes
from ertacache.numerics.jump import follow

FOLDER = Path(__file__).resolve().parent
grammar = moving_scenes  # what the demo draws
SCHEDULERS = ("RFlowScheduler",)


@torch.no_grad()
def denoise(pipe, inputs, plan=None, on_step=None):
    """Algorithm 1. x: latents; v: guided velocity, data − noise; t: time, 1000 = noise … 0 = data; i counts up.

    plan=None is OpenSoraPipeline's own loop, bit for bit. on_step(i, x, v) sees each step; a velocity that it returns
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
            x = euler_step(x, -v, s[i], s[i + 1])  # x_{i+1} = x_i + (s_i − s_{i+1}) v_i: v points to the data (Eq. 4)
    return x


def velocity(pipe, inputs, x, t):
    """Call the model once, with the batch [cond; null]: x [B, C, F', H', W'], t a scalar time → v of the same shape."""
    with pipe.transformer.cache_context(inputs.branches):
        v = pipe.transformer(*inputs.batch(x, t), **inputs.conditioning, return_dict=False)[0]
    return inputs.guided(v)


def first_order(pipe, inputs, i, k):
    """Return (a, w) of the first-order jump x_k = a x_i + w v_i by Euler, which budget plans improve on."""
    return 1.0, (inputs.sigmas[i] - inputs.sigmas[k]).item()


def open_site(pipe, inputs, site):
    """Return the site where the residual is cached: `output` (Eq. 5) or `blocks`, around the block stack."""
    from ertacache.numerics.cache_sites import BlocksSite, OutputSite
    from ertacache.utils.errors import UserError

    if site == "output":
        return OutputSite()
    model, c = pipe.transformer, inputs.conditioning
    if model.scale_shift_table.is_meta:
        raise UserError("--offload sequential takes the model apart, --site blocks needs it whole: use --offload model")

    def around(x, t, add):
        z, times = inputs.batch(x, t)
        hidden = add(inputs.branches, model.patch_embed(z, c["height"], c["width"]))  # [2B, F', S, D]
        condition = model.condition(times, c["encoder_hidden_states"], c["encoder_attention_mask"], c["fps"])
        return inputs.guided(model.head(hidden, condition, x.shape[2:]))

    return BlocksSite(
        model, embed=model.patch_embed, head=model.norm_out, around=around, branch_of=lambda kwargs: inputs.branches
    )


@dataclass(frozen=True)
class Inputs:
    """Inputs of `denoise`. sigmas: float32 [T+1], falling to 0. times: the model's time at each step, [T].

    conditioning: the model's other arguments, with texts [cond; null].
    """

    latents: torch.Tensor
    sigmas: torch.Tensor
    times: torch.Tensor
    conditioning: dict[str, Any]
    guidance: float
    frames: int

    @property
    def branches(self):
        """Name of the cache context: which guidance branches a model call computes."""
        return "cond_uncond" if self.guidance > 1 else "cond"

    def batch(self, x, t):
        """Return latents and times of one model call: once without guidance, else once per branch."""
        x = torch.cat([x, x]) if self.guidance > 1 else x
        return x, t.expand(len(x))

    def guided(self, v):
        """Apply classifier-free guidance, v_null + g (v_cond − v_null), to the velocity half of the output channels."""
        v = v[:, : self.latents.shape[1]]
        if self.guidance <= 1:
            return v
        cond, null = v.chunk(2)
        return null + self.guidance * (cond - null)

    def on(self, sigmas):
        """Return the same inputs on another grid; times are sigmas × 1000."""
        times = (sigmas[:-1] * 1000).to(self.times.device)
        return self if torch.equal(sigmas, self.sigmas) else replace(self, sigmas=sigmas, times=times)


def settings_of(pipe, steps=30, guidance=7.0, height=None, width=None, frames=None, aesthetic_score=6.5):
    """Return checked settings; sizes default to the pipeline's (Open-Sora 1.2: 480 × 854, 51 frames)."""
    from ertacache.demos.model_folder import check_loop_scheduler, check_number, check_steps
    from ertacache.utils.errors import UserError

    check_loop_scheduler(pipe, SCHEDULERS)
    sizes = {"height": height, "width": width, "frames": frames}
    sizes = {name: pipe.config[f"sample_{name}"] if value is None else value for name, value in sizes.items()}
    check_steps(steps)
    check_number("guidance", guidance, minimum=0)
    for name in ("height", "width"):
        check_number(name, sizes[name], minimum=pipe.vae.spatial_factor)
    if sizes["frames"] != 1 and sizes["frames"] < 17:
        raise UserError(f"--frames {sizes['frames']}: give 1 for an image, or at least 17 (published: 51)")
    return {"steps": steps, "guidance": guidance, **sizes, "aesthetic_score": aesthetic_score}


@torch.no_grad()
def prepare(pipe, prompts, seeds, **settings):
    """Return text states, initial noise and grid, as in OpenSoraPipeline. The noise of a seed does not depend on B."""
    settings = settings_of(pipe, **settings)
    device, guidance = pipe._execution_device, float(settings["guidance"])
    size = [settings[name] for name in ("frames", "height", "width")]
    text, mask = pipe.encode_prompt(list(prompts), settings["aesthetic_score"], device=device)
    conditioning = pipe.conditioning(text, mask, *size, guided=guidance > 1)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = pipe.prepare_latents(len(prompts), *size, device, generators)
    pipe.set_timesteps(settings["steps"], *size, device)
    sigmas, times = pipe.scheduler.sigmas.clone(), pipe.scheduler.timesteps.clone()
    return Inputs(latents, sigmas, times, conditioning, guidance, size[0])


@torch.no_grad()
def decode(pipe, latents, inputs):
    """Decode latents [B, C, F', H', W'] → float32 videos in [0, 1], [B, F, H, W, 3]."""
    return pipe.decode_latents(latents, inputs.frames)


def load(model="demo", device="cpu", dtype=torch.float32, offload="none"):
    """Load a pipeline: "demo", a directory in diffusers' format, or the weights that Open-Sora published."""
    from ertacache.pipelines.load import load_pipeline
    from opensora12 import OpenSoraPipeline
    from opensora12.convert import load_published

    path = FOLDER / "demo" if model == "demo" else Path(model).expanduser()
    published = load_published if not (path / "model_index.json").is_file() else None
    return load_pipeline(OpenSoraPipeline, path if path.is_dir() else model, device, dtype, offload, published)


def main():
    import sys

    from ertacache.cli import folder_command

    folder_command.main(sys.modules[__name__])


if __name__ == "__main__":
    from ertacache.utils.errors import run_program

    run_program(main)
