"""What plans know of diffusers' schedulers: noise levels, the model's times, and steps between any two levels."""

import copy
import functools

import numpy as np
import torch

from ertacache.numerics.steps import ddim_step
from ertacache.utils.errors import UserError


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

    def companion(self):
        """step(grid, times, place, ends, x, v) by a copy that is called at every computed step, so that it knows them.

        It goes from level ends[place] to ends[place + 1]; levels ahead may change from call to call. A multistep solver
        corrects x by the step before only where that was one of its own length.
        """
        solver = copy.deepcopy(self.own)
        solver.set_begin_index(0)

        def step(
            grid: torch.Tensor, times: torch.Tensor, place: int, ends: list[int], x: torch.Tensor, v: torch.Tensor
        ):
            solver.sigmas, solver.timesteps = grid[ends], times[ends[:-1]]
            if place and ends[place] != ends[place - 1] + 1 and hasattr(solver, "last_sample"):
                solver.last_sample = None
            return solver.step(v, solver.timesteps[place], x, return_dict=False)[0]

        return step


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

    def companion(self):
        """As `Flow.companion`; DDIM has no history."""
        return lambda grid, times, place, ends, x, v: self.stepper(grid, times, 0)(ends[place], x, v)

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
