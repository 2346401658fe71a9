"""A scheduler that follows a plan in a stock diffusers pipeline.

A pipeline asks its scheduler for timesteps, calls the model once at each, and lets the scheduler step. So a plan needs
nothing but a scheduler that names the computed steps only, and steps from each of them to the next. Nothing is hooked
into the model: guidance, ControlNet, LoRA, adapters, offload and compilation stay what they are.
"""

import functools
import inspect
import warnings
from collections.abc import Iterator

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from ertacache.numerics.schedulers import check_scheduler, solver_of
from ertacache.pipelines.run import PlannedRun
from ertacache.plans.drift import LIMITS
from ertacache.plans.plan import Plan
from ertacache.plans.requirements import Requirements
from ertacache.utils.errors import PlanError, UserError


class GrowingTimes(torch.Tensor):
    """The times of a run [N], to which drift adds while a pipeline loops over them; operations give plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def of(cls, run: PlannedRun) -> "GrowingTimes":
        times = run.solver.scheduler.timesteps.as_subclass(cls)
        times.run = run
        return times

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.run.extendable, place = True, 0
        while place < len(self.run.times):
            yield self.run.solver.scheduler.timesteps[place]
            place += 1


class PlannedScheduler:
    """Stands in for a pipeline's original scheduler, to which it delegates whatever is not defined here.

    To `isinstance` and `save_pretrained` its class is the original's; `type()` distinguishes them. The state of a run
    begins with `set_timesteps`, so that no other call, finished or not, can reach into it. A copy has had no run.

    Args:
        own: The original scheduler.
        plan: What to follow.
        on_drift, drift_limit: As in `ertacache.enable`.
    """

    def __init__(self, own, plan: Plan, on_drift: str = "warn", drift_limit: float | None = None):
        check_scheduler(own)
        self.own, self.plan, self.signature = own, plan, inspect.signature(own.step)
        self.on_drift, self.drift_limit, self.warned = on_drift, drift_limit, False
        self.run, self.counts_all, self.earlier = None, False, []  # earlier: (computed, uncached) of earlier runs
        self.__module__ = type(own).__module__  # save_pretrained writes it

    @property
    def __class__(self):
        return type(self.own)

    def __reduce__(self):
        return PlannedScheduler, (self.own, self.plan, self.on_drift, self.drift_limit)

    def __getattr__(self, name: str):
        return getattr(self.own, name)

    @property
    def timesteps(self) -> torch.Tensor:
        """The times of the computed steps; a pipeline's loop over them also sees those that drift adds."""
        grows = self.run is not None and self.run.compute_beyond is not None
        return GrowingTimes.of(self.run) if grows else self.own.timesteps

    @property
    def set_timesteps(self):
        """Set the original scheduler's T steps and check them; then show the computed ones only. Same signature."""

        @functools.wraps(self.own.set_timesteps)
        def set_timesteps(*args, **kwargs):
            self.own.set_timesteps(*args, **kwargs)
            steps = len(self.own.timesteps)
            calibrate = f"ertacache.calibrate(pipe, prompts, num_inference_steps={steps})"
            remedy = f"give num_inference_steps={self.plan.steps}, or make a plan with {calibrate}"
            self.plan.check(Requirements(steps, {}, {}), remedy)
            given = inspect.signature(self.own.set_timesteps).bind(*args, **kwargs).arguments
            self.counts_all = given.get("sigmas") is None and given.get("timesteps") is None
            self.earlier += [] if self.run is None else [(self.run.computed, self.run.uncached)]
            factor = LIMITS["compute"] if self.drift_limit is None else self.drift_limit
            self.run = PlannedRun(solver_of(self.own), self.plan, factor if self.on_drift == "compute" else None)

        return set_timesteps

    @property
    def step(self):
        """Step from a computed step to the next. Same signature as the original scheduler's."""

        @functools.wraps(self.own.step)
        def step(model_output, timestep, sample, *args, **kwargs):
            known, v, x = self.signature.parameters, model_output, sample
            given = {**dict(zip(list(known)[3:], args, strict=False)), **kwargs}
            return_dict, _ = given.pop("return_dict", True), given.pop("generator", None)
            for name, value in given.items():
                if value is not known[name].default and value != known[name].default:
                    raise UserError(f"the pipeline steps with {name}, which a plan cannot follow: disable the plan")
            place = self.run.place_of(timestep)
            self.check_start(place)
            x = self.run.advance(place, x, v)
            self.warn_of_drift()
            self.set_begin_index(place + 1)  # inpainting asks for the noise of the next step
            return SchedulerOutput(prev_sample=x) if return_dict else (x,)

        return step

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set where image-to-image begins and where inpainting continues, counted in computed steps."""
        self.check_start(begin_index)
        if hasattr(self.own, "set_begin_index"):
            self.own.set_begin_index(begin_index)

    def add_noise(self, original_samples, noise, timesteps):
        """Add noise as the original scheduler does; video-to-video asks for it at the step where it begins."""
        self.check_start(0 if len(timesteps) and timesteps[0] == self.own.timesteps[0] else 1)
        return self.own.add_noise(original_samples, noise, timesteps)

    def warn_of_drift(self) -> None:
        """Warn once, at the end of a run that is unlike those of the plan's calibration."""
        run = self.run
        if self.on_drift != "warn" or self.warned or run.monitor is None or run.following < len(run.times):
            return
        drift = max((reading.drift for reading in run.monitor.readings()), default=0.0)
        if drift > run.monitor.limit(self.drift_limit):
            self.warned = True
            text = (
                f"drift {drift:.2g}, the calibration prompts reach {run.monitor.calibrated.max():.2g}: the plan was not"
            )
            remedy = 'calibrate one with prompts and settings like these, or enable it with on_drift="compute"'
            warnings.warn(f"{text} made for a run like this one, quality may be lower; {remedy}", stacklevel=4)

    def check_start(self, place: int) -> None:
        """Refuse a pipeline that counts its start in T steps, of which it sees only N."""
        if place > 0 and self.counts_all and self.run.computed == 0:
            counts = f"its start in {self.plan.steps} steps, the plan computes {len(self.run.times)}"
            remedy = "give it strength=1, or sigmas where its call takes them, or disable the plan"
            raise PlanError(f"the pipeline counts {counts}: {remedy}")
