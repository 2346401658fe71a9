"""A scheduler that follows a plan in a stock diffusers pipeline.

A pipeline asks its scheduler for timesteps, calls the model once at each, and lets the scheduler step. So a plan needs
nothing but a scheduler that names the computed steps only, and steps from each of them to the next. Nothing is hooked
into the model: guidance, ControlNet, LoRA, adapters, offload and compilation stay what they are.
"""

import functools
import inspect
import time
import warnings
from collections.abc import Iterator

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from ertacache.algorithm import rectify, residual, reuse
from ertacache.conditions import Conditions
from ertacache.drift import LIMITS, Monitor
from ertacache.errors import PlanError, UserError
from ertacache.jump import jump
from ertacache.plan import Plan
from ertacache.schedulers import Flow, Rotation, check_scheduler, solver_of


class Run:
    """One call of a pipeline: the plan on this run's grid. Places count the computed steps, 0 … N−1.

    compute_beyond: where a prediction misses by more than this times the worst calibration prompt's (drift.py), all
    steps up to the plan's next one are computed, by the pipeline's own solver. None: never.
    """

    def __init__(self, solver: Flow | Rotation, plan: Plan, compute_beyond: float | None = None):
        self.solver, self.plan, self.compute_beyond = solver, plan, compute_beyond
        self.grid = plan.grid(solver.levels)
        self.all_times = solver.times_on(self.grid)
        self.planned = {start: row for row, start in enumerate(plan.computed)}  # computed step → its row of the weights
        self.weights = plan.weights_on(self.grid) if plan.kind == "budget" else None
        self.monitor = Monitor(plan) if getattr(plan, "predictor", ()) else None
        self.following, self.history, self.step = 0, [], None
        self.companion = solver.companion() if compute_beyond is not None else None
        self.extendable = self.off_plan = self.was_off = False
        self.computed, self.uncached, self.clock = 0, 0.0, []  # steps, uncached steps in their place, time at each
        self.show([*plan.computed, len(self.all_times)])

    def show(self, ends: list[int]) -> None:
        """Let the pipeline see these steps only. ends: from each computed step to the next, the last to the data."""
        self.ends, own = ends, self.solver.own
        own.timesteps = self.all_times[ends[:-1]]  # [N]
        if hasattr(own, "sigmas"):
            own.sigmas = self.grid[ends]  # [N+1]
        self.times = own.timesteps.tolist()

    def place_of(self, timestep) -> int:
        """The place that a timestep belongs to; of two with one timestep (UniPC rounds them), the one that follows."""
        first = timestep.flatten()[0] if getattr(timestep, "ndim", 0) else timestep
        t = first.item() if isinstance(first, torch.Tensor) else float(first)
        places = [place for place, known in enumerate(self.times) if known == t]
        if not places:
            raise UserError(f"the pipeline steps at time {t:g}, none of this run's {len(self.times)}: disable the plan")
        return self.following if self.following in places else places[0]

    def advance(self, place: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """From the latents before a computed step, and its velocity, to those before the next computed step."""
        self.clock.append(time.perf_counter())  # finding the place has waited for the device
        if place != self.following:
            self.history, self.step = [], None
        if self.monitor and self.ends[place] in self.planned:
            self.monitor.see(self.planned[self.ends[place]], v, self.history)
            self.leave_or_return(place)
        start, end = self.ends[place : place + 2]
        if self.weights is None:
            x = self.reuse(start, end, x, v)
        elif not self.extendable:
            x = self.jump(self.planned[start], x, v)
        else:
            x = self.jump_or_step(place, x, v)
        self.computed, self.following = self.computed + 1, place + 1
        self.uncached += self.plan.steps * (end - start) / len(self.all_times)
        if self.following == len(self.times):  # cached tensors die with the run
            self.history, self.step, self.companion = [], None, None
        return x

    def leave_or_return(self, place: int) -> None:
        """Off the plan, each step up to its next one is computed; at that one the run may return to it."""
        self.was_off, self.off_plan = self.off_plan, self.extendable and self.monitor.beyond(self.compute_beyond)
        if self.off_plan:
            start, end = self.ends[place : place + 2]
            self.show([*self.ends[: place + 1], *range(start + 1, end), *self.ends[place + 1 :]])

    def jump_or_step(self, place: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The plan's jump, or off the plan a step of the pipeline's own solver, which goes along to know the history.

        Leaving the plan begins with what the latents of this step usually lack.
        """
        row = self.planned.get(self.ends[place])
        jumped = None if row is None else self.jump(row, x, v)  # keeps the output for the jumps to come
        if self.off_plan and not self.was_off and row is not None:
            x = jump(x, self.history, self.plan.repair[row], self.plan.repair_scale[row])
        stepped = self.companion(self.grid, self.all_times, place, self.ends, x, v)
        return stepped if self.off_plan else jumped

    def jump(self, row: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """A budget plan's jump; the solver's own where a run that began in the middle lacks outputs for it."""
        self.history = [v, *self.history][: self.plan.anchors]
        weights, scale, start = self.weights[row], self.plan.scale[row], self.plan.computed[row]
        if any(weights[len(self.history) :]):
            end = next((step for step in self.planned if step > start), len(self.all_times))
            scale, *weights = self.solver.first_order(*self.grid[[start, end]])
        elif self.was_off:  # these latents lack nothing that the jump should repair
            scale = scale / self.plan.repair_scale[row]
            weights = [w - scale * r for w, r in zip(weights, self.plan.repair[row], strict=True)]
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


class GrowingTimes(torch.Tensor):
    """The times of a run [N], to which drift adds while a pipeline loops over them. What is made of it is a tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def of(cls, run: Run) -> "GrowingTimes":
        times = run.solver.own.timesteps.as_subclass(cls)
        times.run = run
        return times

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.run.extendable, place = True, 0
        while place < len(self.run.times):
            yield self.run.solver.own.timesteps[place]
            place += 1


class PlannedScheduler:
    """Stands in for a pipeline's own scheduler; whatever is not defined here, that one answers.

    To `isinstance` and `save_pretrained` its class is the own one's; `type()` tells them apart. All that belongs to a
    run begins with `set_timesteps`, so that no other call, finished or not, can reach into it. A copy has had no run.
    """

    def __init__(self, own, plan: Plan, on_drift: str = "warn", drift_limit: float | None = None):
        check_scheduler(own)
        self.own, self.plan, self.signature = own, plan, inspect.signature(own.step)
        self.on_drift, self.drift_limit, self.warned = on_drift, drift_limit, False
        self.run, self.counts_all, self.earlier = None, False, []  # earlier: (computed, uncached) of the runs before
        self.__module__ = type(own).__module__  # which save_pretrained writes down

    @property
    def __class__(self):
        return type(self.own)

    def __reduce__(self):
        return PlannedScheduler, (self.own, self.plan, self.on_drift, self.drift_limit)

    def __getattr__(self, name: str):
        return getattr(self.own, name)

    @property
    def timesteps(self) -> torch.Tensor:
        """The times of the computed steps; where drift may add some, a pipeline's loop over them sees those too."""
        grows = self.run is not None and self.run.compute_beyond is not None
        return GrowingTimes.of(self.run) if grows else self.own.timesteps

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
            factor = LIMITS["compute"] if self.drift_limit is None else self.drift_limit
            self.run = Run(solver_of(self.own), self.plan, factor if self.on_drift == "compute" else None)

        return set_timesteps

    @property
    def step(self):
        """From a computed step to the next. Same signature as the own scheduler's."""

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

    def warn_of_drift(self) -> None:
        """Once, at the end of a run that is not like those that the plan was calibrated on."""
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
        """Refuse a pipeline that set T steps by their number: it counts its start in them, but finds only N."""
        if place > 0 and self.counts_all and self.run.computed == 0:
            counts = f"its start in {self.plan.steps} steps, the plan computes {len(self.run.times)}"
            remedy = "give it strength=1, or sigmas where its call takes them, or disable the plan"
            raise PlanError(f"the pipeline counts {counts}: {remedy}")
