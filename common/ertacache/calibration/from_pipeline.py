"""Budget plans from the call of any pipeline that `ertacache.enable` takes: `calibrate(pipe, prompts)`."""

import contextlib
import hashlib
import inspect
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ertacache.calibration.budget import BudgetCalibration
from ertacache.calibration.paused_call import Call, CallProgram
from ertacache.calibration.planner import Schedule
from ertacache.numerics.schedulers import check_scheduler
from ertacache.pipelines.enable import check_parts, own_scheduler
from ertacache.plans.budget import BudgetPlan
from ertacache.plans.names import budget_of, check_speedups
from ertacache.utils.errors import UserError
from ertacache.utils.files import ensure_writable

FOLDER = ".ertacache"  # here, for what an interrupted calibration goes on from
OURS = ("prompt", "generator", "latents", "num_images_per_prompt", "num_videos_per_prompt")  # one noise a prompt
UNRECORDED = ("num_inference_steps", "output_type", "return_dict")  # no settings of a plan


def calibrate(
    pipe,
    prompts: Sequence[str],
    speedups: Sequence[float] = (2, 3),
    *,
    seed: int = 0,
    batch_size: int = 1,
    search: int = 0,
    target: str = "reference",
    work: str | Path | None = None,
    progress: bool = True,
    **call_kwargs,
) -> dict[float, BudgetPlan]:
    """A budget plan for each speed-up, {speedup: plan} in their order, made for this pipeline's call with call_kwargs.

    prompts: texts, a quarter of which (none of fewer than four) measures the plans and is not fitted. Prompt j starts
    from the noise of seed + j. call_kwargs: the pipeline's (num_inference_steps, height, guidance_scale, image, …), one
    value for all prompts. batch_size: prompts a call. search: more replays for a local search, a plan. work: folder
    for what an interrupted calibration goes on from (T + 1 float32 latents a prompt), by default .ertacache in the
    current one; removed at the end.

    The pipeline is left as it is: nothing is set on it, and a plan that it follows plays no part.
    """
    steps = _check(pipe, prompts, speedups, target, batch_size, call_kwargs)
    folder = ensure_writable(work or FOLDER)
    try:
        made = PipelineCalibration(
            CallProgram(pipe, call_kwargs),
            prompts,
            range(seed, seed + len(prompts)),
            settings={"steps": steps, "pipeline": type(pipe).__name__, **_recorded(call_kwargs)},
            batch_size=batch_size,
            work=folder,
            model_id=_name_of(pipe),
            progress=progress,
        )
        with contextlib.closing(made.bar):
            plans = made.plans([budget_of(steps, speedup) for speedup in speedups], search)
            made.finish()
    finally:
        if work is None:
            with contextlib.suppress(OSError):  # what lies in it belongs to an interrupted calibration
                folder.rmdir()
    return {speedup: plans[budget_of(steps, speedup)] for speedup in speedups}


def _check(pipe, prompts, speedups, target: str, batch_size: int, call_kwargs: Mapping[str, Any]) -> int:
    """Refuse what cannot be calibrated. Returns T."""
    if target != "reference":
        raise UserError(f"target = {target!r}: a pipeline's own call shows its own trajectory only, give 'reference'")
    if isinstance(speedups, (int, float, str)) or not speedups:
        raise UserError(f"speedups = {speedups!r}: give a list, for example [2, 3]")
    check_speedups(speedups, "speedups")
    listed = isinstance(prompts, Sequence) and not isinstance(prompts, str)
    if not listed or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"prompts = {prompts!r:.60}: give a list of texts")
    if batch_size < 1:
        raise UserError(f"batch_size = {batch_size}: give a number of at least 1")
    check_parts(pipe)
    check_scheduler(own_scheduler(pipe))
    return _steps_of(pipe, call_kwargs)


def _steps_of(pipe, call_kwargs: Mapping[str, Any]) -> int:
    """T, given or the call's default. Refuses arguments that the call does not take."""
    known = inspect.signature(type(pipe).__call__).parameters
    for name in call_kwargs:
        if name not in known or name in OURS:
            why = "is set by calibrate" if name in OURS else f"is no argument of {type(pipe).__name__}'s call"
            raise UserError(f"{name} {why}: leave it out")
    default = known["num_inference_steps"].default if "num_inference_steps" in known else None
    steps = call_kwargs.get("num_inference_steps", default)
    if not isinstance(steps, int) or steps < 3:
        raise UserError(f"num_inference_steps = {steps}: give the number of steps of the uncached run, at least 3")
    return steps


def _recorded(call_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments as settings of a plan; of what is no JSON value (pictures, tensors) type and hash."""
    found = {}
    for name, value in call_kwargs.items():
        if name in UNRECORDED:
            continue
        try:
            found[name] = json.loads(json.dumps(value))
        except TypeError:
            found[name] = type(value).__name__
            with contextlib.suppress(pickle.PicklingError, AttributeError, TypeError):  # local functions
                found[name] += f" {hashlib.sha256(pickle.dumps(value)).hexdigest()[:16]}"
    return found


def _name_of(pipe) -> str:
    """The Hub id, or the name of the directory, that the pipeline was loaded from; its class where there is none."""
    name = getattr(pipe, "name_or_path", None)
    return (Path(name).name if Path(name).is_dir() else name) if name else type(pipe).__name__


class PipelineCalibration(BudgetCalibration):
    """A `BudgetCalibration` whose inputs are calls of a pipeline that wait at their first step."""

    def __init__(self, program: CallProgram, *arguments, **options):
        pipe = program.pipe
        model = getattr(pipe.transformer, "_orig_mod", pipe.transformer)  # inside of torch.compile's wrapper
        parts = SimpleNamespace(transformer=model, scheduler=own_scheduler(pipe))
        parts.transformer_2 = getattr(pipe, "transformer_2", None)
        with program:
            super().__init__(program, parts, *arguments, **options)
        if self.end != self.steps:
            text = f"the pipeline's call makes {self.end} steps, not num_inference_steps = {self.steps}"
            raise UserError(f"{text}: give num_inference_steps={self.end}")

    def inputs_over(self, batch: int, schedule: Schedule) -> Call:
        return self.inputs(batch).over(schedule)

    def reference_batch(self, batch: int):
        with self.program:
            return super().reference_batch(batch)

    def walk(self, schedule: Schedule, anchors: int):
        with self.program:
            return super().walk(schedule, anchors)
