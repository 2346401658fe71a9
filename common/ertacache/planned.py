"""A scheduler that follows a plan in a stock diffusers pipeline.

A pipeline asks its scheduler for timesteps, calls the model once at each, and lets the scheduler step. So a plan needs
nothing but a scheduler that names the computed steps only, and steps from each of them to the next. Nothing is hooked
into the model: guidance, ControlNet, LoRA, adapters, offload and compilation stay what they are.
"""

import copy
import functools
import inspect
import time

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from ertacache.algorithm import jump, rectify, residual, reuse
from ertacache.conditions import Conditions
from ertacache.errors import PlanError, UserError
from ertacache.plan import Plan
from ertacache.solvers import ddim_step


class Flow:
    """dx/ds = sign · v: 1 for v = noise − data, −1 for data − noise. Levels: the scheduler's sigmas; times: × 1000."""

    def __init__(self, own, sign: float = 1.0):
        self.own, self.sign, self.levels = own, sign, own.sigmas  # [T+1]

    def times_on(self, grid: torch.Tensor) -> torch.Tensor:
        """The model's times on a grid of levels; the scheduler's own on its own (UniPC's are whole numbers)."""
        if torch.equal(grid, self.levels):
            return self.own.timesteps
        return (grid[:-1] * self.own.config.num_train_timesteps).to(self.own.timesteps.device)

    def first_order(self, s: torch.Tensor, s_next: torch.Tensor) -> tuple[float, float]:
        return 1.0, self.sign * (s_next - s).item()

    def stepper(self, grid: torch.Tensor, times: torch.Tensor, begin: int):
        """step(i, x, v) by a copy of the scheduler on this grid, from step `begin` on; it keeps its own history."""
        solver = copy.deepcopy(self.own)
        solver.sigmas, solver.timesteps = grid, times
        solver.set_begin_index(begin)
        return lambda i, x, v: solver.step(v, times[i], x, return_dict=False)[0]


