"""The search for the schedule of a budget plan: which rollouts are made, in which order, and what Ctrl-C leaves."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ertacache.calibration import planner
from ertacache.calibration.planner import Schedule
from ertacache.plans.budget import BudgetPlan
from ertacache.plans.plan import Plan
from ertacache.utils import parallel
from ertacache.utils.words import counted

if TYPE_CHECKING:
    from ertacache.calibration.budget import BudgetCalibration, Rollout

HISTORY_LENGTHS = (5, 3)  # values of H: the first for all candidates, the other for the best


class Search:
    """The rollouts of one budget, one by one: iterate over it.

    First the candidate schedules, each with the first of `HISTORY_LENGTHS`, then the best of them with the others, then
    a local search: schedules near the best one, those first that share most of its model calls. It ends before the
    first rollout that would exceed the limit, but not without any.

    Args:
        calibration: Rolls out.
        candidates: Schedules by name, the most promising first.
        limit: Of model calls per prompt. Calls that a rollout shares with the best one are free.

    Attributes:
        best: The rollout with the least error so far; None before the first one.
        chosen: Its name.
        errors: By name, that of the local search the least.
        budget: N.
        tried: (schedule, H) of the rollouts.
        left: Of the limit.
    """

    def __init__(self, calibration: "BudgetCalibration", candidates: dict[str, Schedule], limit: int):
        self.calibration, self.candidates, self.left = calibration, candidates, limit
        self.best: Rollout | None = None
        self.budget = len(next(iter(candidates.values())))
        self.chosen, self.errors, self.tried = "", {}, set()

    def __iter__(self):
        self.calibration.session.progress.begin(f"calibration, N = {self.budget}")
        for schedule, history_length, name in self.proposals():
            cost = parallel.share(self.calibration.cost(schedule, history_length, self.best))
            if cost > self.left and self.best is not None:
                return
            self.left = max(0, self.left - cost)
            self.roll_out(schedule, history_length, name)
            yield

    def proposals(self) -> Iterator[tuple[Schedule, int, str]]:
        """Yield (schedule, H, name) of each rollout."""
        for name, schedule in self.candidates.items():
            yield schedule, HISTORY_LENGTHS[0], name
        for history_length in HISTORY_LENGTHS[1:]:
            yield self.best.schedule, history_length, f"{self.chosen}, fitted with H = {history_length}"
        start = self.chosen
        while near := self.untried():
            yield near[0], self.best.history_length, f"{start}, local search"

    def untried(self) -> list[Schedule]:
        """Return the schedules near the best one that were not rolled out."""
        near, length = planner.neighbours(self.best.schedule, self.calibration.end), self.best.history_length
        return [schedule for schedule in near if (schedule, length) not in self.tried]

    def roll_out(self, schedule: Schedule, history_length: int, name: str) -> None:
        """Roll a schedule out and keep the better rollout."""
        rollout = self.calibration.rollout(schedule, history_length, like=self.best)
        self.tried.add((schedule, history_length))
        if self.best is None or rollout.error < self.best.error:
            self.best, self.chosen = rollout, name
        self.errors[name] = min(rollout.error, self.errors.get(name, rollout.error))


GOES_ON = "the same command goes on from the last finished batch"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a calibration that has a plan already.

    Attributes:
        plan: The best so far.
    """

    def __init__(self, plan: BudgetPlan):
        super().__init__(GOES_ON)
        self.plan = plan


@contextlib.contextmanager
def goes_on() -> Iterator[None]:
    """Have Ctrl-C in a calibration say that it can be resumed."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(GOES_ON) from stop


def keep_unfinished(plan: Plan, path: Path) -> None:
    """Save the best plan so far of an interrupted calibration, and say so; never over a finished one."""
    if path.exists() and is_finished(Plan.load(path)):
        return
    rollouts = plan.provenance["calibration"]["rollouts"]
    print(f"kept the best plan of {counted(rollouts, 'schedule')} so far: {plan.save(path)}", file=sys.stderr)


def is_finished(plan: Plan) -> bool:
    """Return whether a plan is not the best of a calibration that was interrupted."""
    return plan.provenance.get("calibration", {}).get("finished", True)
