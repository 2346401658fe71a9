"""One call of a pipeline that follows a plan: the plan on this run's grid, and what the run remembers."""

import time

import torch

from ertacache.algorithm import rectify, residual, reuse
from ertacache.numerics.jump import jump
from ertacache.numerics.schedulers import Flow, Rotation
from ertacache.plans.drift import Monitor
from ertacache.plans.plan import Plan
from ertacache.utils.errors import UserError


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
