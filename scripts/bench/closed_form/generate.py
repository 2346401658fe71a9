"""The closed-form problem as a model folder: moving scenes' first frames, denoised exactly.

    .venv/bin/python scripts/evaluate.py scripts/bench/closed_form --methods fewer-steps,budget --speedups 2,3,5
    .venv/bin/python scripts/evaluate.py scripts/bench/closed_form --model b=0.3,shift=1 --guidance 1 …

`--model` says how hard it is: b, the width of the Gaussian around each point (default 0.1), and shift, of the grid of
noise levels (default 3). `demo` is both defaults. Shapes: B images, C × H × W numbers each, 3 × 16 × 16.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ertacache import UserError
from ertacache.algorithm import euler_step, rectify
from ertacache.demos import closed_form
from ertacache.demos.closed_form import SIDE
from ertacache.numerics.cache_sites import OutputSite
from ertacache.numerics.jump import follow

FOLDER = Path(__file__).resolve().parent
grammar = closed_form  # what it draws
DEFAULTS = {"b": 0.1, "shift": 3.0}
ALL_DRAW_CAPTIONS = True  # whatever the hardness


class Pipeline:
    """What the library needs of a diffusers pipeline: a denoiser, a scheduler's config, a device."""

    def __init__(self, denoiser: closed_form.ClosedFormDenoiser, shift: float):
        self.transformer, self.scheduler = denoiser, Grid(shift)

    @property
    def _execution_device(self):
        return self.transformer.points.device


class Grid:
    """A shifted grid of noise levels, by the formula of diffusers' flow-matching schedulers."""

    def __init__(self, shift: float):
        self.config = {"shift": shift}

    def sigmas(self, steps: int) -> torch.Tensor:
        """Return sigmas from 1 to 0, [T+1]."""
        shift, s = self.config["shift"], torch.linspace(1, 0, steps + 1)
        return shift * s / (1 + (shift - 1) * s)


@torch.no_grad()
def denoise(pipe, inputs, plan=None, on_step=None):
    """Algorithm 1, as in the other model folders. x: latents [B, C, H, W]; v: noise − data; s: sigma, 1 … 0."""
    if plan is not None:
        inputs = inputs.on(plan.grid(inputs.sigmas))
    if plan is not None and plan.kind == "budget":
        return follow(lambda x, t: velocity(pipe, inputs, x, t), inputs, plan, on_step)
    x, s = inputs.latents, inputs.sigmas
    with open_site(pipe, inputs, plan.site if plan else "output") as site:
        for i, t in enumerate(inputs.times):
            if plan is None or i not in plan.cached:
                v = velocity(pipe, inputs, x, t)
                r = site.residual(x, v) if plan else None
            else:
                v = site.reuse(x, t, r)
                if plan.rectified:
                    v = rectify(v, plan.k[i], plan.b[i])
            if on_step is not None:
                steered = on_step(i, x, v)
                v = v if steered is None else steered
            x = euler_step(x, v, s[i], s[i + 1])
    return x


@torch.no_grad()
def velocity(pipe, inputs, x, t):
    """Return v [B, C, H, W] at latents x and noise level t."""
    return pipe.transformer(x.flatten(1), t, inputs.asked, inputs.guidance).view_as(x)


def first_order(pipe, inputs, i, k):
    """Return (a, w) of the first-order jump x_k = a x_i + w v_i by Euler."""
    return 1.0, (inputs.sigmas[k] - inputs.sigmas[i]).item()


def open_site(pipe, inputs, site):
    """Return the cache site; there are no blocks here."""
    if site != "output":
        raise UserError(f"--site {site}: the closed-form problem has no blocks, give output")
    return OutputSite()


@dataclass(frozen=True)
class Inputs:
    """Inputs of `denoise`. sigmas: float32 [T+1], falling to 0. asked: indices of the captions, [B]."""

    latents: torch.Tensor
    sigmas: torch.Tensor
    asked: torch.Tensor
    guidance: float

    @property
    def times(self):
        """The noise level at each step, [T]."""
        return self.sigmas[:-1]

    def on(self, sigmas):
        """Return the same inputs on another grid."""
        return replace(self, sigmas=sigmas)


def settings_of(pipe, steps=30, guidance=3.5):
    """Return checked settings."""
    from ertacache.demos.model_folder import check_number, check_steps

    check_steps(steps)
    check_number("guidance", guidance, minimum=0)
    return {"steps": steps, "guidance": guidance}


def prepare(pipe, prompts, seeds, *, steps=30, guidance=3.5):
    """Return the captions' indices, initial noise and grid."""
    known = list(closed_form.captions())
    unknown = [prompt for prompt in prompts if prompt not in known]
    if unknown:
        raise UserError(f"{unknown[0]!r} is no caption of the problem: give one like {known[0]!r} or {known[1]!r}")
    noise = [torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    device, dtype = pipe._execution_device, pipe.transformer.dtype
    asked = torch.tensor([known.index(prompt) for prompt in prompts], device=device)
    sigmas = pipe.scheduler.sigmas(steps).to(device)
    return Inputs(torch.stack(noise).to(device, dtype), sigmas, asked, guidance)


def decode(pipe, latents, inputs):
    """Return float32 images in [0, 1], [B, H, W, 3]: the latents are images in [−1, 1]."""
    return (latents.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def load(model="demo", device="cpu", dtype=torch.float32, offload="none"):
    """Return the problem as a pipeline. model: "demo", or a list like "b=0.3,shift=1"."""
    changes = {}
    for part in [] if model == "demo" else model.split(","):
        name, _, value = part.partition("=")
        try:
            changes[name] = float(value)
        except ValueError:
            changes[name] = -1.0
        if name not in DEFAULTS or changes[name] <= 0:
            raise UserError(f"--model {model}: give demo, or b and shift as numbers above 0: b=0.3,shift=1")
    values = DEFAULTS | changes
    return Pipeline(closed_form.denoiser_of_width(values["b"], dtype).to(device), values["shift"])
