"""A model small enough to solve on paper, dx/ds = A x, and its sampler with the functions of a model folder."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ertacache import UserError
from ertacache.algorithm import euler_step, rectify
from ertacache.numerics.cache_sites import OutputSite
from ertacache.numerics.jump import follow


class LinearModel(torch.nn.Module):
    """v = A x for latents [B, N, D]; counts its calls."""

    dtype = torch.float32

    def __init__(self, matrix):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.as_tensor(matrix, dtype=torch.float32), requires_grad=False)
        self.config = {"rows": len(matrix)}
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x @ self.matrix.T


class Scheduler:
    def __init__(self):
        self.config = {"shift": 1.0}


class Pipe:
    _execution_device = torch.device("cpu")

    def __init__(self, matrix):
        self.transformer, self.scheduler = LinearModel(matrix), Scheduler()


@dataclass(frozen=True)
class Inputs:
    latents: torch.Tensor
    sigmas: torch.Tensor

    @property
    def times(self):
        return self.sigmas[:-1]

    def on(self, sigmas):
        return replace(self, sigmas=sigmas)


class ToySampler:
    """prepare, denoise and open_site as in a model folder; `width` numbers a latent row, `rows` rows a prompt."""

    def __init__(self, rows=8):
        self.rows = rows

    FOLDER = Path("toy")

    def settings_of(self, pipe, steps=12):
        return {"steps": steps}

    def load(self, model="demo", device="cpu", dtype=torch.float32, offload="none"):
        return Pipe(np.eye(2))

    def decode(self, pipe, latents, inputs):
        raise UserError("the toy makes no images")

    def prepare(self, pipe, prompts, seeds, *, steps, warp=1.0):
        size = (self.rows, pipe.transformer.config["rows"])
        noise = [torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        sigmas = torch.from_numpy((np.linspace(1, 0, steps + 1) ** warp).astype(np.float32))
        return Inputs(torch.stack(noise), sigmas)

    def open_site(self, pipe, inputs, site):
        return OutputSite()

    def velocity(self, pipe, inputs, x, t):
        return pipe.transformer(x)

    def first_order(self, pipe, inputs, i, k):
        return 1.0, (inputs.sigmas[k] - inputs.sigmas[i]).item()

    def denoise(self, pipe, inputs, plan=None, on_step=None):
        inputs = inputs if plan is None else inputs.on(plan.grid(inputs.sigmas))
        if plan is not None and plan.kind == "budget":
            return follow(lambda x, t: self.velocity(pipe, inputs, x, t), inputs, plan, on_step)
        x, s, site = inputs.latents, inputs.sigmas, OutputSite()
        for i, t in enumerate(inputs.times):
            if plan is None or i not in plan.cached:
                v = pipe.transformer(x)
                r = site.residual(x, v)
            else:
                v = site.reuse(x, t, r)
                v = rectify(v, plan.k[i], plan.b[i]) if plan.rectified else v
            steered = on_step(i, x, v) if on_step else None
            x = euler_step(x, v if steered is None else steered, s[i], s[i + 1])
        return x
