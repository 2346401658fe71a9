"""What plans know of diffusers' schedulers: noise levels, the model's times, and what is linear in a step.

Whatever a sampler is called, its latents are a mixture of data and noise, and the model's output o says which:

    x = α · data + σ · noise,      data = d_x x + d_o o,      noise = n_x x + n_o o

With α and σ at both ends, x' = α' · data + σ' · noise is the first-order jump of any deterministic sampler (DDIM, and
Euler's step in flow matching and in sigma space). So a scheduler is described by the unit of its noise levels, from
which α and σ follow, and by what its model predicts. `SOLVERS` lists those that plans know.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from ertacache.numerics.steps import ddim_step
from ertacache.utils.errors import UserError

# --- noise levels, and what models predict -------------------------------------------------------------------------


def of_flow(s: float) -> tuple[float, float]:
    """Return (α, σ) at a noise level of flow matching, s = σ; 1 is noise."""
    return 1.0 - s, s


def of_angle(s: float) -> tuple[float, float]:
    """Return (α, σ) at an angle s = θ / (π/2), where α² + σ² = 1; 1 is noise."""
    return math.cos(s * math.pi / 2), math.sin(s * math.pi / 2)


def of_ratio(s: float) -> tuple[float, float]:
    """Return (α, σ) in sigma space, where the data is not scaled."""
    return 1.0, s


def data_of(prediction: str, alpha: float, sigma: float, scale: float = 1.0) -> tuple[float, float]:
    """Return (d_x, d_o) of data = d_x x + d_o o.

    Args:
        prediction: "epsilon", the noise; "sample", the data; "v_prediction", (α · noise − σ · data) / √(α² + σ²)
            (Salimans & Ho 2022); "flow_prediction", noise − data; "edm epsilon" and "edm v_prediction", those of
            Karras et al. 2022, Eq. 7.
        alpha, sigma: Of the latents.
        scale: Standard deviation of the data, for the last two.
    """
    norm = math.hypot(alpha, sigma)
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "sample":
        return 0.0, 1.0
    if prediction == "v_prediction":
        return alpha / norm**2, -sigma / norm
    if prediction == "flow_prediction":
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    both = scale**2 + sigma**2
    out = sigma * scale / math.sqrt(both)
    return scale**2 / both, out if prediction == "edm epsilon" else -out


# --- solvers -------------------------------------------------------------------------------------------------------


class Solver:
    """How a scheduler steps, on the T steps that it has just been set to.

    Args:
        scheduler: On its T steps.
        unit: of_flow, of_angle or of_ratio.
        prediction: What the model predicts (`data_of`).

    Attributes:
        sigmas: The noise levels before each step and at the end, float32 [T+1], as they are now: pipelines may edit
            them.
    """

    sigmas: torch.Tensor

    def __init__(self, scheduler, unit: Callable[[float], tuple[float, float]], prediction: str):
        self.scheduler, self.unit, self.prediction = scheduler, unit, prediction

    def show(self, sigmas: torch.Tensor) -> None:
        """Set the scheduler to another grid, [T+1]."""
        raise UserError(f"a {type(self.scheduler).__name__} cannot be moved to the plan's own grid: calibrate one here")

    def first_order(self, s: float, s_next: float) -> tuple[float, float]:
        """Return (a, w) of x' = a x + w o, the first-order jump between two noise levels."""
        (alpha, sigma), (alpha_next, sigma_next) = self.unit(float(s)), self.unit(float(s_next))
        data_x, data_o = data_of(self.prediction, alpha, sigma, self.scheduler.config.get("sigma_data", 1.0))
        noise_x, noise_o = (1 - alpha * data_x) / sigma, -alpha * data_o / sigma
        return alpha_next * data_x + sigma_next * noise_x, alpha_next * data_o + sigma_next * noise_o

    def step(self, i: int, x: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
        """Make step i by the scheduler itself."""
        return self.scheduler.step(v, self.scheduler.timesteps[i], x, **options, return_dict=False)[0]

    def shadow(self):
        """Return step(done, i, k, x, v), which makes the solver's step from step i to step k of a planned run.

        It is called at every computed step. Here it is of first order.

        Args of the returned function:
            done: The computed steps before i.
        """

        def step(done: list[int], i: int, k: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            levels = self.sigmas
            scale, weight = self.first_order(levels[i], levels[k])
            return (scale * x.float() + weight * v.float()).to(x.dtype)

        return step


class OnSigmas(Solver):
    """A scheduler that steps from one of its `sigmas` [T+1] to the next: flow matching, DPM-Solver, Euler, …"""

    @property
    def sigmas(self) -> torch.Tensor:
        sigmas = self.scheduler.sigmas
        return sigmas.atan() / (torch.pi / 2) if self.unit is of_angle else sigmas

    def shadow(self):
        """Return `Solver.shadow` by a copy of the scheduler, so that a multistep solver's history is that of the run.

        It corrects x by the step before only where that was one of its own length.
        """
        if calls_per_step(self.scheduler) > 1:
            return super().shadow()
        solver, sigmas, times = copy.deepcopy(self.scheduler), self.scheduler.sigmas, self.scheduler.timesteps
        if hasattr(solver, "set_begin_index"):
            solver.set_begin_index(0)

        def step(done: list[int], i: int, k: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            rest = range(k, len(times))  # as many steps are to come: the last ones may be of lower order
            solver.sigmas, solver.timesteps = sigmas[[*done, i, *rest, len(times)]], times[[*done, i, *rest]]
            if done and i != done[-1] + 1 and hasattr(solver, "last_sample"):
                solver.last_sample = None
            return solver.step(v, times[i], x, return_dict=False)[0]

        return step


class FlowMatching(OnSigmas):
    """Flow matching, dx/ds = sign · o; the model's times are sigmas × 1000.

    Args:
        scheduler: On its T steps.
        sign: 1 for o = noise − data, −1 for o = data − noise.
    """

    def __init__(self, scheduler, sign: float = 1.0):
        super().__init__(scheduler, of_flow, "flow_prediction")
        self.sign = sign

    def show(self, sigmas: torch.Tensor) -> None:
        if not torch.equal(sigmas, self.sigmas):  # UniPC rounds the times of its own
            times = sigmas[:-1] * self.scheduler.config.num_train_timesteps
            self.scheduler.timesteps = times.to(self.scheduler.timesteps.device)
        self.scheduler.sigmas = sigmas

    def first_order(self, s: float, s_next: float) -> tuple[float, float]:
        return 1.0, self.sign * float(s_next - s)


@dataclass(frozen=True)
class AngleGrid:
    """Steps of a scheduler over a table of ᾱ as angles: ᾱ = cos²θ, sigma = θ / (π/2), 1 = noise … 0 = data.

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
    """Return (a, w) of x' = cos(Δθ) x + sin(Δθ) v, DDIM's jump on v-prediction between two angles θ / (π/2)."""
    angle = float(s_next - s) * np.pi / 2
    return float(np.cos(angle)), float(np.sin(angle))


class OnTable(Solver):
    """A scheduler that looks ᾱ of its timesteps up in a table: DDIM, PNDM. The levels are angles."""

    def __init__(self, scheduler, prediction: str):
        super().__init__(scheduler, of_angle, prediction)
        self.native = self.grid = AngleGrid.of(scheduler)

    @property
    def sigmas(self) -> torch.Tensor:
        return self.grid.sigmas

    def shadow(self):
        def step(done: list[int], i: int, k: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            ends = torch.stack([self.grid.alphas[i, 0], self.grid.alphas[k - 1, 1]]).sqrt().acos() / (torch.pi / 2)
            scale, weight = self.first_order(*ends.tolist())
            return (scale * x.float() + weight * v.float()).to(x.dtype)

        return step


class VPrediction(OnTable):
    """DDIM on v-prediction, which can be moved to any grid of angles; it has no history."""

    def __init__(self, scheduler):
        super().__init__(scheduler, "v_prediction")

    def first_order(self, s: float, s_next: float) -> tuple[float, float]:
        return turn(s, s_next)

    def show(self, sigmas: torch.Tensor) -> None:
        self.grid = self.native.on(sigmas)
        self.scheduler.timesteps = self.grid.times

    def step(self, i: int, x: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
        """Make step i: by the scheduler itself on its own grid, between the angles of another."""
        if self.grid is self.native:
            return super().step(i, x, v, **options)
        return ddim_step(x, v, *self.grid.alphas[i]).to(x.dtype)


# --- the schedulers that plans know --------------------------------------------------------------------------------


def _flow_or_angle(scheduler) -> Solver:
    """Return the solver of a multistep scheduler, which steps in flow matching or between angles."""
    flow, prediction = scheduler.config.get("use_flow_sigmas"), scheduler.config.prediction_type
    if flow and prediction == "flow_prediction":
        return FlowMatching(scheduler)
    return OnSigmas(scheduler, of_flow if flow else of_angle, prediction)


def _in_sigma_space(scheduler) -> Solver:
    return OnSigmas(scheduler, of_ratio, scheduler.config.prediction_type)


def _preconditioned(scheduler) -> Solver:
    return OnSigmas(scheduler, of_ratio, f"edm {scheduler.config.prediction_type}")


def _on_table(scheduler) -> Solver:
    prediction = scheduler.config.prediction_type
    is_ddim = "DDIM" in type(scheduler).__name__
    return VPrediction(scheduler) if is_ddim and prediction == "v_prediction" else OnTable(scheduler, prediction)


@dataclass(frozen=True)
class Known:
    """A class of schedulers that plans know.

    Attributes:
        solver: solver(scheduler) on its T steps.
        needs: Values that its config must have, where it has the name: no fresh noise, no clipping.
        calls: (a, b): num_inference_steps = n makes T = a n + b steps with one model call each.
    """

    solver: Callable[[Any], Solver]
    needs: dict[str, tuple] = field(default_factory=dict)
    calls: tuple[int, int] = (1, 0)


_EXACT = {"thresholding": (False,), "prediction_type": ("epsilon", "sample", "v_prediction")}
_MULTISTEP = {
    "thresholding": (False,),
    "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction"),
    "algorithm_type": ("dpmsolver++", "dpmsolver", "deis"),
    "variance_type": (None,),
}
_TABLE = {"clip_sample": (False,), **_EXACT}
SOLVERS = {
    "FlowMatchEulerDiscreteScheduler": Known(FlowMatching, {"stochastic_sampling": (False,)}),
    "FlowMatchHeunDiscreteScheduler": Known(FlowMatching, calls=(2, -1)),
    "HeliosScheduler": Known(FlowMatching, {"stages": (1,), "thresholding": (False,)}),
    "RFlowScheduler": Known(lambda scheduler: FlowMatching(scheduler, sign=-1.0)),
    "UniPCMultistepScheduler": Known(_flow_or_angle, _MULTISTEP),
    "DPMSolverMultistepScheduler": Known(_flow_or_angle, _MULTISTEP),
    "DPMSolverSinglestepScheduler": Known(_flow_or_angle, _MULTISTEP),
    "DEISMultistepScheduler": Known(_flow_or_angle, _MULTISTEP),
    "DDIMScheduler": Known(_on_table, _TABLE),
    "DDIMParallelScheduler": Known(_on_table, _TABLE),
    "CogVideoXDDIMScheduler": Known(_on_table, {"prediction_type": ("v_prediction",)}),
    "PNDMScheduler": Known(_on_table, {"skip_prk_steps": (True,), **_EXACT}, calls=(1, 1)),
    "EulerDiscreteScheduler": Known(_in_sigma_space, _EXACT),
    "HeunDiscreteScheduler": Known(_in_sigma_space, {"clip_sample": (False,), **_EXACT}, calls=(2, -1)),
    "LMSDiscreteScheduler": Known(_in_sigma_space, _EXACT),
    "EDMEulerScheduler": Known(_preconditioned),
    "EDMDPMSolverMultistepScheduler": Known(
        _preconditioned, {"thresholding": (False,), "algorithm_type": ("dpmsolver++",)}
    ),
}
NOISE, BETWEEN = "draws noise in each step", "calls the model between its steps"
TWINS = {  # what plans cannot follow: the reason, and what to load instead, from the same config with some changes
    "DDPMScheduler": (NOISE, "DDIMScheduler", {"clip_sample": False, "thresholding": False}),
    "DDPMParallelScheduler": (NOISE, "DDIMScheduler", {"clip_sample": False, "thresholding": False}),
    "CogVideoXDPMScheduler": (NOISE, "CogVideoXDDIMScheduler", {}),
    "EulerAncestralDiscreteScheduler": (NOISE, "EulerDiscreteScheduler", {}),
    "DPMSolverSDEScheduler": (NOISE, "DPMSolverMultistepScheduler", {}),
    "SASolverScheduler": (NOISE, "UniPCMultistepScheduler", {}),
    "LTXEulerAncestralRFScheduler": (NOISE, "FlowMatchEulerDiscreteScheduler", {}),
    "KDPM2AncestralDiscreteScheduler": (NOISE, "HeunDiscreteScheduler", {}),
    "KDPM2DiscreteScheduler": (BETWEEN, "HeunDiscreteScheduler", {}),
}
WITHOUT_TWIN = {  # the same of those that models are made for, so that nothing else can be loaded
    **dict.fromkeys(
        ("LCMScheduler", "TCDScheduler", "SCMScheduler", "FlowMatchLCMScheduler", "HeliosDMDScheduler"), NOISE
    ),
    **dict.fromkeys(("CMStochasticIterativeScheduler", "CosineDPMSolverMultistepScheduler"), NOISE),
    **dict.fromkeys(("DDPMWuerstchenScheduler", "UnCLIPScheduler", "RePaintScheduler", "KarrasVeScheduler"), NOISE),
    **dict.fromkeys(("ScoreSdeVeScheduler", "AmusedScheduler", "VQDiffusionScheduler"), NOISE),
    "FlowMapEulerDiscreteScheduler": "tells the model both ends of each step",
    "PiflowScheduler": "makes several steps of each model call",
}
OF_THE_MODEL = ("prediction_type", "variance_type", "stages")  # settings that cannot be changed without another model


def check_scheduler(scheduler) -> None:
    """Refuse a scheduler whose step a plan cannot replace.

    Raises:
        UserError: An unknown class, one that draws noise in each step, or a setting that changes its step; with the
            line of code that mends it where there is one.
    """
    name = type(scheduler).__name__
    if name in TWINS:
        reason, twin, changes = TWINS[name]
        is_learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
        line = _loads(twin, changes, {"variance_type": None} if is_learned else {})
        raise UserError(f"the pipeline's {name} {reason}, which no plan can follow: {line}")
    if name in WITHOUT_TWIN:
        reason = WITHOUT_TWIN[name]
        raise UserError(f"the pipeline's {name} {reason}, which no plan can follow: use the pipeline without one")
    if name not in SOLVERS:
        raise UserError(f"the pipeline's scheduler is {name}; plans know {', '.join(SOLVERS)}: load one of them")
    for key, allowed in SOLVERS[name].needs.items():
        value = scheduler.config.get(key, allowed[0])
        if value not in allowed:
            remedy = _loads(name, {key: allowed[0]}) if key not in OF_THE_MODEL else "use the pipeline without one"
            raise UserError(f"the pipeline's {name} has {key} = {value}, which no plan can follow: {remedy}")
    if scheduler.config.get("rescale_betas_zero_snr") and scheduler.config.prediction_type == "epsilon":
        text = f"the pipeline's {name} begins where the model's noise says nothing of the data (zero SNR)"
        raise UserError(f"{text}: {_loads(name, {'rescale_betas_zero_snr': False})}")


def _loads(name: str, changes: dict[str, Any], others: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Return the line of code that loads another scheduler from the config of a pipeline's own.

    Args:
        name: Of its class.
        changes: Arguments of the class.
        others: What is no argument of it, but is read from its config by pipelines.
    """
    config = f"{{**pipe.scheduler.config, {str(others)[1:-1]}}}" if others else "pipe.scheduler.config"
    given = "".join(f", {key}={value!r}" for key, value in changes.items())
    return f"pipe.scheduler = diffusers.{name}.from_config({config}{given})"


def solver_of(scheduler) -> Solver:
    """Return how a scheduler steps, on the T steps that it has just been set to."""
    check_scheduler(scheduler)
    return SOLVERS[type(scheduler).__name__].solver(scheduler)


def calls_per_step(scheduler) -> int:
    """Return how many steps, of one model call each, a scheduler makes of one of its own."""
    return SOLVERS[type(scheduler).__name__].calls[0]


def _calls(scheduler) -> tuple[int, int]:
    known = SOLVERS.get(scheduler if isinstance(scheduler, str) else type(scheduler).__name__)
    return known.calls if known else (1, 0)


def steps_of(scheduler, num_inference_steps: int) -> int:
    """Return T, the number of steps with one model call each that a scheduler, or its class by name, makes."""
    each, others = _calls(scheduler)
    return each * num_inference_steps + others


def num_inference_steps_of(scheduler, steps: int) -> int:
    """Return the argument with which a scheduler, or its class by name, makes so many steps or the next number."""
    each, others = _calls(scheduler)
    return -((others - steps) // each)


def first_order(scheduler, i: int, k: int) -> tuple[float, float]:
    """Return (a, w) of x_k = a x_i + w v_i, the scheduler's first-order jump over the steps i … k−1 of its T steps."""
    solver = solver_of(scheduler)
    return solver.first_order(solver.sigmas[i], solver.sigmas[k])
