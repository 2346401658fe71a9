"""Plans in stock diffusers pipelines: `enable(pipe, plan)` and `disable(pipe)`."""

import contextlib
import math
import warnings
import weakref
from collections.abc import Mapping
from numbers import Number
from pathlib import Path
from typing import Any

from ertacache.numerics.schedulers import check_scheduler
from ertacache.pipelines.block_residuals import check_blocks, hook_blocks, unhook_blocks
from ertacache.pipelines.denoiser import SKIPPED, PlannedDenoiser, is_stand_in
from ertacache.pipelines.enabled import Enabled, around_blocks, enabled_of
from ertacache.pipelines.scheduler import PlannedScheduler, is_planned
from ertacache.plans import Plan, PlanSet
from ertacache.plans.drift import LIMITS
from ertacache.plans.names import HUB_ID, HUB_PREFIX
from ertacache.plans.requirements import Requirements
from ertacache.utils.denoisers import DENOISERS, denoiser_of
from ertacache.utils.errors import PlanError, UserError, reason_of, shown
from ertacache.utils.provenance import fingerprint

ON_DRIFT = (*LIMITS, "ignore")
PER_TOKEN = ("LTXConditionPipeline", "SanaWMPipeline")  # pipelines with a time for each token
INNER = ("prior_pipe", "decoder_pipe")  # attributes that are pipelines of their own
REFUSED = {  # pipelines, and what they do
    "SkyReelsV2DiffusionForcingPipeline": "denoises each frame at a time of its own",
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": "denoises each frame at a time of its own",
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": "denoises each frame at a time of its own",
    "CosmosTextToWorldPipeline": "steps its scheduler twice for each of its steps",
    "CosmosVideoToWorldPipeline": "steps its scheduler twice for each of its steps",
    "LTXI2VLongMultiPromptPipeline": "leaves its scheduler's last step out, and blends windows of frames",
    "LEditsPPPipelineStableDiffusion": "repeats the noise that an image was inverted to",
    "LEditsPPPipelineStableDiffusionXL": "repeats the noise that an image was inverted to",
    "StableDiffusionPanoramaPipeline": "denoises overlapping views one by one with the same scheduler",
    "StableDiffusionSAGPipeline": "reads the model's attention maps in each step",
    "ChronoEditPipeline": "may cut its latents and its solver's history in the middle of a call",
}


def enable(
    pipe,
    plan: Plan | Mapping[float, Plan] | str | Path,
    *,
    on_drift: str = "warn",
    drift_limit: float | None = None,
) -> None:
    """Let a diffusers pipeline follow a plan in all of its calls, in place of one that it followed before.

    The pipeline runs its T steps as always: same timesteps, step numbers, callbacks and beginning. The denoiser calls
    of skipped steps are not made. Stand-ins take the place of the pipeline's scheduler and denoisers, which stay as
    they are. A call with another number of steps than the plan's is a PlanError before its first model call.

    Args:
        pipe: A pipeline with a denoiser (`transformer`, `unet`, …) and a scheduler that plans know
            (numerics/schedulers.py).
        plan: A plan; {speed-up: plan}, of which calls follow the first until `ertacache.speedup` chooses another; the
            path of a plan, or of a directory with a plan.json; or hf://OWNER/NAME for one on the Hub.
        on_drift: What is done where a run is unlike those of the calibration (drift.py). "warn": one warning, at the
            end of the first run whose drift is beyond the limit. "compute": where the prediction of a computed step is
            beyond the limit, every step up to the plan's next one is computed. "ignore": nothing.
        drift_limit: Factor above 0 on the largest value of the calibration prompts: of the drift, default 1.25, or with
            "compute" of the prediction error, default 2.

    Raises:
        PlanError: A plan for another model or scheduler, or one that a pipeline cannot follow.
        UserError: A pipeline without a denoiser, an unknown scheduler, or a bad argument.

    Example:
        >>> ertacache.enable(pipe, "my-plan.json")
        >>> image = pipe("a small blue ring", num_inference_steps=30).images[0]
    """
    check_on_drift(on_drift)
    if drift_limit is not None:
        _check_drift_limit(drift_limit, on_drift)
    if isinstance(pipe, Plan | Mapping | str | Path):
        raise UserError(f"enable({shown(pipe)}, …): give the pipeline first, then the plan")
    check_pipeline(pipe)
    plans = read_plans(plan)
    own = originals(pipe)
    check_scheduler(own["scheduler"])
    models = [own[name] for name in DENOISERS if name in own]
    for each in plans.members:
        _check_plan(pipe, each, on_drift)
    enabled = Enabled(plans, on_drift, drift_limit)
    _warn_of_other_weights(plans.first, pipe)
    disable(pipe)
    if any(map(around_blocks, plans.values())):
        for model in models:
            hook_blocks(model, enabled)
    stand_in(pipe, enabled, own)


