"""What a pipeline with a plan has done: computed and skipped steps, time saved, drift."""

from dataclasses import dataclass

from ertacache.pipelines.course import Course
from ertacache.pipelines.enabled import Enabled, enabled_of
from ertacache.plans.drift import Reading
from ertacache.utils.words import counted


@dataclass(frozen=True)
class Summary:
    """Computed and skipped steps since `enable`; `str` is human-readable.

    Attributes:
        plan: Title of the plan of the last call, or of the one to come; "none" where it is uncached.
        steps: T.
        calls: Times that the pipeline has run through the steps. A pipeline that makes a video in segments does so for
            each of them; several schedulers that step together count once.
        computed, skipped: Steps of the last call; skipped ones are counted from where the call began.
        all_computed, all_skipped: Steps of all calls.
        seconds_per_step: Median time of a computed step of the last call; None before the second one.
        speedup: Of the last call's loop, against as many steps that all take this time; None until it has ended.
        drift: Of each sample of the last call, 1 as at calibration; () where the plan has none (drift.py).
    """

    plan: str
    steps: int
    calls: int
    computed: int
    skipped: int
    all_computed: int
    all_skipped: int
    seconds_per_step: float | None
    speedup: float | None
    drift: tuple[Reading, ...] = ()

    @property
    def seconds_saved(self) -> float | None:
        """Skipped steps of the last call × the time of a computed one."""
        return None if self.seconds_per_step is None else self.skipped * self.seconds_per_step

    def __str__(self) -> str:
        if not self.calls:
            return f"plan {self.plan} for {self.steps} steps: no call yet"
        every = f"{counted(self.calls, 'call')}, {self.all_computed} computed, {self.all_skipped} skipped"
        return f"plan {self.plan} for {self.steps} steps. Last call: {self.last_call}. All: {every}."

    @property
    def last_call(self) -> str:
        """The last call in words."""
        parts = [f"{counted(self.computed, 'step')} computed, {self.skipped} skipped"]
        if self.seconds_per_step is not None:
            parts.append(f"{self.seconds_per_step:.3g} s per computed step")
        if self.speedup is not None and self.skipped:
            parts.append(f"{self.speedup:.2f}× faster than {self.computed + self.skipped} such steps")
        if self.drift:
            worst = max(self.drift, key=lambda reading: reading.drift)
            parts.append(f"drift {worst.drift:.2f} (above {worst.percentile:.0f} % of the calibration)")
        return ", ".join(parts)


def summary(pipe) -> Summary:
    """Count what an enabled pipeline has done.

    Args:
        pipe: A pipeline that follows a plan.

    Returns:
        Computed and skipped steps of the last call and of all calls since `enable`, time and drift of the last call.

    Raises:
        UserError: The pipeline follows no plan.

    Example:
        >>> print(ertacache.summary(pipe))
    """
    enabled = enabled_of(pipe)
    return summary_of(enabled.last, enabled)


def summary_of(course: Course | None, enabled: Enabled) -> Summary:
    """Return the summary of a course, the last of those that have followed `enabled`."""
    plan = course.plan if course else enabled.plan
    calls, computed, skipped = enabled.counts()
    return Summary(
        plan=plan.title if plan else "none",
        steps=course.steps if course else enabled.plans.first.steps,
        calls=calls,
        computed=course.computed if course else 0,
        skipped=course.skipped if course else 0,
        all_computed=computed,
        all_skipped=skipped,
        seconds_per_step=course.clock.per_step if course else None,
        speedup=course.speedup if course else None,
        drift=course.monitor.readings() if course and course.monitor else (),
    )
