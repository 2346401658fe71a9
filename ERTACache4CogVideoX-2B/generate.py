"""ERTACache for CogVideoX: text to video. `sh run.sh` runs it; README.md explains the flags.

Shapes: B videos, latents [B, F', C, H', W'] with F' = (F − 1)/4 + 1, H' = H/8, W' = W/8; CogVideoX-2B at 720 × 480 and
49 frames: F' = 13, C = 16, H' = 60, W' = 90.

The model predicts v = dx/dθ, where θ is the angle of x = cos θ · data + sin θ · noise, and DDIM turns x by the angle
between two steps: x' = cos(Δθ) x + sin(Δθ) v, that is x' = a x + b v with a ≠ 1. The cached residual is v − x (Eq. 5);
the Δ that φ scales (Eq. 13–14) is Δθ. So `sigmas` here are θ / (π/2), 1 = noise … 0 = data.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ertacache.algorithm import rectify
from ertacache.demos import moving_scenes
from ertacache.numerics.jump import follow
from ertacache.numerics.schedulers import AngleGrid, turn
from ertacache.numerics.steps import ddim_step, dpm_step, predicted_data

FOLDER = Path(__file__).resolve().parent
grammar = moving_scenes  # what the demo draws
SCHEDULERS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")


@torch.no_grad()
def denoise(pipe, inputs, plan=None, on_step=None):
    """Algorithm 1. x: latents; v: guided v-prediction; t: timestep, 999 = noise … 0; i counts up.

    plan=None is CogVideoXPipeline's own loop, bit for bit. on_step(i, x, v) sees each step; a velocity that it
    returns is used in place of v (this is how calibration watches and steers the same loop).
    """
    if plan is not None:
        inputs = inputs.on(plan.grid(inputs.sigmas))  # s_0 … s_T, with φ (Eq. 13–14)
    if plan is not None and plan.kind == "budget":
        return follow(lambda x, t: velocity(pipe, inputs, x, t), inputs, plan, on_step)
    x, step = inputs.latents, solver_on(pipe, inputs)  # x_0 ~ N(0, I)
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
            x = step(i, x, v).to(x.dtype)  # x_{i+1} = a x_i + b v_i by DDIM (Eq. 4), or DPM
    return x


def velocity(pipe, inputs, x, t):
    """Call the model once for both guidance branches: x [B, F', C, H', W'], t a scalar time → v float32, same shape."""
    both = twice(inputs, x)
    with pipe.transformer.cache_context("cond_uncond"):
        v = pipe.transformer(
            hidden_states=both,
            encoder_hidden_states=inputs.embeddings,
            timestep=t.expand(both.shape[0]),
            image_rotary_emb=inputs.rotary,
            return_dict=False,
        )[0]
    return guided(inputs, v.float())


def twice(inputs, x):
    """Return x for the unconditional and the conditional branch, [2B, …]; without guidance (g ≤ 1) x itself."""
    return torch.cat([x, x]) if inputs.guidance > 1 else x


def guided(inputs, v):
    """Apply classifier-free guidance, v_u + g (v_c − v_u), to both branches [2B, …]."""
    if inputs.guidance <= 1:
        return v
    uncond, cond = v.chunk(2)
    return uncond + inputs.guidance * (cond - uncond)


def solver_on(pipe, inputs):
    """Return the scheduler's step on the grid of the inputs: step(i, x, v) → x_{i+1}, float32."""
    if type(pipe.scheduler).__name__ == "CogVideoXDDIMScheduler":
        return lambda i, x, v: ddim_step(x, v, *inputs.grid.alphas[i])

    from diffusers.utils.torch_utils import randn_tensor

    generators, history = [torch.Generator() for _ in inputs.noise_states], []
    for generator, state in zip(generators, inputs.noise_states, strict=True):
        generator.set_state(state)

    def step(i, x, v):
        alpha, alpha_next = inputs.grid.alphas[i]
        data = predicted_data(x, v, alpha)
        first_order = not history or (inputs.grid.ends_at_data and i == len(inputs.times) - 1)
        for _ in range(1 if first_order else 2):  # diffusers draws twice in a second-order step, and uses the second
            noise = randn_tensor(x.shape, generators, x.device, x.dtype)
        new = dpm_step(x, data, None if first_order else history[-1], alpha, alpha_next, noise)
        history[:] = [(data, alpha)]
        return new

    return step


def first_order(pipe, inputs, i, k):
    """Return (a, w) of the first-order jump x_k = a x_i + w v_i by DDIM, which budget plans improve on."""
    if type(pipe.scheduler).__name__ != "CogVideoXDDIMScheduler":
        from ertacache.utils.errors import UserError

        raise UserError("the DPM scheduler draws noise in each step, a budget plan cannot: use --threshold, or DDIM")
    return turn(inputs.sigmas[i], inputs.sigmas[k])


def open_site(pipe, inputs, site):
    """Return the site where the residual is cached: `output` (Eq. 5) or `blocks`, around the block stack."""
    from ertacache.numerics.cache_sites import BlocksSite, OutputSite

    if site == "output":
        return OutputSite()
    model, text = pipe.transformer, inputs.embeddings

    def around(x, t, add):
        both = twice(inputs, x)
        hidden = add("cond_uncond", model.patch_embed(text, both))  # [2B, L, D]
        time = model.time_proj(t.expand(both.shape[0])).to(both.dtype)
        hidden = model.norm_out(model.norm_final(hidden), temb=model.time_embedding(time))
        return guided(inputs, unpatchify(model.proj_out(hidden), both.shape, model.config.patch_size).float())

    return BlocksSite(
        model,
        embed=model.patch_embed,
        head=model.norm_final,
        around=around,
        tokens=lambda embedded: embedded[:, text.shape[1] :],  # text tokens come first and have no output
        branch_of=lambda kwargs: "cond_uncond",
    )


def unpatchify(tokens, shape, p):
    """Convert tokens [B, L, C·p·p] to latents of this shape, [B, F', C, H', W']."""
    from einops import rearrange

    _, f, _, h, w = shape
    return rearrange(tokens, "B (f h w) (C a b) -> B f C (h a) (w b)", f=f, h=h // p, w=w // p, a=p, b=p)


@dataclass(frozen=True)
class Inputs:
    """Inputs of `denoise`.

    grid: noise levels, times and ᾱ of the steps. embeddings: text [2B, L, D], the unconditional half first; [B, L, D]
    without guidance.
    """

    latents: torch.Tensor
    grid: AngleGrid
    embeddings: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor] | None
    noise_states: list[torch.Tensor]
    guidance: float

    @property
    def sigmas(self):
        """Angles θ / (π/2), float32 [T+1], falling to 0."""
        return self.grid.sigmas

    @property
    def times(self):
        """The model's time at each step, [T]."""
        return self.grid.times

    def on(self, sigmas):
        """Return the same inputs on another grid of angles."""
        return replace(self, grid=self.grid.on(sigmas))


def settings_of(pipe, steps=50, guidance=6.0, height=None, width=None, frames=None, negative_prompt=""):
    """Return checked settings; sizes default to those that the model was trained at."""
    from ertacache.demos.model_folder import check_frames, check_loop_scheduler, check_number, check_size, check_steps
    from ertacache.utils.errors import UserError

    check_loop_scheduler(pipe, SCHEDULERS)
    if pipe.scheduler.config.prediction_type != "v_prediction":
        raise UserError(f"the scheduler's prediction_type is {pipe.scheduler.config.prediction_type}: not v_prediction")
    config, factor = pipe.transformer.config, pipe.vae_scale_factor_spatial
    sizes = {
        "height": config.sample_height * factor if height is None else height,
        "width": config.sample_width * factor if width is None else width,
        "frames": config.sample_frames if frames is None else frames,
    }
    check_steps(steps)
    check_number("guidance", guidance, minimum=0)
    for name in ("height", "width"):
        check_size(name, sizes[name], multiple=max(8, factor * config.patch_size))
    # The VAE decodes latent frames in pairs after the first one, and returns a wrong frame count for any other number.
    check_frames(sizes["frames"], multiple=pipe.vae_scale_factor_temporal * pipe.vae.num_latent_frames_batch_size)
    return {"steps": steps, "guidance": guidance, **sizes, "negative_prompt": negative_prompt}


@torch.no_grad()
def prepare(pipe, prompts, seeds, **settings):
    """Return embeddings, initial noise and grid, as in CogVideoXPipeline. The noise of a seed does not depend on B."""
    settings = settings_of(pipe, **settings)
    device, guidance, config = pipe._execution_device, float(settings["guidance"]), pipe.transformer.config
    cond, uncond = pipe.encode_prompt(
        list(prompts),
        negative_prompt=settings["negative_prompt"],
        do_classifier_free_guidance=guidance > 1,
        max_sequence_length=config.max_text_seq_length,
        device=device,
    )
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sizes = [settings[name] for name in ("frames", "height", "width")]
    latents = pipe.prepare_latents(len(prompts), config.in_channels, *sizes, cond.dtype, device, generators)
    rotary = None
    if config.use_rotary_positional_embeddings:
        rotary = pipe._prepare_rotary_positional_embeddings(*sizes[1:], latents.shape[1], device)
    pipe.scheduler.set_timesteps(settings["steps"], device=device)
    embeddings = torch.cat([uncond, cond]) if guidance > 1 else cond
    states = [generator.get_state() for generator in generators]
    return Inputs(latents, AngleGrid.of(pipe.scheduler), embeddings, rotary, states, guidance)


@torch.no_grad()
def decode(pipe, latents, inputs):
    """Decode latents [B, F', C, H', W'] → float32 videos in [0, 1], [B, F, H, W, 3]."""
    return pipe.video_processor.postprocess_video(pipe.decode_latents(latents), output_type="np")


def load(model="demo", device="cpu", dtype=torch.float32, offload="none"):
    """Load a pipeline: "demo", a local directory in diffusers' format, or a hub id OWNER/NAME."""
    from diffusers import CogVideoXPipeline

    from ertacache.pipelines.load import load_pipeline
    from ertacache.utils.errors import UserError

    pipe = load_pipeline(CogVideoXPipeline, FOLDER / "demo" if model == "demo" else model, device, dtype, offload)
    if pipe.transformer.config.patch_size_t is not None:
        raise UserError(f"--model {model} is a CogVideoX 1.5: this folder runs CogVideoX-2B and -5B")
    return pipe


def main():
    import sys

    from ertacache.cli import folder_command

    folder_command.main(sys.modules[__name__])


if __name__ == "__main__":
    from ertacache.utils.errors import run_program

    run_program(main)
