"""Plans in stock diffusers pipelines: `enable(pipe, plan)` and `disable(pipe)`."""

import warnings
from pathlib import Path

from ertacache.pipelines.scheduler import PlannedScheduler
from ertacache.plans import Plan
from ertacache.plans.drift import LIMITS
from ertacache.plans.names import HUB_ID
from ertacache.plans.requirements import Requirements
from ertacache.utils.errors import PlanError, UserError
from ertacache.utils.provenance import fingerprint

ON_DRIFT = (*LIMITS, "ignore")


def enable(pipe, plan: Plan | str | Path, *, on_drift: str = "warn", drift_limit: float | None = None) -> None:
    """Let a diffusers pipeline follow a plan in all of its calls, in place of one that it followed before.

    Only the pipeline's scheduler is replaced. A call with another number of steps than the plan's is a PlanError before
    its first model call.

    Args:
        pipe: A pipeline with a `transformer` and a scheduler that plans know (numerics/schedulers.py).
        plan: A plan; the path of one, or of a directory with a plan.json; or a Hub id like OWNER/NAME.
        on_drift: What is done where a run is unlike those of the calibration (drift.py). "warn": one warning, at the
            end of the first run whose drift is beyond the limit. "compute": where the prediction of a computed step is
            beyond the limit, every step up to the plan's next one is computed, where the pipeline loops over all of its
            timesteps. "ignore": nothing.
        drift_limit: Factor above 0 on the largest value of the calibration prompts: of the drift, default 1.25, or with
            "compute" of the prediction error, default 2.

    Raises:
        PlanError: A plan for another model or scheduler, or one that a pipeline cannot follow.
        UserError: A pipeline without a transformer, an unknown scheduler, or a bad argument.

    Example:
        >>> ertacache.enable(pipe, "my-plan.json")
        >>> image = pipe("a small blue ring", num_inference_steps=30).images[0]
    """
    if on_drift not in ON_DRIFT:
        raise UserError(f"on_drift = {on_drift!r}: give one of {', '.join(map(repr, ON_DRIFT))}")
    if drift_limit is not None and not drift_limit > 0:
        raise UserError(f"drift_limit = {drift_limit}: give a number above 0")
    check_parts(pipe)
    plan = read_plan(plan)
    if not plan.can_follow_pipeline():
        raise PlanError(
            f"the plan ({plan.title}) caches around the blocks, a pipeline's scheduler sees outputs only: calibrate "
            "with --site output or --speedup"
        )
    if on_drift == "compute":
        _check_steps_can_be_added(pipe, plan)
    planned = PlannedScheduler(original_scheduler(pipe), plan, on_drift, drift_limit)
    dtype = str(pipe.transformer.dtype).removeprefix("torch.")
    plan.check(Requirements.of(pipe, plan.steps, {"dtype": dtype}), "calibrate one: ertacache.calibrate(pipe, prompts)")
    _warn_of_other_weights(plan, pipe)
    pipe.scheduler = planned


def disable(pipe) -> None:
    """Give a pipeline its own scheduler back, the same object; a pipeline without a plan is left as it is.

    Args:
        pipe: A diffusers pipeline.

    Example:
        >>> ertacache.disable(pipe)
    """
    pipe.scheduler = original_scheduler(pipe)


def check_parts(pipe) -> None:
    """Refuse a pipeline without a transformer or a scheduler."""
    for name in ("transformer", "scheduler"):
        if getattr(pipe, name, None) is None:
            raise UserError(f"a {type(pipe).__name__} without a {name} cannot follow a plan: load it with one")


def original_scheduler(pipe):
    """Return the scheduler that a pipeline was loaded with, whether or not it follows a plan."""
    return pipe.scheduler.own if type(pipe.scheduler) is PlannedScheduler else pipe.scheduler


def read_plan(source: Plan | str | Path) -> Plan:
    """Return a plan itself, or read it from a file, a directory or the Hub."""
    if isinstance(source, Plan):
        return source
    path = Path(source).expanduser()
    if path.is_dir() or (isinstance(source, str) and not path.exists() and HUB_ID.fullmatch(source)):
        return Plan.from_pretrained(source)
    return Plan.load(path)


def _check_steps_can_be_added(pipe, plan: Plan) -> None:
    """Refuse on_drift="compute" where there is nothing to decide by, no grid to compute on, or no room for a step."""
    problem, remedy = None, "leave on_drift='compute' out"
    if getattr(pipe, "controlnet", None) is not None:
        problem = f"a {type(pipe).__name__} keeps lists of one entry a step, so that none can be added"
    elif not plan.has_drift:
        problem = f"the plan ({plan.title}) has no drift to look at"
        remedy = "calibrate a budget plan anew, or " + remedy
    elif plan.sigmas:
        problem = f"the plan ({plan.title}) counts on a grid of its own, finer than the uncached run's"
    if problem is not None:
        raise PlanError(f"{problem}: {remedy}")


def _warn_of_other_weights(plan: Plan, pipe) -> None:
    weights, present = plan.provenance.get("weights"), fingerprint(pipe)
    if weights is not None and weights != present and "offloaded" not in (weights, present):
        text = f"the plan was calibrated on other weights ({weights}, now {present}); quality may be lower"
        warnings.warn(text, stacklevel=3)
