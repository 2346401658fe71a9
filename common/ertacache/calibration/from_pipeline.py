"""Budget plans from the call of any pipeline that `ertacache.enable` takes: `ertacache.calibrate`."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ertacache.calibration.budget import BudgetCalibration
from ertacache.calibration.effort import effort_of
from ertacache.calibration.paused_call import (
    CallState,
    PausedCalls,
    arguments_of_call,
    calling,
    prompt_argument,
    stateful,
)
from ertacache.calibration.search import Interrupted, goes_on, keep_unfinished
from ertacache.calibration.session import CalibrationSession, as_json, recorded
from ertacache.numerics.schedulers import check_scheduler, num_inference_steps_of, steps_of
from ertacache.pipelines.enable import check_pipeline, originals
from ertacache.plans import PlanSet
from ertacache.plans.names import budget_of, check_speedups
from ertacache.plans.requirements import Requirements
from ertacache.utils import parallel
from ertacache.utils.checks import LARGEST_STEPS, LEAST_STEPS, argument_problem, check_seed, steps_problem
from ertacache.utils.errors import UserError, shown
from ertacache.utils.files import writable
from ertacache.utils.logs import each_line_once

FOLDER = ".ertacache"  # in the current folder: checkpoints of an interrupted calibration
UNFINISHED = "interrupted-"  # names of plans in it begin so
SET_BY_CALIBRATE = ("prompt", "generator", "latents", "num_images_per_prompt", "num_videos_per_prompt")
UNRECORDED = (*SET_BY_CALIBRATE, "num_inference_steps", "output_type", "return_dict")  # no settings of a plan


def calibrate(
    pipe,
    prompts: Sequence,
    speedups: Sequence[float] = (2, 3),
    *,
    seed: int = 0,
    batch_size: int = 1,
    effort: str | float = "normal",
    target: str = "reference",
    work: str | Path | None = None,
    progress: bool = True,
    **call_kwargs,
) -> PlanSet:
    """Calibrate a budget plan for each speed-up, for this pipeline's call with `call_kwargs`.

    It takes T model calls per prompt once, and then at most 2·T, 4·T or 40·T per prompt for each speed-up, by effort;
    it says how many before it begins, and after the second one how long it may take. The pipeline is left as it is, and
    a plan that it follows plays no part. After an interruption the best plan so far is in `work`, and the same call
    goes on.

    Args:
        pipe: The pipeline.
        prompts: Texts like those to come, or values of the call's first argument where it takes no `prompt` (images,
            class labels). A quarter of them (none of fewer than four) measures the plans and is not fitted.
        speedups: T/N, each at least 1.
        seed: Prompt j starts from the noise of seed + j.
        batch_size: Prompts per call.
        effort: "quick" (the first 8 prompts, the most promising schedules), "normal" (all prompts and schedules) or
            "thorough" (and a local search to its end); or a number of minutes, in which all prompts and the search have
            to fit.
        target: "reference", the uncached run; a pipeline's own call shows no other.
        work: Folder for checkpoints, T + 1 float32 latents per prompt, removed at the end; by default .ertacache in the
            current folder.
        progress: Whether to show a progress bar.
        **call_kwargs: Arguments of the pipeline's call (num_inference_steps, height, guidance_scale, image, …), one
            value for all prompts.

    Returns:
        {speedup: plan}. `enable` takes one of them, or all, between which `speedup` switches.

    Raises:
        UserError: An argument out of range or one that the pipeline's call cannot take, a pipeline or scheduler that
            plans cannot follow, a call that changes the latents between its steps, or too few minutes.

    Example:
        >>> plans = ertacache.calibrate(pipe, prompts, speedups=[2, 3], num_inference_steps=30, guidance_scale=3.5)
        >>> ertacache.enable(pipe, plans[2])
    """
    options = {"seed": seed, "batch_size": batch_size, "effort": effort, "target": target, "work": work}
    return make_plans(pipe, prompts, speedups, None, progress=progress, call_kwargs=call_kwargs, **options)


def make_plans(
    pipe,
    prompts: Sequence,
    speedups: Sequence[float],
    save: Callable[[PlanSet], None] | None,
    *,
    seed: int,
    batch_size: int,
    effort: str | float,
    target: str = "reference",
    work: str | Path | None = None,
    progress: bool = True,
    announce: Callable[[], None] = lambda: None,
    argument: str = "speedups",
    call_kwargs: Mapping[str, Any],
) -> PlanSet:
    """Calibrate as `calibrate` does. argument: the name of the speed-ups, for refusals.

    announce() is called once the pipeline has taken the arguments of the call, which is then at its first step.
    save(plans) is called by rank 0 before the work is deleted.
    """
    prompts = calibration_prompts(pipe, prompts)[: effort_of(effort).prompts]
    check_seed(seed, "seed")
    if not isinstance(work, str | Path | None):
        raise UserError(f"work = {shown(work)}: give the path of a folder, or leave it out")
    if target != "reference":
        raise UserError(f"target = {target!r}: a pipeline's own call shows its own trajectory only, give 'reference'")
    steps = check_call(pipe, speedups, batch_size, call_kwargs, argument)
    if batch_size < len(prompts):
        _check_state(pipe, len(prompts))
    with writable(work or FOLDER) as folder:
        try:
            session = session_of_call(pipe, prompts, steps, seed, batch_size, folder, call_kwargs, progress)
            sampler = session.sampler
            with contextlib.closing(session.progress), goes_on(), session.exclusive(), each_line_once("diffusers"):
                with calling(pipe, call_kwargs):  # up to the first prompt's first step
                    calibration = BudgetCalibration(session, target, state_of=CallState, around_pass=lambda: sampler)
                check_total(pipe, len(calibration.native_sigmas) - 1, steps)
                if calibration.end < LEAST_STEPS:
                    text = f"the call makes {calibration.end} of {steps} steps, and at least {LEAST_STEPS} are needed"
                    raise UserError(f"{text}: give a larger strength, or more num_inference_steps")
                budgets = {speedup: budget_of(calibration.end, speedup, argument) for speedup in speedups}
                announce()
                made = calibration.plans(list(dict.fromkeys(budgets.values())), effort)
                plans = PlanSet({speedup: made[budget] for speedup, budget in budgets.items()})
                if save is not None and parallel.is_main():
                    save(plans)
                calibration.finish()
            for unfinished in folder.glob(f"{UNFINISHED}*"):
                unfinished.unlink()
        except Interrupted as stop:
            if parallel.is_main():
                keep_unfinished(stop.plan, folder / f"{UNFINISHED}{stop.plan.nfe}-of-{stop.plan.steps}.json")
            raise
        finally:
            if not work:
                with contextlib.suppress(OSError):  # what lies in it belongs to an interrupted calibration
                    folder.rmdir()
    return plans


def session_of_call(
    pipe,
    prompts: Sequence,
    steps: int,
    seed: int,
    batch_size: int,
    work: Path,
    call_kwargs: Mapping[str, Any],
    progress: bool = True,
) -> CalibrationSession:
    """Return a session on a pipeline's own calls; its sampler is a `PausedCalls`.

    Args:
        pipe: The pipeline.
        prompts: Calibration prompts.
        steps: T.
        seed: Of the first prompt.
        batch_size: Prompts per call.
        work: Folder for checkpoints.
        call_kwargs: Arguments of the call.
        progress: Whether to show a progress bar.
    """
    return CalibrationSession(
        PausedCalls(pipe, call_kwargs),
        pipe,
        prompts,
        range(seed, seed + len(prompts)),
        settings=_settings(pipe, steps, call_kwargs),
        batch_size=batch_size,
        work=work,
        model_id=name_of(pipe),
        progress=progress,
    )


def prompts_of(pipe, prompts) -> list:
    """Return the prompts of a calibration as a list: of texts, where the pipeline's call takes a `prompt`."""
    name = prompt_argument(pipe)
    kind, what = (str, "texts") if name == "prompt" else (object, f"values of {name}")
    is_list = isinstance(prompts, Sequence) and not isinstance(prompts, str)
    if not is_list or not all(isinstance(prompt, kind) for prompt in prompts):
        raise UserError(f"prompts = {shown(prompts)}: give a list of {what}")
    return list(prompts)


