"""Which noise levels a plan's computed steps are at, and which steps given noise levels stand for.

ComfyUI's SIGMAS of a plan hold the noise levels of the computed steps alone and the last one, [M+1], so that previews
and progress bar count model calls. A run at denoise < 1 begins at a later step b of the plan's T. It computes b, and
the plan's steps after it.
"""

from collections.abc import Sequence

from ertacache.pipelines.levels import LEVEL_TOLERANCE
from ertacache.plans.budget import BudgetPlan
from ertacache.plans.plan import Plan
from ertacache.utils.errors import PlanError, UserError, shown

CONNECT = "connect the Sigmas (ERTACache) node of this plan"


def check_kind(plan: Plan) -> BudgetPlan:
    """Return the plan, unless a sampler function cannot follow one of its kind.

    Raises:
        PlanError: A threshold plan, or one of a call that ends early.
    """
    if not isinstance(plan, BudgetPlan):
        raise PlanError(f"a {getattr(plan, 'kind', shown(plan))} plan cannot be a sampler: give a budget plan")
    if plan.end:
        text = f"the plan is for the steps from {plan.begin} to {plan.end} of {plan.steps} alone"
        raise PlanError(f"{text}: give one of a whole run")
    return plan


def computed_from(plan: BudgetPlan, begin: int) -> list[int]:
    """Return the computed steps of a run that begins at step `begin` of the plan's T."""
    return [begin, *(step for step in plan.on_native if step > begin)]


def sigmas_of(plan: BudgetPlan, denoise: float = 1.0) -> list[float]:
    """Return the noise levels of a run's computed steps, and the last one, [M+1].

    Args:
        plan: To follow.
        denoise: Share of the T steps that the run makes, above 0 and at most 1, as `strength` in diffusers; 1 is all of
            the plan's calibration.

    Raises:
        UserError: A share that is none, or one that begins before the plan.
    """
    if not 0 < denoise <= 1:
        raise UserError(f"denoise = {denoise:g}: give a number above 0 and at most 1")
    begin = plan.begin if denoise == 1 else int(max(plan.steps - plan.steps * denoise, 0))
    if begin < plan.begin:
        text = f"denoise = {denoise:g}: the plan begins at step {plan.begin} of {plan.steps}"
        raise PlanError(f"{text}: give at most {1 - plan.begin / plan.steps:g}")
    return _levels(plan, begin)


def begin_of(plan: BudgetPlan, sigmas: Sequence[float]) -> int:
    """Return the step of the plan's T at which a run on noise levels [M+1] begins.

    Raises:
        PlanError: They are not those of the plan's computed steps, from any step on.
    """
    check_kind(plan)
    grids = {begin: _levels(plan, begin) for begin in range(plan.begin, plan.steps)}
    grids = {begin: levels for begin, levels in grids.items() if len(levels) == len(sigmas)}
    if not grids:
        text = f"the sigmas have {len(sigmas) - 1} steps, the plan computes {plan.nfe} of {plan.steps}"
        raise PlanError(f"{text}: {CONNECT}")
    begin = min(grids, key=lambda step: abs(grids[step][0] - sigmas[0]))
    check_levels(sigmas, grids[begin], CONNECT)
    return begin


def check_levels(sigmas: Sequence[float], expected: Sequence[float], remedy: str) -> None:
    """Refuse noise levels that are not those of a plan, both [M+1].

    Raises:
        PlanError: With the first one that differs.
    """
    for i, (sigma, level) in enumerate(zip(sigmas, expected, strict=True)):
        if not abs(sigma - level) <= LEVEL_TOLERANCE * max(expected):
            raise PlanError(f"sigma {sigma:.4g} at step {i}, {level:.4g} in the plan: {remedy}")


def _levels(plan: BudgetPlan, begin: int) -> list[float]:
    levels = plan.calibrated_levels()
    return [levels[step] for step in (*computed_from(plan, begin), plan.steps)]
