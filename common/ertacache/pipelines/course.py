"""The course of one call of a pipeline: which steps it computes, and where it stands."""

import statistics
import threading
import time
import weakref
from collections.abc import Sequence

import torch

from ertacache.pipelines.block_residuals import BlockResiduals
from ertacache.pipelines.outputs import Outputs
from ertacache.utils.errors import UserError


class Course:
    """Which of T steps one call of a pipeline computes. All schedulers that step in the call share it.

    A call begins at step 0, or later at `strength` < 1, and ends at step T, or earlier at `denoising_end` < 1. It
    computes the step at which it begins, every step before the plan's first one and from where the plan ends, the
    plan's steps, and the steps that drift adds.

    Args:
        steps: T.
        planned: The plan's computed steps, ascending.
        outputs: What it keeps of its model calls.
        plan: That it follows.
        within: The course of this thread that was under way, where the call is made by a callback of another.
    """

    def __init__(
        self,
        steps: int,
        planned: Sequence[int],
        outputs: Outputs | BlockResiduals,
        plan=None,
        within: "Course | None" = None,
    ):
        self.plan = plan
        self.within = (lambda: None) if within is None else weakref.ref(within)  # its run keeps it
        self.steps, self.planned = steps, tuple(planned)
        self.plan_ends = getattr(plan, "end", 0) or steps
        self.thread = threading.get_ident()
        self.runs = []  # of the schedulers that step in this call
        self.leader = None  # the first of them to step
        self.begin: int | None = None  # the first step
        self.end = steps  # the step after the last
        self.added: set[int] = set()  # steps that drift has had computed
        self.replayed: frozenset[int] = frozenset()  # computed steps whose velocities are known (calibration)
        self.monitor = None  # of the drift (plans/drift.py)
        self.drifting = self.drifted = False  # whether the last planned step was beyond the limit, and the one before
        self.looked = False  # whether its first model call was compared with the plan's conditions
        self.clock = Clock()
        self.times = CallTimes()
        self.outputs = outputs

    @property
    def step(self) -> int | None:
        """The step whose model calls come next: None before the first one, `end` after the last."""
        return min((run.next for run in self.runs if run.next is not None), default=None)

    @property
    def is_over(self) -> bool:
        """Whether all of its steps have been made."""
        return self.step == self.end

    @property
    def skips(self) -> bool:
        """Whether the model calls that come next are skipped."""
        step = self.step
        return step is not None and step < self.end and (not self.computes(step) or step in self.replayed)

    @property
    def computed(self) -> int:
        """Number of computed steps so far."""
        return len(self.clock.computed)

    @property
    def skipped(self) -> int:
        """Number of skipped steps so far."""
        return 0 if self.begin is None else self.step - self.begin - self.computed

    @property
    def speedup(self) -> float | None:
        """Speed-up of the call's loop against as many computed steps; None until it has ended."""
        return self.clock.speedup(self.end - self.begin) if self.is_over else None

    def takes(self, args: tuple, kwargs: dict) -> bool:
        """Return whether a model call belongs to this course."""
        return not self.is_over and self.times.belong(self, args, kwargs)

    def note_drift(self, i: int, beyond: bool) -> None:
        """Note at planned step i whether the run is beyond its limit; if so, the steps up to the next are computed."""
        self.drifted, self.drifting = self.drifting, beyond
        if beyond:
            self.added.update(range(i + 1, self.after(i)))

    def computes(self, i: int) -> bool:
        """Return whether step i is computed."""
        is_outside = i == self.begin or i < self.planned[0] or i >= self.plan_ends
        return is_outside or i in self.planned or i in self.added

    def after(self, i: int) -> int:
        """Return the next computed step after step i, which a call may end before; T after the last."""
        return next((k for k in range(i + 1, self.steps) if self.computes(k)), self.steps)


class Clock:
    """Seconds of the steps of a course, by the clock of the host."""

    def __init__(self):
        self.last: float | None = None  # when the last step ended
        self.computed: list[float | None] = []  # of each computed step; None for the first, before which nothing ended
        self.skipped = 0.0  # of all skipped steps

    def tick(self, computed: bool) -> None:
        """Note the end of a step."""
        now = time.perf_counter()
        seconds = None if self.last is None else now - self.last
        self.last = now
        if computed:
            self.computed.append(seconds)
        else:
            self.skipped += seconds

    @property
    def per_step(self) -> float | None:
        """Median time of a computed step, which that of the first one is taken to be; None where it is the only one."""
        known = [seconds for seconds in self.computed if seconds is not None]
        return statistics.median(known) if known else None

    def speedup(self, steps: int) -> float | None:
        """Return the speed-up of a call over so many steps, against as many computed ones."""
        one = self.per_step
        return None if one is None else steps * one / (len(self.computed) * one + self.skipped)


class CallTimes:
    """Tells by their times the model calls of a course from others.

    There are others where a call of the pipeline was broken off on a skipped step, and another pipeline without a plan
    uses its models.
    """

    def __init__(self):
        self.step, self.time = None, 0.0  # of the last call
        self.way = 0.0  # above 0 where the times of models and scheduler fall together
        self.left = False  # whether the course is over, since others call the models

    def belong(self, course: Course, args: tuple, kwargs: dict) -> bool:
        """Return whether a call belongs to its course: on skipped steps times must not go back.

        Raises:
            UserError: A call at another time than the one before it on the same skipped step.
        """
        step, skips, time = course.step, course.skips, time_of(args, kwargs)
        if self.left or time is None or (step is not None and not skips and course.after(step) == step + 1):
            return not self.left
        if skips and step == self.step and time != self.time:
            text = "a model was called twice on a step that the plan skips: a request that was broken off is in the way"
            raise UserError(f"{text}, call ertacache.enable again")
        if None not in (step, self.step) and step != self.step:
            times = course.leader.times
            way = (times[step] - times[self.step]) * (time - self.time)
            self.left = skips and way * self.way < 0
            self.way = self.way or way
        self.step, self.time = 0 if step is None else step, time
        return not self.left


def time_of(args: tuple, kwargs: dict) -> float | None:
    """Return the largest time that a model call is given, in the model's unit; None where it is not found."""
    time = kwargs.get("timestep", args[1] if len(args) > 1 else None)
    is_time = isinstance(time, torch.Tensor) and time.ndim <= 2 and time.numel() > 0
    return time.max().item() if is_time else None
