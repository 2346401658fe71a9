"""What an enabled pipeline has done: computed and skipped steps, time saved, drift."""

import statistics
from dataclasses import dataclass
from itertools import pairwise

from ertacache.pipelines.scheduler import PlannedScheduler
from ertacache.plans.drift import Reading
from ertacache.utils.errors import UserError


@dataclass(frozen=True)
class Summary:
    """What an enabled pipeline has done. `str` is for people.

    Steps of the last call and of all calls since `enable`: computed, and skipped (of T, from where the call began).
    seconds_saved: of the last call, skipped steps × the median time between two computed ones; None below two.
    drift: of each sample of the last call, 1 as at calibration; () where the plan has none (drift.py).
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
    """The computed and the skipped steps of a pipeline's last call, and of all since `enable`; and its drift."""
    planned = pipe.scheduler
    if type(planned) is not PlannedScheduler:
        raise UserError(f"this {type(pipe).__name__} follows no plan: call ertacache.enable(pipe, plan) first")
    run = planned.run
    counts = [] if run is None else [*planned.earlier, (run.computed, run.uncached)]
    computed, skipped = ([count[0] for count in counts], [round(count[1]) - count[0] for count in counts])
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
