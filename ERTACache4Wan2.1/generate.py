"""ERTACache for Wan2.1: text to video. `sh run.sh` runs it; README.md explains the flags.

Shapes: B videos, latents [B, C, F', H', W'] with F' = (F − 1)/4 + 1, H' = H/8, W' = W/8; Wan2.1-1.3B at 832 × 480 and
81 frames: C = 16, F' = 21, H' = 60, W' = 104.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ertacache.algorithm import rectify
from ertacache.demos import moving_scenes
from ertacache.numerics.jump import follow

FOLDER = Path(__file__).resolve().parent
grammar = moving_scenes  # what the demo draws
SCHEDULERS = ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler")


@torch.no_grad()
def denoise(pipe, inputs, plan=None, on_step=None):
    """Algorithm 1. x: latents; v: guided velocity, noise − data; t: time, 1000 = noise … 0 = data; i counts up.

    plan=None is WanPipeline's own loop, bit for bit. on_step(i, x, v) sees each step; a velocity that it returns is
    used in place of v (this is how calibration watches and steers the same loop). The solver is given ṽ on cached
    steps, as it would be given v: a multistep solver keeps both in its history.
    """
    if plan is not None:
        inputs = inputs.on(plan.grid(inputs.sigmas))  # s_0 … s_T, with φ (Eq. 13–14)
    if plan is not None and plan.kind == "budget":
        return follow(lambda x, t: velocity(pipe, inputs, x, t), inputs, plan, on_step)
    x, solver = inputs.latents, solver_on(pipe, inputs)  # x_0 ~ N(0, I)
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
            x = solver.step(v, t, x, return_dict=False)[0]  # x_{i+1}, by UniPC or Euler (Eq. 4)
    return x


def velocity(pipe, inputs, x, t):
    """Call the model once per guidance branch: x [B, C, F', H', W'], t a scalar time → v of the same shape."""

    def branch(name):
        with pipe.transformer.cache_context(name):
            return pipe.transformer(
                hidden_states=x.to(pipe.transformer.dtype),
                timestep=t.expand(x.shape[0]),
                encoder_hidden_states=inputs.embeddings[name],
                return_dict=False,
            )[0]

    return guided(inputs.guidance, branch)


def guided(guidance, branch):
    """Apply classifier-free guidance, v_u + g (v_c − v_u); for g ≤ 1 return v_c alone."""
    cond = branch("cond")
    if guidance <= 1:
        return cond
    uncond = branch("uncond")
    return uncond + guidance * (cond - uncond)


def solver_on(pipe, inputs):
    """Return a new scheduler on the grid of the inputs; new, because it keeps the history of its run."""
    solver = type(pipe.scheduler).from_config(pipe.scheduler.config)
    solver.set_timesteps(len(inputs.times), device=inputs.times.device)
    solver.sigmas, solver.timesteps = inputs.sigmas, inputs.times
    solver.set_begin_index(0)
    return solver


def first_order(pipe, inputs, i, k):
    """Return (a, w) of the first-order jump x_k = a x_i + w v_i by Euler, which budget plans improve on."""
    return 1.0, (inputs.sigmas[k] - inputs.sigmas[i]).item()


def open_site(pipe, inputs, site):
    """Return the site where the residual is cached: `output` (Eq. 5) or `blocks`, around the block stack."""
    from ertacache.numerics.cache_sites import BlocksSite, OutputSite
    from ertacache.utils.errors import UserError

    if site == "output":
        return OutputSite()
    model = pipe.transformer
    if model.scale_shift_table.is_meta:
        raise UserError("--offload sequential takes the model apart, --site blocks needs it whole: use --offload model")

    def around(x, t, add):
        embedded = model.patch_embedding(x.to(model.dtype))  # [B, D, F', h, w]
        time, *_ = model.condition_embedder(t.expand(x.shape[0]), inputs.embeddings["cond"], None)
        shift, scale = (model.scale_shift_table + time.unsqueeze(1)).chunk(2, dim=1)  # [B, 1, D] each

        def branch(name):
            hidden = add(name, embedded)  # [B, L, D]
            hidden = (model.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)
            return unpatchify(model.proj_out(hidden), embedded.shape, model.config.patch_size)

        return guided(inputs.guidance, branch)

    names = {id(embeddings): name for name, embeddings in inputs.embeddings.items()}
    return BlocksSite(
        model,
        embed=model.patch_embedding,
        head=model.norm_out,
        around=around,
        tokens=lambda embedded: embedded.flatten(2).transpose(1, 2),
        branch_of=lambda kwargs: names[id(kwargs["encoder_hidden_states"])],
    )


def unpatchify(tokens, embedded_shape, patch_size):
    """Convert tokens [B, L, p_t·p_h·p_w·C] of an embedding [B, D, f, h, w] → [B, C, f·p_t, h·p_h, w·p_w]."""
    from einops import rearrange

    (_, _, f, h, w), (a, b, c) = embedded_shape, patch_size
    layout = "B (f h w) (a b c C) -> B C (f a) (h b) (w c)"
    return rearrange(tokens, layout, f=f, h=h, w=w, a=a, b=b, c=c)


@dataclass(frozen=True)
class Inputs:
    """Inputs of `denoise`. sigmas: float32 [T+1], falling to 0. times: the model's time at each step, [T].

    embeddings: text embeddings [B, L, D] by name of the guidance branch.
    """

    latents: torch.Tensor
    sigmas: torch.Tensor
    times: torch.Tensor
    embeddings: dict[str, torch.Tensor]
    guidance: float

    def on(self, sigmas):
        """Return the same inputs on another grid; times are sigmas × 1000 (UniPC truncates its own to integers).

        UniPC keeps sigmas on the CPU and times on the model's device.
        """
        times = (sigmas[:-1] * 1000).to(self.times.device)
        return self if torch.equal(sigmas, self.sigmas) else replace(self, sigmas=sigmas, times=times)


def settings_of(pipe, steps=50, guidance=5.0, height=None, width=None, frames=None, negative_prompt=None):
    """Return checked settings; sizes default to those of the demo or of the paper (832 × 480, 81 frames)."""
    from ertacache.demos.model_folder import check_frames, check_loop_scheduler, check_number, check_size, check_steps

    check_loop_scheduler(pipe, SCHEDULERS)
    demo = str(pipe.name_or_path) == str(FOLDER / "demo")
    sizes = {"height": (height, 64, 480), "width": (width, 64, 832), "frames": (frames, 17, 81)}
    sizes = {n: (small if demo else paper) if value is None else value for n, (value, small, paper) in sizes.items()}
    check_steps(steps)
    check_number("guidance", guidance, minimum=0)
    _, ph, pw = pipe.transformer.config.patch_size
    for name, patch in (("height", ph), ("width", pw)):
        check_size(name, sizes[name], multiple=max(16, pipe.vae_scale_factor_spatial * patch))
    check_frames(sizes["frames"], multiple=pipe.vae_scale_factor_temporal)
    if negative_prompt is None:
        negative_prompt = "" if demo else (FOLDER / "prompts" / "negative.txt").read_text("utf-8").strip()
    return {"steps": steps, "guidance": guidance, **sizes, "negative_prompt": negative_prompt}


@torch.no_grad()
def prepare(pipe, prompts, seeds, **settings):
    """Return embeddings, initial noise and grid, as in WanPipeline. The noise of a seed does not depend on B."""
    settings = settings_of(pipe, **settings)
    device, guidance = pipe._execution_device, float(settings["guidance"])
    cond, uncond = pipe.encode_prompt(
        list(prompts),
        negative_prompt=settings["negative_prompt"],
        do_classifier_free_guidance=guidance > 1,
        max_sequence_length=min(512, pipe.tokenizer.model_max_length),
        device=device,
    )
    embeddings = {"cond": cond} | ({"uncond": uncond} if guidance > 1 else {})
    embeddings = {name: e.to(pipe.transformer.dtype) for name, e in embeddings.items()}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sizes = [settings[name] for name in ("height", "width", "frames")]
    channels = pipe.transformer.config.in_channels
    latents = pipe.prepare_latents(len(prompts), channels, *sizes, torch.float32, device, generators)
    pipe.scheduler.set_timesteps(settings["steps"], device=device)
    return Inputs(latents, pipe.scheduler.sigmas.clone(), pipe.scheduler.timesteps.clone(), embeddings, guidance)


@torch.no_grad()
def decode(pipe, latents, inputs):
    """Decode latents [B, C, F', H', W'] → float32 videos in [0, 1], [B, F, H, W, 3]."""
    z, config = latents.to(pipe.vae.dtype), pipe.vae.config
    mean, std = (torch.tensor(c).view(1, -1, 1, 1, 1).to(z) for c in (config.latents_mean, config.latents_std))
    videos = pipe.vae.decode(z / (1 / std) + mean, return_dict=False)[0]
    return pipe.video_processor.postprocess_video(videos, output_type="np")


def load(model="demo", device="cpu", dtype=torch.float32, offload="none"):
    """Load a pipeline: "demo", a local directory in diffusers' format, or a hub id OWNER/NAME."""
    from diffusers import WanPipeline

    from ertacache.pipelines.load import load_pipeline
    from ertacache.utils.errors import UserError

    pipe = load_pipeline(WanPipeline, FOLDER / "demo" if model == "demo" else model, device, dtype, offload)
    if pipe.transformer_2 is not None or pipe.config.expand_timesteps:
        raise UserError(f"--model {model} is a Wan2.2: this folder runs Wan2.1, with one transformer and one time")
    return pipe


def main():
    import sys

    from ertacache.cli import folder_command

    folder_command.main(sys.modules[__name__])


if __name__ == "__main__":
    from ertacache.utils.errors import run_program

    run_program(main)
