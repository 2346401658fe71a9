"""Schedules that others have released, as budget plans: lists of computed steps, between which the output is reused.

    plan = ertacache.import_schedule(pipe, "lemica-flux.1-dev-20", num_inference_steps=50, guidance_scale=3.5)
    plan = ertacache.import_schedule(pipe, "flux_28nfe10.pt", num_inference_steps=28)
    ertacache.enable(pipe, plan)

A plan reuses the model's output, after guidance. LeMiCa and BudCache reuse what the block stack adds to its input,
DPCache extrapolates its last feature, and MeanCache corrects reuse by a derivative of the output; that is lost.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ertacache.calibration.from_pipeline import check_call, check_total, prompts_of, requirements_of
from ertacache.calibration.paused_call import PausedCalls, calling
from ertacache.calibration.planner import Schedule
from ertacache.calibration.trajectories import check_latents
from ertacache.numerics.multistep import extrapolated, first_order_matrix, predicted_jumps, reused
from ertacache.pipelines.conditions import watching
from ertacache.plans.budget import BudgetPlan
from ertacache.plans.plan import as_tuples
from ertacache.utils.errors import UserError, reason_of, shown

LARGEST_DIFFERENCE = 0.1  # of the speed-up of a released list from the one asked for, in `released_steps`


class Released(NamedTuple):
    """Lists of computed steps.

    Attributes:
        source: Where they are from.
        steps: T.
        lists: By N.
        denoiser: Class name of the model that they are compared on, "" for none of ours.
    """

    source: str
    steps: int
    lists: dict[int, Schedule]
    denoiser: str = ""


LEMICA = "LeMiCa (arXiv 2511.00090), scruffynerf/LeMiCa"
MEANCACHE = "MeanCache, UnicomAI/MeanCache at a4f9a38"
RELEASED = {
    "lemica-flux.1-dev": Released(
        f"{LEMICA} at 656fb4f, LeMiCa4FLUX/inference_flux1.py",
        50,
        {
            26: (*range(11), 12, 15, 18, 20, 25, 30, 35, 39, 42, *range(44, 50)),
            20: (*range(8), 9, 12, 15, 19, 24, 31, 38, 43, *range(46, 50)),
            15: (*range(6), 7, 10, 15, 20, 27, 34, 41, 47, 49),
            10: (0, 1, 3, 7, 14, 21, 28, 35, 42, 49),
        },
        "FluxTransformer2DModel",
    ),
    "lemica-wan2.1-1.3b": Released(
        f"{LEMICA} at a3828a4, LeMiCa4Wan2.1/inference_wan.py",
        50,
        {
            25: (*range(13), 14, 16, 18, 21, 24, 29, 35, 40, 44, 47, 48, 49),
            20: (*range(10), 11, 13, 16, 20, 26, 33, 40, 45, 48, 49),
            17: (*range(9), 10, 13, 18, 25, 32, 39, 46, 49),
            14: (*range(6), 7, 10, 16, 23, 30, 37, 44, 49),
        },
        "WanTransformer3DModel",
    ),
    "lemica-wan2.1-14b": Released(
        f"{LEMICA} at a3828a4, LeMiCa4Wan2.1/inference_wan.py",
        50,
        {
            25: (*range(12), 13, 15, 18, 21, 25, 29, 34, 38, 42, 45, 47, 48, 49),
            20: (*range(10), 11, 14, 18, 23, 29, 36, 42, 46, 48, 49),
            17: (*range(8), 9, 12, 16, 22, 29, 36, 43, 47, 49),
            14: (*range(6), 7, 10, 17, 24, 31, 38, 45, 49),
        },
    ),
    "meancache-qwen-image": Released(
        f"{MEANCACHE}, MeanCache4Qwen-Image/Mc_qwenimage.py",
        50,
        {
            25: (*range(17), 24, 32, 40, 43, 45, 47, 48, 49),
            17: (*range(9), 10, 17, 24, 31, 38, 45, 48, 49),
            10: (0, 1, 3, 7, 14, 21, 28, 35, 42, 49),
        },
    ),
    "meancache-qwen-image-2512": Released(
        f"{MEANCACHE}, MeanCache4Qwen-Image/Mc_qwenimage_2512.py",
        50,
        {
            25: (*range(16), 23, 31, 37, *range(44, 50)),
            17: (*range(10), 11, 19, 27, 35, 43, 47, 49),
            10: (0, 2, 4, 7, 14, 21, 28, 35, 42, 49),
        },
    ),
}
NAMES = {f"{name}-{count}": (name, count) for name, released in RELEASED.items() for count in released.lists}
REMEDY = "give a list of computed steps, BudCache's .pt, SGLang's DPCache .json, or one of"


def import_schedule(pipe, source: str | Path | Sequence[int], *, prompt="", **call_kwargs) -> BudgetPlan:
    """Make a budget plan of a schedule that was found elsewhere, for this pipeline's call with `call_kwargs`.

    The jumps are those of the scheduler's first-order steps with the last output reused on skipped steps; for SGLang's
    DPCache with outputs extrapolated from the last two. One call of the pipeline is begun, and ended at its first step.

    Args:
        pipe: The pipeline.
        source: Computed steps counted from 0; or the name of a released list (`RELEASED`, with "-N"); or a file:
            BudCache's `.pt`, SGLang's DPCache `.json`, a `.json` list of computed steps.
        prompt: Of the call that is begun; it matters where a pipeline cannot take an empty text.
        **call_kwargs: Arguments of the pipeline's call, as of `ertacache.calibrate`.

    Returns:
        The plan, for `enable` and `ertacache evaluate --plan`.

    Raises:
        UserError: A schedule that cannot be read, or that is none of this number of steps.
    """
    computed, text, steps = read_schedule(source)
    total = check_call(pipe, [1], 1, call_kwargs)
    if steps is not None and steps != total:
        raise UserError(f"{text} is of {steps} steps, the call makes {total}: give num_inference_steps={steps}")
    schedule = checked(complement(computed, total) if isinstance(computed, frozenset) else computed, total, text)
    with PausedCalls(pipe, call_kwargs) as sampler:
        call = sampler.prepare(pipe, prompts_of(pipe, [prompt]), [0])
        with calling(pipe, call_kwargs), watching(pipe) as conditions:
            native = call.all_sigmas
        check_total(pipe, len(native) - 1, total)
        check_latents(call.latents.numel(), call_kwargs)
        if len(call.times) != total:
            raise UserError(f"the call makes {len(call.times)} of {total} steps: give a call that begins with noise")
        solver = first_order_matrix([sampler.first_order(pipe, call, i, i + 1) for i in range(total)])
    predictor = extrapolated if "DPCache" in text else reused
    weights, scale = predicted_jumps(solver, schedule, predictor)
    required = requirements_of(pipe, total, call_kwargs)
    return BudgetPlan(
        requirements=replace(required, settings={**required.settings, **conditions}),
        computed=schedule,
        weights=as_tuples(weights.tolist()),
        scale=tuple(scale.tolist()),
        native_sigmas=tuple(native.tolist()),
        provenance={"imported": text},
    )


def read_schedule(source: str | Path | Sequence[int]) -> tuple[Sequence[int] | frozenset[int], str, int | None]:
    """Return a schedule's computed steps (or, as a frozenset, the skipped ones), where it is from, and T if it says."""
    if not isinstance(source, str | Path):
        return source, "the schedule", None
    if str(source) in NAMES:
        name, count = NAMES[str(source)]
        return RELEASED[name].lists[count], RELEASED[name].source, RELEASED[name].steps
    path = Path(source)
    if path.suffix not in (".pt", ".json"):
        raise UserError(f"no schedule {shown(str(source))}: {REMEDY} {', '.join(NAMES)}")
    try:
        if path.suffix == ".pt":
            import torch

            content = torch.load(path, map_location="cpu", weights_only=True)
            return frozenset(content["cache_step"]), f"BudCache's {path.name}", None
        content = json.loads(path.read_text("utf-8"))
        if isinstance(content, list):
            return content, path.name, None
        return content["full_steps"], f"DPCache's {path.name}", content["request"]["num_inference_steps"]
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: {REMEDY} {', '.join(NAMES)}") from error
    except Exception as error:  # whatever unpickling raises for a file of another kind
        raise UserError(f"{path} holds no schedule ({reason_of(error)}): {REMEDY} {', '.join(NAMES)}") from error


