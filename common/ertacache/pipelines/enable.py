"""Plans in stock diffusers pipelines: `enable(pipe, plan)`, `disable(pipe)`, `summary(pipe)`."""

import warnings
from pathlib import Path
from types import SimpleNamespace

from ertacache.pipelines.scheduler import PlannedScheduler
from ertacache.plans.drift import LIMITS
from ertacache.plans.names import HUB_ID
from ertacache.plans.plan import Plan
from ertacache.plans.requirements import Conditions
from ertacache.utils.errors import PlanError, UserError
from ertacache.utils.provenance import fingerprint

ON_DRIFT = (*LIMITS, "ignore")


def enable(pipe, plan: Plan | str | Path, *, on_drift: str = "warn", drift_limit: float | None = None) -> None:
    """Let a diffusers pipeline follow a plan in all of its calls, in place of one that it followed before.

    plan: a plan; the path of one, or of a directory with a plan.json; or a Hub id like OWNER/NAME. Only the pipeline's
    scheduler is replaced. A plan for another model or scheduler is a PlanError here, a call with another number of
    steps one before its first model call.

    on_drift: what is done where a run is unlike those of the calibration (drift.py). "warn": one warning, at the end of
    the first run whose drift is above drift_limit (default 1.25) × the largest of the calibration prompts. "compute":
    where the prediction of a computed step misses by more than drift_limit (default 2) × that of the worst calibration
    prompt, every step up to the plan's next one is computed, where the pipeline loops over all of its timesteps.
    "ignore": nothing. Plans without drift (threshold plans, and those of older releases) cannot "compute".
    """
    if on_drift not in ON_DRIFT:
        raise UserError(f"on_drift = {on_drift!r}: give one of {', '.join(map(repr, ON_DRIFT))}")
    if drift_limit is not None and not drift_limit > 0:
        raise UserError(f"drift_limit = {drift_limit}: give a number above 0")
    check_parts(pipe)
    plan, own = find(plan), own_scheduler(pipe)
    if plan.kind == "threshold" and plan.site == "blocks":
        raise PlanError(
            f"the plan ({plan.title}) caches around the blocks, a pipeline's scheduler sees outputs only: calibrate "
            "with --site output or --speedup"
        )
    if on_drift == "compute":
        _check_steps_can_be_added(pipe, plan)
    planned = PlannedScheduler(own, plan, on_drift, drift_limit)
    model = getattr(pipe.transformer, "_orig_mod", pipe.transformer)  # inside of torch.compile's wrapper
    settings = {"dtype": str(model.dtype).removeprefix("torch.")}
    run = Conditions.of(SimpleNamespace(transformer=model, scheduler=own), plan.steps, settings)
    plan.check(run, "calibrate one: ertacache.calibrate(pipe, prompts)")
    _warn_of_other_weights(plan, pipe)
    pipe.scheduler = planned


def _check_steps_can_be_added(pipe, plan: Plan) -> None:
    """Refuse on_drift="compute" where there is nothing to decide by, no grid to compute on, or no room for a step."""
    problem, remedy = None, "leave on_drift='compute' out"
    if getattr(pipe, "controlnet", None) is not None:
        problem = f"a {type(pipe).__name__} keeps lists of one entry a step, so that none can be added"
    elif not getattr(plan, "predictor", ()):
        problem = f"the plan ({plan.title}) has no drift to look at"
        remedy = "calibrate a budget plan anew, or " + remedy
    elif plan.sigmas:
        problem = f"the plan ({plan.title}) counts on a grid of its own, finer than the uncached run's"
    if problem is not None:
        raise PlanError(f"{problem}: {remedy}")


def disable(pipe) -> None:
    """Give a pipeline its own scheduler back, the same object; one that follows no plan is left as it is."""
    pipe.scheduler = own_scheduler(pipe)


def check_parts(pipe) -> None:
    for name in ("transformer", "scheduler"):
        if getattr(pipe, name, None) is None:
            raise UserError(f"a {type(pipe).__name__} without a {name} cannot follow a plan: load it with one")


def own_scheduler(pipe):
    """The scheduler that a pipeline was loaded with, whether or not it follows a plan."""
    return pipe.scheduler.own if type(pipe.scheduler) is PlannedScheduler else pipe.scheduler


def find(plan: Plan | str | Path) -> Plan:
    """A plan itself, or read from a file, a directory or the Hub."""
    if isinstance(plan, Plan):
        return plan
    path = Path(plan).expanduser()
    if path.is_dir() or (isinstance(plan, str) and not path.exists() and HUB_ID.fullmatch(plan)):
        return Plan.from_pretrained(plan)
    return Plan.load(path)


def _warn_of_other_weights(plan: Plan, pipe) -> None:
    made_for, found = plan.provenance.get("weights"), fingerprint(pipe)
    if made_for is not None and made_for != found and "offloaded" not in (made_for, found):
        text = f"the plan was calibrated on other weights ({made_for}, now {found}); quality may be lower"
        warnings.warn(text, stacklevel=3)
