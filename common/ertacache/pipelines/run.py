"""One scheduler's way through one call of a pipeline that follows a plan."""

import threading

import torch

from ertacache.numerics.finite import FiniteCheck
from ertacache.numerics.schedulers import solver_of
from ertacache.pipelines.conditions import steps_under_way
from ertacache.pipelines.enabled import Enabled
from ertacache.plans.schema import check_levels
from ertacache.utils.errors import UserError


class PlannedRun:
    """The T steps of one scheduler in one call. It is before its first step, at step `next`, or at its end.

    Args:
        scheduler: On its T steps.
        enabled: What to follow.
        shown: Whether the scheduler shows the plan's grid already, as a copy made during a call does.
    """

    def __init__(self, scheduler, enabled: Enabled, shown: bool = False):
        self.scheduler, self.enabled = scheduler, enabled
        self.solver, self.steps = solver_of(scheduler), len(scheduler.timesteps)
        native = self.solver.sigmas
        self.native = native.tolist()  # [T+1]
        described = {**scheduler.config, "class": type(scheduler).__name__}
        check_levels(self.native, described)
        self.plan = enabled.plan
        levels, self.planned = enabled.on(native)
        self.shows_own_grid = levels is native
        if not (self.shows_own_grid or shown):
            self.solver.show(levels)
        self.next: int | None = None
        self.due: int | None = None  # where it begins, if the scheduler does not know
        self.finite = FiniteCheck()
        self.course = enabled.join(self, begun=shown)

    @property
    def leads(self) -> bool:
        """Whether it was the first to step in its call: it decides, others follow."""
        return self.course.leader is self

    @property
    def grid(self) -> torch.Tensor:
        """The noise levels that the scheduler shows, [T+1]."""
        return self.solver.sigmas

    def step(self, x: torch.Tensor, v: torch.Tensor, timestep, options: dict) -> torch.Tensor:
        """Make the step at this timestep, from latents and the model's output.

        Args:
            x: Latents, [B, …].
            v: Model output; not looked at on skipped steps.
            timestep: A number, or a tensor whose first element is it.
            options: Further arguments of the scheduler's step.

        Raises:
            UserError: A step that is not due, or of another request.
        """
        if self.course.thread != threading.get_ident():
            remedy = "give each request a pipeline with a scheduler of its own: copy.deepcopy(pipe.scheduler)"
            raise UserError(f"another request began on this scheduler before this one had ended: {remedy}")
        i = self.index_of(timestep)
        if self.next is None:
            self.begin(i)
        elif i != self.next:
            raise UserError(f"the pipeline makes step {i} where step {self.next} is due: disable the plan")
        computes = self.course.computes(i)
        if self.leads and computes:
            self.finite.see(i, x, v)
        self.missed = not computes and self.course.outputs.step != i
        x = self.way.step(i, x, v, options)
        if self.leads:
            self.course.clock.tick(computes)
        self.next = i + 1
        if hasattr(self.scheduler, "_step_index"):
            self.scheduler._step_index = self.next
        if self.next == self.course.end:
            self.end(x)
        return x

    def index_of(self, timestep) -> int:
        """Return the step at a timestep; of two with one timestep (UniPC rounds them), the one that comes next."""
        if self.next is None:
            self.times = self.scheduler.timesteps.tolist()
        first = timestep.flatten()[0] if getattr(timestep, "ndim", 0) else timestep
        t = first.item() if isinstance(first, torch.Tensor) else float(first)
        places = [i for i, known in enumerate(self.times) if known == t]
        if not places:
            raise UserError(f"the pipeline steps at time {t:g}, none of this run's {self.steps}: disable the plan")
        due = getattr(self.scheduler, "begin_index", self.due) if self.next is None else self.next
        return due if due in places else places[0]

    def begin(self, i: int) -> None:
        """Begin at step i, on the noise levels that the scheduler shows now."""
        self.next = i
        if self.course.leader is None:
            self.course.leader, self.course.begin = self, i
            self.course.end = i + steps_under_way(self.enabled.pipe(), self.scheduler.timesteps[i:].tolist())
            self.enabled.begin(self.course)
        self.levels = self.grid.tolist()  # [T+1]
        self.way = self.enabled.steps_of(self)

    def end(self, x: torch.Tensor) -> None:
        """Let go of the tensors that the run has kept.

        Raises:
            UserError: The run has led to latents that are not finite.
        """
        self.way.end(x)
        if self.course.is_over:
            self.course.outputs = None
            self.enabled.end(self.course)
        remedy = "look whether it does so without a plan too (ertacache.disable(pipe)), and try another dtype"
        self.finite.end(x, remedy)
