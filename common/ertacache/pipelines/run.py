"""One call of a pipeline that follows a plan: the plan on this run's grid, and the run's state."""

import time

import torch

from ertacache.algorithm import rectify, residual, reuse
from ertacache.numerics.jump import jump
from ertacache.numerics.schedulers import FlowMatching, VPrediction
from ertacache.plans.drift import Monitor
from ertacache.plans.plan import Plan
from ertacache.utils.errors import UserError


class PlannedRun:
    """The plan on one run's grid. A place counts the computed steps, 0 … N−1.

    Args:
        solver: The pipeline's, on the T steps of this run.
        plan: What to follow.
        compute_beyond: Factor on the worst calibration prompt's prediction error (drift.py), beyond which the run falls
            back to the full schedule until the plan's next computed step, by the pipeline's own solver. None: never.
    """

    def __init__(self, solver: FlowMatching | VPrediction, plan: Plan, compute_beyond: float | None = None):
        self.solver, self.plan, self.compute_beyond = solver, plan, compute_beyond
        self.sigmas = plan.grid(solver.sigmas)  # [T+1]
        self.all_times = solver.times_on(self.sigmas)  # [T]
        self.row_of = {start: row for row, start in enumerate(plan.computed)}  # computed step → its row of the weights
        self.weights = plan.weights_on(self.sigmas) if plan.kind == "budget" else None
        self.monitor = Monitor(plan) if plan.has_drift else None
        self.following = 0  # the place that comes next
        self.history: list[torch.Tensor] = []  # the newest velocities, newest first
        self.step = None  # a threshold plan's solver, with its history
        self.shadow = solver.shadow() if compute_beyond is not None else None
        self.extendable = self.in_fallback = self.was_in_fallback = False
        self.computed, self.uncached = 0, 0.0  # steps made, and uncached steps in their place
        self.clock: list[float] = []  # seconds at each computed step
        self.show([*plan.computed, len(self.all_times)])

    def show(self, ends: list[int]) -> None:
        """Let the pipeline see these steps only. ends: from each computed step to the next, the last to the data."""
        self.ends, scheduler = ends, self.solver.scheduler
        scheduler.timesteps = self.all_times[ends[:-1]]  # [N]
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = self.sigmas[ends]  # [N+1]
        self.times = scheduler.timesteps.tolist()

    def place_of(self, timestep) -> int:
        """Return the place of a timestep; of two with one timestep (UniPC rounds them), the one that comes next."""
        first = timestep.flatten()[0] if getattr(timestep, "ndim", 0) else timestep
        t = first.item() if isinstance(first, torch.Tensor) else float(first)
        places = [place for place, known in enumerate(self.times) if known == t]
        if not places:
            raise UserError(f"the pipeline steps at time {t:g}, none of this run's {len(self.times)}: disable the plan")
        return self.following if self.following in places else places[0]

    def advance(self, place: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return the latents before the next computed step, from those before this one and its velocity."""
        self.clock.append(time.perf_counter())  # finding the place has waited for the device
        if place != self.following:
            self.history, self.step = [], None
        if self.monitor and self.ends[place] in self.row_of:
            self.monitor.see(self.row_of[self.ends[place]], v, self.history)
            self.enter_or_leave_fallback(place)
        start, end = self.ends[place : place + 2]
        if self.weights is None:
            x = self.reuse(start, end, x, v)
        elif not self.extendable:
            x = self.jump(self.row_of[start], x, v)
        else:
            x = self.jump_or_step(place, x, v)
        self.computed, self.following = self.computed + 1, place + 1
        self.uncached += self.plan.steps * (end - start) / len(self.all_times)
        if self.following == len(self.times):  # cached tensors die with the run
            self.history, self.step, self.shadow = [], None, None
        return x

    def enter_or_leave_fallback(self, place: int) -> None:
        """Decide at a planned step; in fallback, every step up to the plan's next one is computed."""
        self.was_in_fallback = self.in_fallback
        self.in_fallback = self.extendable and self.monitor.beyond(self.compute_beyond)
        if self.in_fallback:
            start, end = self.ends[place : place + 2]
            self.show([*self.ends[: place + 1], *range(start + 1, end), *self.ends[place + 1 :]])

    def jump_or_step(self, place: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return the plan's jump, or in fallback a step of the shadow scheduler, which follows along for its history.

        Entering fallback first applies the stored correction.
        """
        row = self.row_of.get(self.ends[place])
        jumped = None if row is None else self.jump(row, x, v)  # keeps the velocity for later jumps
        if self.in_fallback and not self.was_in_fallback and row is not None:
            x = jump(x, self.history, self.plan.repair[row], self.plan.repair_scale[row])
        stepped = self.shadow(self.sigmas, self.all_times, place, self.ends, x, v)
        return stepped if self.in_fallback else jumped

    def jump(self, row: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return a budget plan's jump, or the solver's first-order one where a run that began late lacks history."""
        self.history = [v, *self.history][: self.plan.history_length]
        weights, scale, start = self.weights[row], self.plan.scale[row], self.plan.computed[row]
        if any(weights[len(self.history) :]):
            end = next((step for step in self.row_of if step > start), len(self.all_times))
            scale, *weights = self.solver.first_order(*self.sigmas[[start, end]])
        elif self.was_in_fallback:  # these latents need no correction: take it out of the jump
            scale = scale / self.plan.repair_scale[row]
            weights = [w - scale * r for w, r in zip(weights, self.plan.repair[row], strict=True)]
        return jump(x, self.history, weights, scale)

    def reuse(self, start: int, end: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Make a threshold plan's computed step and the cached ones after it, by the pipeline's own solver."""
        self.step = self.step or self.solver.stepper(self.sigmas, self.all_times, start)
        r = residual(v, x)  # Eq. 5
        for i in range(start, end):
            if i > start:
                v = reuse(x, r)  # Eq. 6
                v = rectify(v, self.plan.k[i], self.plan.b[i]) if self.plan.rectified else v  # Eq. 15
            x = self.step(i, x, v)
        return x