class Rotation:
    """DDIM on v-prediction, x' = cos(Δθ) x + sin(Δθ) v. Levels: θ / (π/2), where ᾱ = cos²θ; times: training timesteps.

    As diffusers does it, the last step goes from t to t − ⌊1000/T⌋; below 0 lies ᾱ of the data.
    """

    def __init__(self, own):
        self.own = own
        table = torch.cat([own.final_alpha_cumprod.double()[None], own.alphas_cumprod.double()])  # t = −1 … 999
        t = own.timesteps.cpu()
        t_next = (t - own.config.num_train_timesteps // own.num_inference_steps).clamp(min=-1)
        self.angles = np.arccos(np.sqrt(table.numpy())) * 2 / np.pi
        self.levels = torch.from_numpy(self.angles[torch.cat([t, t_next[-1:]]) + 1]).float()  # [T+1]
        self.alphas = torch.stack([table[t + 1], table[t_next + 1]], dim=1)  # ᾱ at both ends of each step, [T, 2]

    def times_on(self, grid: torch.Tensor) -> torch.Tensor:
        """The timesteps on a grid of levels; between two of training they are interpolated in the angle."""
        if torch.equal(grid, self.levels):
            return self.own.timesteps
        times = np.interp(grid[:-1].double().numpy(), self.angles, np.arange(-1, len(self.angles) - 1))
        return torch.from_numpy(times).float().to(self.own.timesteps.device)

    def first_order(self, s: torch.Tensor, s_next: torch.Tensor) -> tuple[float, float]:
        turn = (s_next - s).item() * np.pi / 2
        return float(np.cos(turn)), float(np.sin(turn))

    def stepper(self, grid: torch.Tensor, times: torch.Tensor, begin: int):
        """step(i, x, v) between any two levels; DDIM has no history."""
        alphas = torch.cos(grid.double() * torch.pi / 2) ** 2
        ends = self.alphas if torch.equal(grid, self.levels) else torch.stack([alphas[:-1], alphas[1:]], dim=1)
        return lambda i, x, v: ddim_step(x, v, *ends[i]).to(x.dtype)


_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SOLVERS = {  # class → how it steps, and what its config must say (no fresh noise, no clipping, a velocity)
    "FlowMatchEulerDiscreteScheduler": (Flow, {"stochastic_sampling": False, "invert_sigmas": False}),
    "UniPCMultistepScheduler": (Flow, _FLOW),
    "DPMSolverMultistepScheduler": (Flow, {**_FLOW, "algorithm_type": "dpmsolver++"}),
    "CogVideoXDDIMScheduler": (Rotation, {"prediction_type": "v_prediction"}),
    "DDIMScheduler": (Rotation, {"prediction_type": "v_prediction", "clip_sample": False, "thresholding": False}),
    "RFlowScheduler": (functools.partial(Flow, sign=-1.0), {}),
}


def check_scheduler(own) -> None:
    """Refuse a scheduler whose step a plan cannot replace."""
    name = type(own).__name__
    if name not in SOLVERS:
        raise UserError(f"the pipeline's scheduler is {name}; plans know {', '.join(SOLVERS)}: load one of them")
    for key, needed in SOLVERS[name][1].items():
        if own.config.get(key, needed) != needed:
            raise UserError(f"the pipeline's {name} has {key} = {own.config[key]}: a plan needs {key} = {needed}")


def solver_of(own) -> Flow | Rotation:
    """How a scheduler steps, on the T steps that it has just been set to."""
    check_scheduler(own)
    return SOLVERS[type(own).__name__][0](own)


def first_order(scheduler, i: int, k: int) -> tuple[float, float]:
    """(a, w) of x_k = a x_i + w v_i, the scheduler's own first-order jump over the steps i … k−1 of its T steps."""
    solver = solver_of(scheduler)
    return solver.first_order(solver.levels[i], solver.levels[k])


class Run:
    """One call of a pipeline: the plan on this run's grid. Places count the computed steps, 0 … N−1."""

    def __init__(self, solver: Flow | Rotation, plan: Plan):
        self.solver, self.plan = solver, plan
        self.grid = plan.grid(solver.levels)
        self.all_times = solver.times_on(self.grid)
        computed = plan.computed if plan.kind == "budget" else sorted({*range(plan.steps)} - {*plan.cached})
        self.ends = [*computed, len(self.all_times)]  # from each computed step to the next, the last to the data
        self.weights = plan.weights_on(self.grid) if plan.kind == "budget" else None
        self.following, self.history, self.step = 0, [], None
        self.computed, self.uncached, self.clock = 0, 0.0, []  # steps, uncached steps in their place, time at each
        solver.own.timesteps = self.all_times[self.ends[:-1]]  # the pipeline sees these steps only, [N]
        if hasattr(solver.own, "sigmas"):
            solver.own.sigmas = self.grid[self.ends]  # [N+1]
        self.times = solver.own.timesteps.tolist()

    def place_of(self, timestep) -> int:
        """The place that a timestep belongs to; of two with one timestep (UniPC rounds them), the one that follows."""
        t = torch.as_tensor(timestep).flatten()[0].item()
        places = [place for place, known in enumerate(self.times) if known == t]
        if not places:
            raise UserError(f"the pipeline steps at time {t:g}, none of this run's {len(self.times)}: disable the plan")
        return self.following if self.following in places else places[0]

    def advance(self, place: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """From the latents before a computed step, and its velocity, to those before the next computed step."""
        self.clock.append(time.perf_counter())  # finding the place has waited for the device
        if place != self.following:
            self.history, self.step = [], None
        start, end = self.ends[place : place + 2]
        x = self.reuse(start, end, x, v) if self.weights is None else self.jump(place, x, v)
        self.computed, self.following = self.computed + 1, place + 1
        self.uncached += self.plan.steps * (end - start) / len(self.all_times)
        if self.following == len(self.times):  # cached tensors die with the run
            self.history, self.step = [], None
        return x

    def jump(self, place: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """A budget plan's jump; the solver's own where a run that began in the middle lacks outputs for it."""
        self.history = [v, *self.history][: self.plan.anchors]
        weights, scale = self.weights[place], self.plan.scale[place]
        if any(weights[len(self.history) :]):
            scale, *weights = self.solver.first_order(*self.grid[self.ends[place : place + 2]])
        return jump(x, self.history, weights, scale)

    def reuse(self, start: int, end: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """A threshold plan's computed step, and the cached ones that follow it, by the pipeline's own solver."""
        self.step = self.step or self.solver.stepper(self.grid, self.all_times, start)
        r = residual(v, x)  # Eq. 5
        for i in range(start, end):
            if i > start:
                v = reuse(x, r)  # Eq. 6
                v = rectify(v, self.plan.k[i], self.plan.b[i]) if self.plan.rectified else v  # Eq. 15
            x = self.step(i, x, v)
        return x


class PlannedScheduler:
    """Stands in for a pipeline's own scheduler; whatever is not defined here, that one answers.

    To `isinstance` and `save_pretrained` its class is the own one's; `type()` tells them apart. All that belongs to a
    run begins with `set_timesteps`, so that no other call, finished or not, can reach into it. A copy has had no run.
    """

    def __init__(self, own, plan: Plan):
        check_scheduler(own)
        self.own, self.plan, self.signature = own, plan, inspect.signature(own.step)
        self.run, self.counts_all, self.earlier = None, False, []  # earlier: (computed, uncached) of the runs before
        self.__module__ = type(own).__module__  # which save_pretrained writes down

    @property
    def __class__(self):
        return type(self.own)

    def __reduce__(self):
        return PlannedScheduler, (self.own, self.plan)

    def __getattr__(self, name: str):
        return getattr(self.own, name)

    @property
    def set_timesteps(self):
        """The own scheduler's T steps, checked; then only the computed ones are there to see. Same signature."""

        @functools.wraps(self.own.set_timesteps)
        def set_timesteps(*args, **kwargs):
            self.own.set_timesteps(*args, **kwargs)
            steps = len(self.own.timesteps)
            calibrate = f"ertacache.calibrate(pipe, prompts, num_inference_steps={steps})"
            remedy = f"give num_inference_steps={self.plan.steps}, or make a plan with {calibrate}"
            self.plan.check(Conditions(steps, {}, {}), remedy)
            given = inspect.signature(self.own.set_timesteps).bind(*args, **kwargs).arguments
            self.counts_all = given.get("sigmas") is None and given.get("timesteps") is None
            self.earlier += [] if self.run is None else [(self.run.computed, self.run.uncached)]
            self.run = Run(solver_of(self.own), self.plan)

        return set_timesteps

    @property
    def step(self):
        """From a computed step to the next. Same signature as the own scheduler's."""

        @functools.wraps(self.own.step)
        def step(*args, **kwargs):
            given, known = self.signature.bind(*args, **kwargs).arguments, self.signature.parameters
            v, timestep, x = (given.pop(name) for name in ("model_output", "timestep", "sample"))
            return_dict, _ = given.pop("return_dict", True), given.pop("generator", None)
            for name, value in given.items():
                if value is not known[name].default and value != known[name].default:
                    raise UserError(f"the pipeline steps with {name}, which a plan cannot follow: disable the plan")
            place = self.run.place_of(timestep)
            self.check_start(place)
            x = self.run.advance(place, x, v)
            self.set_begin_index(place + 1)  # inpainting asks the own scheduler for the noise of the next step
            return SchedulerOutput(prev_sample=x) if return_dict else (x,)

        return step

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where image-to-image begins, and where inpainting goes on, counted in computed steps."""
        self.check_start(begin_index)
        if hasattr(self.own, "set_begin_index"):
            self.own.set_begin_index(begin_index)

    def add_noise(self, original_samples, noise, timesteps):
        """The own scheduler's; video-to-video asks for it at the step where it begins."""
        self.check_start(0 if len(timesteps) and timesteps[0] == self.own.timesteps[0] else 1)
        return self.own.add_noise(original_samples, noise, timesteps)

    def check_start(self, place: int) -> None:
        """Refuse a pipeline that set T steps by their number: it counts its start in them, but finds only N."""
        if place > 0 and self.counts_all and self.run.computed == 0:
            text = (
                f"the pipeline counts its start in {self.plan.steps} steps, the plan computes {len(self.run.times)}: "
            )
            raise PlanError(text + "give it sigmas in place of a number of steps, or strength=1, or disable the plan")