def check_on_drift(on_drift: object) -> None:
    """Refuse what says nothing about runs that are unlike those of the calibration."""
    if not isinstance(on_drift, str) or on_drift not in ON_DRIFT:
        raise UserError(f"on_drift = {shown(on_drift)}: give one of {', '.join(map(repr, ON_DRIFT))}")


def _check_drift_limit(limit: object, on_drift: str) -> None:
    """Refuse what is no factor on drift, or one that would mean nothing."""
    if not isinstance(limit, int | float) or isinstance(limit, bool) or not 0 < limit < math.inf:
        raise UserError(f"drift_limit = {shown(limit)}: give a finite number above 0")
    if on_drift not in LIMITS:
        raise UserError(f"drift_limit = {shown(limit)}: nothing is limited with on_drift={on_drift!r}, leave it out")


def _check_plan(pipe, plan: Plan, on_drift: str) -> None:
    """Refuse a plan that the pipeline cannot follow."""
    if type(pipe).__name__ in PER_TOKEN and plan.requirements.settings.get("pipeline") != type(pipe).__name__:
        text = f"a {type(pipe).__name__} has a time for each token, and the plan was calibrated on another pipeline"
        raise PlanError(f"{text}: calibrate one with ertacache.calibrate(pipe, prompts)")
    if on_drift == "compute" and not plan.has_drift:
        remedy = "calibrate a budget plan anew, or leave on_drift='compute' out"
        raise PlanError(f"the plan ({plan.title}) has no drift to look at: {remedy}")
    own = originals(pipe)
    _check_hook(own["scheduler"], plan)
    dtype = str(denoiser_of(pipe).dtype).removeprefix("torch.")
    plan.check(Requirements.of(pipe, plan.steps, {"dtype": dtype}), "calibrate one: ertacache.calibrate(pipe, prompts)")
    if around_blocks(plan):
        for name in DENOISERS:
            if name in own:
                check_blocks(own[name])


def speedup(pipe, speedup: float | None) -> None:
    """Choose among the plans of a pipeline, for its next calls.

    The choice is that of the calling thread; threads that have never chosen follow the last choice of any. It costs
    nothing, and a call that is under way goes on as it began.

    Args:
        pipe: A pipeline that follows plans (`enable`).
        speedup: Of one of them, by its key in the set or by T/N; None for uncached calls.

    Raises:
        UserError: The pipeline follows no plan, or none of this speed-up.

    Example:
        >>> ertacache.speedup(pipe, 3)
    """
    enabled = enabled_of(pipe)
    enabled.choose(None if speedup is None else enabled.plans.at(speedup))


def disable(pipe) -> None:
    """Give a pipeline its own scheduler and denoisers back, the same objects; one without a plan is left as it is.

    Args:
        pipe: A diffusers pipeline.

    Example:
        >>> ertacache.disable(pipe)
    """
    if isinstance(pipe, Plan | Mapping | str | Path | Number | None):
        raise UserError(f"disable({shown(pipe)}): give the pipeline")
    for name, part in originals(pipe).items():
        if getattr(pipe, name) is not part:
            setattr(pipe, name, part)
            if name in DENOISERS:
                unhook_blocks(part)


