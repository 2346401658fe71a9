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
        calls: Calls of the pipeline.
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
    planned = pipe.scheduler
    if type(planned) is not PlannedScheduler:
        raise UserError(f"this {type(pipe).__name__} follows no plan: call ertacache.enable(pipe, plan) first")
    run = planned.run
    counts = [] if run is None else [*planned.earlier, (run.computed, run.uncached)]
    computed = [made for made, _ in counts]
    skipped = [round(uncached) - made for made, uncached in counts]
    times = [] if run is None else [b - a for a, b in pairwise(run.clock)]
    return Summary(
        plan=planned.plan.title,
        steps=planned.plan.steps,
        calls=len(counts),
        computed=computed[-1] if counts else 0,
        skipped=skipped[-1] if counts else 0,
        all_computed=sum(computed),
        all_skipped=sum(skipped),
        seconds_saved=skipped[-1] * statistics.median(times) if times else None,
        drift=run.monitor.readings() if run is not None and run.monitor else (),
    )
