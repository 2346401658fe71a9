"""What one `enable` sets up: the stand-ins of a pipeline's scheduler and denoisers share it, and so do their copies."""

import threading
import warnings

import torch

from ertacache.numerics.schedulers import num_inference_steps_of
from ertacache.pipelines.block_residuals import BlockResiduals
from ertacache.pipelines.conditions import arguments_under_way, conditions_of, defaults_of, difference
from ertacache.pipelines.course import Course
from ertacache.pipelines.levels import other_levels
from ertacache.pipelines.outputs import Outputs
from ertacache.pipelines.steps import steps_of
from ertacache.plans.plan import Plan
from ertacache.plans.plan_set import PlanSet
from ertacache.plans.requirements import Requirements
from ertacache.utils.errors import UserError


class Enabled:
    """Plans that pipelines follow, and the calls in which they do.

    Every thread has a course of its own: so requests may share a model, as long as each has its own scheduler.

    Args:
        plans: What to choose from, the first of which is followed; None in a calibration.
        on_drift, drift_limit: As in `ertacache.enable`.
    """

    def __init__(self, plans: PlanSet | None, on_drift: str = "ignore", drift_limit: float | None = None):
        self.plans, self.on_drift, self.drift_limit = plans, on_drift, drift_limit
        self.chosen: Plan | None = plans.first if plans else None  # of threads that have not chosen
        self.pipe = lambda: None  # the pipeline, by a weak reference
        self.warned: set[str] = set()  # kinds of warnings that have been given
        self.here = threading.local()
        self.lock = threading.Lock()
        self.last: Course | None = None  # the last to begin stepping
        self.running: list[Course] = []  # that have stepped, and have not ended
        self.calls = self.computed = self.skipped = 0  # of those that have ended

    def __reduce__(self):
        return Enabled, (self.plans, self.on_drift, self.drift_limit)

    def __deepcopy__(self, memo) -> "Enabled":
        return self

    @property
    def plan(self) -> Plan | None:
        """The plan that the calls of this thread follow; None for uncached ones."""
        return getattr(self.here, "plan", self.chosen)

    def choose(self, plan: Plan | None) -> None:
        """Have the next calls of this thread follow a plan, and those of threads that have never chosen."""
        self.here.plan = self.chosen = plan

    def check(self, scheduler) -> None:
        """Refuse a scheduler that is set to other steps than the plan's, or is another one."""
        if self.plan is None:
            return
        steps = len(scheduler.timesteps)
        planned, given = (num_inference_steps_of(scheduler, number) for number in (self.plan.steps, steps))
        calibrate = f"ertacache.calibrate(pipe, prompts, num_inference_steps={given})"
        remedy = f"give num_inference_steps={planned}, or make a plan with {calibrate}"
        self.plan.check(Requirements.of_scheduler(scheduler, steps), remedy)

    def on(self, native: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Return the noise levels of a run [T+1] and its computed steps, for the scheduler's own levels."""
        return self.plan.on(native) if self.plan else (native, tuple(range(len(native) - 1)))

    def look(self, course: Course, args: tuple, kwargs: dict) -> None:
        """Warn, once of each, where a call's first model call shows other conditions or noise levels than the plan's.

        Args:
            course: Of the call.
            args, kwargs: Of the model call.
        """
        if course.looked or course.plan is None:
            return
        course.looked = True
        recorded = course.plan.requirements.settings
        present = arguments_under_way(self.pipe()) | conditions_of(args, kwargs)
        conditions = difference(recorded, present, defaults_of(self.pipe()))
        size = present.get("latents")
        is_sized_alike = size is not None and size == recorded.get("latents")
        levels = next(filter(None, (other_levels(run, is_sized_alike) for run in course.runs)), None)
        remedies = {"conditions": ", or calibrate a plan for it", "levels": ": calibrate one with these settings"}
        for kind, text in (("conditions", conditions), ("levels", levels)):
            if text and kind not in self.warned:
                self.warned.add(kind)
                warnings.warn(f"{text}{remedies[kind]}", stacklevel=4)

    def context(self, name: str) -> str:
        """Return the name under which diffusers' caches keep what belongs to a guidance branch."""
        return name

    def steps_of(self, run):
        """Return how a run steps."""
        return steps_of(run)

    @property
    def course(self) -> Course | None:
        """The newest course of this thread."""
        return getattr(self.here, "course", None)

    def join(self, run, begun: bool = False) -> Course:
        """Return the course that a run of this thread belongs to: a new one, or that of another scheduler of its call.

        Args:
            run: The run of one scheduler, over `run.steps` steps.
            begun: Whether it may join a course that has stepped, as a scheduler does that was copied during a call.
        """
        course = self.course
        fits = course is not None and course.steps == run.steps and course.plan is run.plan
        if not (fits and (course.step is None or (begun and course.step <= course.begin + 1))):
            self.end(course)
            outputs = BlockResiduals() if around_blocks(run.plan) else Outputs()
            course = self.here.course = Course(run.steps, run.planned, outputs, run.plan, within=course)
        course.runs = [other for other in course.runs if other.scheduler is not run.scheduler] + [run]
        return course

    def begin(self, course: Course) -> None:
        """Count a course that makes its first step."""
        with self.lock:
            self.last = course
            self.running.append(course)

    def end(self, course: Course | None) -> None:
        """Add up a course that has ended, or was left; a call that it was made within goes on."""
        if course is not None and course is self.course and course.is_over:
            self.here.course = course.within()
        with self.lock:
            if course in self.running:
                self.running.remove(course)
                self.calls += 1
                self.computed += course.computed
                self.skipped += course.skipped

    def counts(self) -> tuple[int, int, int]:
        """Return the number of courses that have stepped, and their computed and skipped steps."""
        with self.lock:
            computed = self.computed + sum(course.computed for course in self.running)
            skipped = self.skipped + sum(course.skipped for course in self.running)
            return self.calls + len(self.running), computed, skipped


def around_blocks(plan: Plan | None) -> bool:
    """Return whether models are called on skipped steps too, without their blocks."""
    return getattr(plan, "site", None) == "blocks"


def enabled_of(pipe) -> Enabled:
    """Return what a pipeline follows.

    Raises:
        UserError: It follows no plan.
    """
    enabled = getattr(getattr(pipe, "scheduler", None), "enabled", None)
    if not isinstance(enabled, Enabled):
        raise UserError(f"this {type(pipe).__name__} follows no plan: call ertacache.enable(pipe, plan) first")
    return enabled