def complement(skipped: frozenset, steps: int) -> tuple[int, ...]:
    """Return the computed steps. Refuses skipped ones out of range."""
    outside = [i for i in skipped if type(i) is not int or not 0 < i < steps]
    if outside:
        raise UserError(f"skipped step {shown(outside[0])} is none of 1 … {steps - 1}: give its num_inference_steps")
    return tuple(i for i in range(steps) if i not in skipped)


def checked(computed: Sequence[int], steps: int, text: str) -> Schedule:
    """Return computed steps as a schedule. Refuses those that do not ascend from 0 within the T steps."""
    fits = isinstance(computed, Sequence) and len(computed) > 1 and all(type(i) is int for i in computed)
    if not fits or computed[0] != 0 or computed[-1] >= steps or any(a >= b for a, b in pairwise(computed)):
        raise UserError(
            f"{text}: computed steps {shown(computed)}, give two or more that ascend from 0 to at most {steps - 1}"
        )
    return tuple(computed)


def scaled(schedule: Schedule, steps: int, target: int) -> Schedule:
    """Return a schedule of T steps for another T: first and last step fall on each other, equal steps become one."""
    return tuple(sorted({int(i) for i in np.rint(np.array(schedule) * (target - 1) / (steps - 1))}))


def released_steps(denoiser: str, steps: int, budget: int) -> tuple[Schedule, str] | None:
    """Return the released list for a model with a speed-up nearest to T/N, and what it is.

    A list for another T is scaled. None where there is none for the model within a tenth of the speed-up.

    Args:
        denoiser: Class name of the model.
        steps: T.
        budget: N.
    """
    found = []
    for name, released in RELEASED.items():
        for schedule in released.lists.values() if released.denoiser == denoiser else ():
            own = scaled(schedule, released.steps, steps)
            origin = "" if steps == released.steps else f" scaled from {len(schedule)} of {released.steps} steps"
            found.append((abs(budget / len(own) - 1), own, f"released list {name} ({len(own)}{origin})"))
    nearest = min(found, default=None)
    return nearest[1:] if nearest and nearest[0] < LARGEST_DIFFERENCE + 1e-9 else None
