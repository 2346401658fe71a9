"""What plans know of diffusers' schedulers: noise levels, the model's times, and steps between any two levels.

A solver is made on the T steps that a scheduler has just been set to. Its `sigmas` are noise levels in the unit in
which the latents move linearly along the model output: sigmas for flow matching, angles for v-prediction.
"""

import copy
import functools
from dataclasses import dataclass, replace

import numpy as np
import torch

from ertacache.numerics.steps import ddim_step
from ertacache.utils.errors import UserError


class FlowMatching:
    """dx/ds = sign · v, with the scheduler's own sigmas; the model's times are sigmas × 1000.

    Args:
        scheduler: On its T steps.
        sign: 1 for v = noise − data, −1 for v = data − noise.
    """

    def __init__(self, scheduler, sign: float = 1.0):
        self.scheduler, self.sign = scheduler, sign

    @property
    def sigmas(self) -> torch.Tensor:
        """The scheduler's noise levels, [T+1], as they are now: pipelines may edit them."""
        return self.scheduler.sigmas

    def times_on(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Return the model's times [M] on a grid [M+1]; on the native grid the scheduler's (UniPC rounds them)."""
        if torch.equal(sigmas, self.sigmas):
            return self.scheduler.timesteps
        return (sigmas[:-1] * self.scheduler.config.num_train_timesteps).to(self.scheduler.timesteps.device)

    def show(self, sigmas: torch.Tensor) -> None:
        """Set the scheduler to another grid, [T+1]."""
        self.scheduler.timesteps, self.scheduler.sigmas = self.times_on(sigmas), sigmas

    def first_order(self, s: float, s_next: float) -> tuple[float, float]:
        """Return (a, w) of x' = a x + w v, the first-order jump between two levels."""
        return 1.0, self.sign * float(s_next - s)

    def step(self, i: int, x: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
        """Make step i by the scheduler itself."""
        return self.scheduler.step(v, self.scheduler.timesteps[i], x, **options, return_dict=False)[0]

    def shadow(self):
        """Return step(done, i, k, x, v) by a copy of the scheduler that follows along a planned run.

        It steps from step i to step k of the grid and is called at every computed step, so that its history is that of
        the run. A multistep solver corrects x by the step before only where that was one of its own length.

        Args of the returned function:
            done: The computed steps before i.
        """
        solver, sigmas, times = copy.deepcopy(self.scheduler), self.sigmas, self.scheduler.timesteps
        solver.set_begin_index(0)

        def step(done: list[int], i: int, k: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            solver.sigmas, solver.timesteps = sigmas[[*done, i, k]], times[[*done, i]]
            if done and i != done[-1] + 1 and hasattr(solver, "last_sample"):
                solver.last_sample = None
            return solver.step(v, times[i], x, return_dict=False)[0]

        return step


@dataclass(frozen=True)
class AngleGrid:
    """Steps of a v-prediction scheduler as angles: ᾱ = cos²θ, sigma = θ / (π/2), 1 = noise … 0 = data.

    Attributes:
        sigmas: Angles θ / (π/2), float32 [T+1], falling.
        times: The model's timesteps, [T].
        alphas: ᾱ at both ends of each step, float64 [T, 2].
        angles: Angles of all training timesteps −1 … 999, float64 [1001]; below 0 lies ᾱ of the data.
        ends_at_data: Whether the last step leads below timestep 0.
    """

    sigmas: torch.Tensor
    times: torch.Tensor
    alphas: torch.Tensor
    angles: np.ndarray
    ends_at_data: bool

    @classmethod
    def of(cls, scheduler) -> "AngleGrid":
        """Return the T steps that the scheduler has been set to.

        Each step goes from t to t − ⌊1000/T⌋, as diffusers' does; where T does not divide 1000 this is not the next t.
        """
        table = torch.cat([a.cpu().double() for a in (scheduler.final_alpha_cumprod[None], scheduler.alphas_cumprod)])
        t = scheduler.timesteps.cpu()
        t_next = (t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps).clamp(min=-1)
        angles = np.arccos(np.sqrt(table.numpy())) * 2 / np.pi
        return cls(
            sigmas=torch.from_numpy(angles[torch.cat([t, t_next[-1:]]) + 1]).float().to(scheduler.timesteps.device),
            times=scheduler.timesteps.clone(),
            alphas=torch.stack([table[t + 1], table[t_next + 1]], dim=1),
            angles=angles,
            ends_at_data=bool(t_next[-1] < 0),
        )

    def on(self, sigmas: torch.Tensor) -> "AngleGrid":
        """Return another grid of angles [M+1]; times between two training timesteps are interpolated in the angle."""
        if torch.equal(sigmas, self.sigmas):
            return self
        angles = sigmas.cpu().double()
        times = np.interp(angles[:-1].numpy(), self.angles, np.arange(-1, len(self.angles) - 1))
        alphas = torch.cos(angles * torch.pi / 2) ** 2
        return replace(
            self,
            sigmas=sigmas,
            times=torch.from_numpy(times).float().to(self.times.device),
            alphas=torch.stack([alphas[:-1], alphas[1:]], dim=1),
        )


def turn(s: float, s_next: float) -> tuple[float, float]:
    """Return (a, w) of x' = cos(Δθ) x + sin(Δθ) v, DDIM's jump between two angles θ / (π/2)."""
    angle = float(s_next - s) * np.pi / 2
    return float(np.cos(angle)), float(np.sin(angle))


class VPrediction:
    """DDIM on v-prediction; it has no history.

    Args:
        scheduler: On its T steps.
    """

    def __init__(self, scheduler):
        self.scheduler, self.native = scheduler, AngleGrid.of(scheduler)
        self.grid = self.native

    @property
    def sigmas(self) -> torch.Tensor:
        """The noise levels as angles, [T+1]."""
        return self.grid.sigmas

    def times_on(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Return the model's timesteps [M] on a grid of angles [M+1]."""
        return self.native.on(sigmas).times

    def show(self, sigmas: torch.Tensor) -> None:
        """Set the scheduler to another grid, [T+1]."""
        self.grid = self.native.on(sigmas)
        self.scheduler.timesteps = self.grid.times

    def first_order(self, s: float, s_next: float) -> tuple[float, float]:
        """Return (a, w) of x' = a x + w v, DDIM's jump between two angles."""
        return turn(s, s_next)

    def step(self, i: int, x: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
        """Make step i: by the scheduler itself on its own grid, between the angles of another."""
        if self.grid is self.native:
            return self.scheduler.step(v, self.scheduler.timesteps[i], x, **options, return_dict=False)[0]
        return ddim_step(x, v, *self.grid.alphas[i]).to(x.dtype)

    def shadow(self):
        """Return step(done, i, k, x, v), as `FlowMatching.shadow`."""

        def step(done: list[int], i: int, k: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            ends = self.grid.alphas[i, 0], self.grid.alphas[k - 1, 1]
            return ddim_step(x, v, *ends).to(x.dtype)

        return step


_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "thresholding": False}
SOLVERS = {  # class → how it steps, and what its config must say (no fresh noise, no clipping, a velocity)
    "FlowMatchEulerDiscreteScheduler": (FlowMatching, {"stochastic_sampling": False}),
    "UniPCMultistepScheduler": (FlowMatching, _FLOW),
    "DPMSolverMultistepScheduler": (FlowMatching, {**_FLOW, "algorithm_type": "dpmsolver++"}),
    "CogVideoXDDIMScheduler": (VPrediction, {"prediction_type": "v_prediction"}),
    "DDIMScheduler": (VPrediction, {"prediction_type": "v_prediction", "clip_sample": False, "thresholding": False}),
    "RFlowScheduler": (functools.partial(FlowMatching, sign=-1.0), {}),
}


def check_scheduler(scheduler) -> None:
    """Refuse a scheduler whose step a plan cannot replace.

    Raises:
        UserError: An unknown class, or a setting that changes its step.
    """
    name = type(scheduler).__name__
    if name not in SOLVERS:
        raise UserError(f"the pipeline's scheduler is {name}; plans know {', '.join(SOLVERS)}: load one of them")
    for key, needed in SOLVERS[name][1].items():
        value = scheduler.config.get(key, needed)
        if value != needed:
            raise UserError(f"the pipeline's {name} has {key} = {value}: a plan needs {key} = {needed}")


def solver_of(scheduler) -> FlowMatching | VPrediction:
    """Return how a scheduler steps, on the T steps that it has just been set to."""
    check_scheduler(scheduler)
    return SOLVERS[type(scheduler).__name__][0](scheduler)


def first_order(scheduler, i: int, k: int) -> tuple[float, float]:
    """Return (a, w) of x_k = a x_i + w v_i, the scheduler's first-order jump over the steps i … k−1 of its T steps."""
    solver = solver_of(scheduler)
    return solver.first_order(solver.sigmas[i], solver.sigmas[k])
