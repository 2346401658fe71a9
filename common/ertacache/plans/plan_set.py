"""Plans for several speed-ups of one model and setting, between which a pipeline switches."""

from collections.abc import Mapping
from pathlib import Path

from ertacache.plans.hub import HubMixin
from ertacache.plans.names import budget_of, check_speedups
from ertacache.plans.plan import Plan
from ertacache.utils.errors import PlanError, UserError, shown
from ertacache.utils.files import path_of


class PlanSet(HubMixin, dict):
    """{speed-up: plan}, in the order of speed-ups, for one number of steps T.

    A folder or repository of a set holds the plan of the least speed-up as plan.json, so that `Plan.from_pretrained`
    reads it, and others as plan-N.json, by their number of computed steps.

    Args:
        plans: By speed-up, a number of at least 1.

    Raises:
        UserError: No plan at all, a key that is no speed-up, or a value that is no plan.
        PlanError: Plans for different numbers of steps.

    Example:
        >>> plans = ertacache.calibrate(pipe, prompts, speedups=[2, 3])
        >>> ertacache.enable(pipe, plans)
        >>> ertacache.speedup(pipe, 3)
    """

    def __init__(self, plans: Mapping[float, Plan]):
        if not isinstance(plans, Mapping):
            raise UserError(f"plans = {shown(plans)}: give {{speed-up: plan}}")
        if not plans:
            raise UserError("a set of plans without any: give at least one")
        check_speedups(list(plans), "plans: key")
        for plan in plans.values():
            if not isinstance(plan, Plan):
                raise UserError(f"{shown(plan)} in a set of plans: give plans")
        steps = {plan.steps for plan in plans.values()}
        if len(steps) > 1:
            raise PlanError(f"plans for {' and '.join(map(str, sorted(steps)))} steps cannot be one set: give one T")
        super().__init__(sorted(plans.items()))

    @property
    def members(self) -> list[Plan]:
        """The plans, each once, that of the least speed-up first."""
        return list({plan.nfe: plan for plan in reversed(self.values())}.values())[::-1]

    @property
    def first(self) -> Plan:
        """The plan of the least speed-up."""
        return next(iter(self.values()))

    def at(self, speedup: float, name: str = "speedup =") -> Plan:
        """Return the plan of a speed-up, or the one that computes as many steps. name: of the speed-up in a refusal.

        Raises:
            UserError: The set has none.
        """
        check_speedups([speedup], name)
        if speedup in self:
            return self[speedup]
        budget = budget_of(self.first.steps, speedup, name)
        plan = next((plan for plan in self.values() if plan.nfe == budget), None)
        if plan is None:
            known = ", ".join(f"{key:g}" for key in self)
            raise UserError(f"{name} {speedup:g}: the plans are for {known}; give one of them, or calibrate it")
        return plan

    def save(self, path: str | Path) -> Path:
        """Write the plan of the least speed-up to `path` (….json), and the others beside it. Returns the path."""
        path, (first, *others) = path_of(path, "path"), self.members
        for plan in others:
            plan.save(path.with_name(f"{path.stem}-{plan.nfe}.json"))
        return first.save(path)

    @classmethod
    def load(cls, path: str | Path) -> "PlanSet":
        """Read a plan, and those that `save` has written beside it, by their own speed-ups T/N."""
        path = path_of(path, "path")
        others = sorted(other for other in path.parent.glob(f"{path.stem}-*.json"))
        plans = [Plan.load(file) for file in (path, *others)]
        return cls({plan.speedup: plan for plan in plans})
