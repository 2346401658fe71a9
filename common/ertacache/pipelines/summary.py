"""What a pipeline with a plan has done: computed and skipped steps, time saved, drift."""

import statistics
from dataclasses import dataclass
from itertools import pairwise

from ertacache.pipelines.scheduler import PlannedScheduler
from ertacache.plans.drift import Reading
from ertacache.utils.errors import UserError


@dataclass(frozen=True)
class Summary:
    """Computed and skipped steps since `enable`; `str` is human-readable.

    Attributes:
        plan: Title of the plan.
        steps: T.
        calls: Times that the pipeline has run through the steps. A pipeline that makes a video in segments does so for
            each of them; several schedulers that step together count once.
        computed, skipped: Steps of the last call; skipped ones are counted from where the call began.
        all_computed, all_skipped: Steps of all calls.
        seconds_saved: Skipped steps of the last call × the median time between two computed ones; None below two.
        drift: Of each sample of the last call, 1 as at calibration; () where the plan has none (drift.py).
    """

    plan: str
    steps: int
    calls: int
    computed: int
    skipped: int
    all_computed: int
    all_skipped: int
    seconds_saved: float | None
    drift: tuple[Reading, ...] = ()

    def __str__(self) -> str:
        if not self.calls:
            return f"plan {self.plan} for {self.steps} steps: no call yet"
        saved = "" if self.seconds_saved is None else f", about {self.seconds_saved:.3g} s saved"
        last = f"{self.computed} steps computed, {self.skipped} skipped{saved}"
        if self.drift:
            worst = max(self.drift, key=lambda reading: reading.drift)
            last += f", drift {worst.drift:.2f} (above {worst.percentile:.0f} % of the calibration)"
        every = f"{self.calls} calls, {self.all_computed} computed, {self.all_skipped} skipped"
        return f"plan {self.plan} for {self.steps} steps. Last call: {last}. All: {every}."


def summary(pipe) -> Summary:
    """Count what an enabled pipeline has done.

    Args:
        pipe: A pipeline that follows a plan.

    Returns:
        Computed and skipped steps of the last call and of all calls since `enable`, and the drift of the last call.

    Raises:
        UserError: The pipeline follows no plan.

    Example:
        >>> print(ertacache.summary(pipe))
    """
    if type(pipe.scheduler) is not PlannedScheduler:
        raise UserError(f"this {type(pipe).__name__} follows no plan: call ertacache.enable(pipe, plan) first")
    enabled = pipe.scheduler.enabled
    last, (calls, computed, skipped) = enabled.last, enabled.counts()
    times = [] if last is None else [b - a for a, b in pairwise(last.clock)]
    return Summary(
        plan=enabled.plan.title,
        steps=enabled.plan.steps,
        calls=calls,
        computed=last.computed if last else 0,
        skipped=last.skipped if last else 0,
        all_computed=computed,
        all_skipped=skipped,
        seconds_saved=last.skipped * statistics.median(times) if times else None,
        drift=last.monitor.readings() if last is not None and last.monitor else (),
    )
