"""The search for the schedule of a budget plan: which rollouts are made, in which order, and what Ctrl-C leaves."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ertacache.calibration import planner
from ertacache.calibration.planner import Schedule
from ertacache.plans.budget import BudgetPlan
from ertacache.plans.plan import Plan

if TYPE_CHECKING:
    from ertacache.calibration.budget import BudgetCalibration, Rollout

HISTORY_LENGTHS = (5, 3)  # values of H: the first for all candidates, the other for the best


class Search:
    """The rollouts of one budget, one by one: iterate over it.

    First the candidate schedules, each with the first of `HISTORY_LENGTHS`, then the best of them with the others, then
    a local search: schedules near the best one, those first that share most of its model calls.

    Args:
        calibration: Rolls out.
        candidates: Schedules by name, the most promising first.
        rollouts: At most so many.

    Attributes:
        best: The rollout with the least error so far; None before the first one.
        chosen: Its name: that of the candidate from which it was found.
        errors: By name.
        budget: N.
        tried: (schedule, H) of the rollouts.
    """

    def __init__(self, calibration: "BudgetCalibration", candidates: dict[str, Schedule], rollouts: int):
        self.calibration, self.candidates, self.rollouts = calibration, candidates, rollouts
        self.best: Rollout | None = None
        self.budget = len(next(iter(candidates.values())))
        self.chosen, self.errors, self.tried = "", {}, set()

    def __iter__(self):
        bar, end = self.calibration.session.bar, self.calibration.end
        bar.set_description(f"calibrate N={self.budget}")
        for name, schedule in list(self.candidates.items())[: self.rollouts]:
            self.roll_out(schedule, HISTORY_LENGTHS[0], name)
            yield
        for history_length in HISTORY_LENGTHS[1:]:
            if len(self.tried) < self.rollouts:
                self.roll_out(self.best.schedule, history_length, f"{self.chosen}, H = {history_length}")
                yield
        while len(self.tried) < self.rollouts:
            length = self.best.history_length
            near = [s for s in planner.neighbours(self.best.schedule, end) if (s, length) not in self.tried]
            if not near:
                break
            self.roll_out(near[0], length)
            yield

    def roll_out(self, schedule: Schedule, history_length: int, name: str | None = None) -> None:
        """Roll a schedule out and keep the better rollout. name: of a candidate; None in the local search."""
        rollout = self.calibration.rollout(schedule, history_length, like=self.best)
        self.tried.add((schedule, history_length))
        if self.best is None or rollout.error < self.best.error:
            self.best, self.chosen = rollout, name or self.chosen
            name = name or "after local search"
        if name:
            self.errors[name] = rollout.error


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a calibration that has a plan already.

    Attributes:
        plan: The best so far.
    """

    def __init__(self, plan: BudgetPlan):
        super().__init__()
        self.plan = plan


def keep_unfinished(plan: Plan, path: Path) -> None:
    """Save the best plan so far of an interrupted calibration, and say so; never over a finished one."""
    if path.exists() and is_finished(Plan.load(path)):
        return
    rollouts = plan.provenance["calibration"]["rollouts"]
    print(f"kept the best plan of {rollouts} schedules so far: {plan.save(path)}", file=sys.stderr)


def is_finished(plan: Plan) -> bool:
    """Return whether a plan is not the best of a calibration that was interrupted."""
    return plan.provenance.get("calibration", {}).get("finished", True)