def stand_in(pipe, enabled: Enabled, own: dict[str, Any]) -> None:
    """Put stand-ins in the place of a pipeline's scheduler and denoisers. own: what they stand in for, by name."""
    with contextlib.suppress(TypeError):  # what is no DiffusionPipeline may not have weak references
        enabled.pipe = weakref.ref(pipe)
    for name, part in own.items():
        setattr(pipe, name, (PlannedScheduler if name == "scheduler" else PlannedDenoiser)(part, enabled))


def originals(pipe) -> dict[str, Any]:
    """Return the scheduler and the denoisers that a pipeline was loaded with, by name, also where it follows a plan."""
    return {name: original(part) for name, part in parts_of(pipe).items()}


def parts_of(pipe) -> dict[str, Any]:
    """Return a pipeline's scheduler and denoisers as they are, with or without stand-ins, by name."""
    parts = {name: getattr(pipe, name, None) for name in ("scheduler", *SKIPPED)}
    return {name: part for name, part in parts.items() if part is not None}


def original(part):
    """Return the scheduler or denoiser that a stand-in stands in for; any other part itself."""
    if is_planned(part):
        return part.own
    return part._denoiser if is_stand_in(part) else part


def check_pipeline(pipe) -> None:
    """Refuse a pipeline without a denoiser or a scheduler, or one that no plan can follow."""
    inner = [name for name in INNER if hasattr(pipe, name)]
    if inner:
        text = f"a {type(pipe).__name__} is several pipelines in one"
        raise UserError(f"{text}: give one of them, {' or '.join(f'pipe.{name}' for name in inner)}")
    for name, part in (("transformer or unet", denoiser_of(pipe)), ("scheduler", getattr(pipe, "scheduler", None))):
        if part is None:
            raise UserError(f"a {type(pipe).__name__} without a {name} cannot follow a plan: load it with one")
    for kind in type(pipe).__mro__:
        if kind.__name__ in REFUSED:
            text = f"a {type(pipe).__name__} {REFUSED[kind.__name__]}, which no plan can follow"
            raise UserError(f"{text}: use it without one")


def read_plans(source: Plan | Mapping[float, Plan] | str | Path) -> PlanSet:
    """Return plans as a set, or read them from a file, a directory or (hf://OWNER/NAME) the Hub."""
    if isinstance(source, Plan):
        return PlanSet({source.speedup: source})
    if isinstance(source, Mapping):
        return source if isinstance(source, PlanSet) else PlanSet(source)
    if not isinstance(source, str | Path) or source == "":
        raise UserError(f"plan = {shown(source)}: give a plan, the path of one, or {HUB_PREFIX}OWNER/NAME")
    if isinstance(source, str) and source.startswith(HUB_PREFIX):
        return PlanSet.from_pretrained(source)
    path = Path(source).expanduser()
    try:
        is_folder, there = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read plan {shown(str(source))} ({reason_of(error)}): check the path") from error
    if is_folder:
        return PlanSet.from_pretrained(path)
    if not there and isinstance(source, str) and HUB_ID.fullmatch(source):
        raise PlanError(f"no plan {source} here: check the path; one on the Hub is {HUB_PREFIX}{source}")
    return read_plans(Plan.load(path))


def _check_hook(scheduler, plan: Plan) -> None:
    """Refuse a scheduler whose step was replaced, where jumps cannot be made by it: they can by Euler's only."""
    if "step" in vars(scheduler) and plan.kind == "budget" and "Euler" not in type(scheduler).__name__:
        text = f"the pipeline's {type(scheduler).__name__} has a `step` set on it, which jumps would not call"
        raise UserError(f"{text}: del pipe.scheduler.step, and set it again after ertacache.enable")


def _warn_of_other_weights(plan: Plan, pipe) -> None:
    weights, present = plan.provenance.get("weights"), fingerprint(pipe)
    if weights is not None and weights != present and "offloaded" not in (weights, present):
        text = f"the plan was calibrated on other weights ({weights}, now {present}); quality may be lower"
        warnings.warn(text, stacklevel=3)