def calibration_prompts(pipe, prompts, remedy: str = "give some") -> list:
    """Return the prompts as `prompts_of` does, without none at all and texts that say nothing. remedy: of none."""
    prompts = prompts_of(pipe, prompts)
    if not prompts:
        raise UserError(f"no calibration prompts: {remedy}")
    if prompt_argument(pipe) == "prompt" and not all(prompt.strip() for prompt in prompts):
        raise UserError(f"prompts = {shown(prompts)}: one is empty, say what should be seen")
    return prompts


def check_call(
    pipe, speedups: Sequence[float], batch_size: int, call_kwargs: Mapping[str, Any], argument: str = "speedups"
) -> int:
    """Refuse what cannot be calibrated, before it takes any time. Returns T. argument: the name of the speed-ups."""
    if not isinstance(speedups, Sequence) or isinstance(speedups, str) or not speedups:
        what = "a list, for example [2, 3]" if argument == "speedups" else "a number like 2, or a list like [2, 3]"
        raise UserError(f"{argument} = {shown(speedups)}: give {what}")
    check_speedups(speedups, argument)
    if type(batch_size) is not int or batch_size < 1:
        raise UserError(f"batch_size = {shown(batch_size)}: give a whole number of at least 1")
    check_pipeline(pipe)
    scheduler = originals(pipe)["scheduler"]
    check_scheduler(scheduler)
    steps = steps_of(scheduler, _steps_of(pipe, call_kwargs))
    for name, value in call_kwargs.items():
        problem = argument_problem(name, value)
        if problem:
            raise UserError(f"{name} = {shown(value)}: {problem}")
    for speedup in speedups:
        budget_of(steps, speedup, argument)
    return steps


def check_total(pipe, total: int, steps: int) -> None:
    """Refuse a call whose scheduler makes another number of steps than T."""
    if total != steps:
        remedy = num_inference_steps_of(originals(pipe)["scheduler"], total)
        text = f"the pipeline's scheduler makes {total} steps, not {steps}"
        raise UserError(f"{text}: give num_inference_steps={remedy}")


def _check_state(pipe, count: int) -> None:
    """Refuse models that keep something from step to step which is not kept apart by cache context.

    In a rollout the calls of all prompts take turns at each step, on one model.
    """
    for name, part in originals(pipe).items():
        kinds = stateful(part, shared=True)
        if kinds:
            text = (
                f"the pipeline's {name} keeps state from step to step ({', '.join(kinds)}), which prompts would share"
            )
            raise UserError(f"{text}: disable that cache first, or give batch_size={count}")


def _steps_of(pipe, call_kwargs: Mapping[str, Any]) -> int:
    """Return the call's num_inference_steps, given or its default. Refuses arguments that it does not take."""
    known, complete = arguments_of_call(pipe)
    own = (*SET_BY_CALIBRATE, prompt_argument(pipe))
    for name in call_kwargs:
        if name in own or (complete and name not in known):
            problem = "is set by calibrate" if name in own else f"is no argument of {type(pipe).__name__}'s call"
            raise UserError(f"{name} {problem}: leave it out")
    steps = call_kwargs.get("num_inference_steps", known.get("num_inference_steps"))
    if steps_problem(steps):
        limits = f"from {LEAST_STEPS} to {LARGEST_STEPS}"
        raise UserError(f"num_inference_steps = {shown(steps)}: give the number of steps of the uncached run, {limits}")
    return steps


def requirements_of(pipe, steps: int, call_kwargs: Mapping[str, Any]) -> Requirements:
    """Return what binds the plans of a pipeline's call, and what of the call is known before it is made."""
    return Requirements.of(pipe, steps, recorded(pipe, _settings(pipe, steps, call_kwargs)))


def _settings(pipe, steps: int, call_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {"steps": steps, "pipeline": type(pipe).__name__, **_recorded(call_kwargs)}


def _recorded(call_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that the call is given as settings of a plan; of what is no JSON value type and hash."""
    return {name: as_json(value) for name, value in call_kwargs.items() if name not in UNRECORDED}


def name_of(pipe) -> str:
    """Return the Hub id, or the directory's name, that the pipeline was loaded from; its class where there is none."""
    name = getattr(pipe, "name_or_path", None)
    return (Path(name).name if Path(name).is_dir() else name) if name else type(pipe).__name__
