"""The rows of `ertacache evaluate MODEL` (common/docs/reference/rows.md)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ertacache.cli.calls import Call, Calls
from ertacache.cli.evaluate_rows import row, values_of
from ertacache.evaluation.metrics import mean_and_tail
from ertacache.evaluation.ranking import TITLES
from ertacache.plans import Plan


@dataclass(frozen=True)
class Method:
    """A call with the facts of its row."""

    call: Call
    name: str
    family: str
    asked: float | None
    extra: dict[str, Any] = field(default_factory=dict)


def timeline(plan: Plan) -> dict[str, Any] | None:
    """Return which steps of which grid a budget plan computes."""
    if plan.kind != "budget":
        return None
    return {"sigmas": list(plan.sigmas or plan.native_sigmas), "computed": list(plan.computed), "error": None}


def full_row(
    calls: Calls,
    method: Method,
    times: list[float],
    uncached_times: list[float],
    pieces: Sequence[Mapping[str, Any]],
    uncached_pieces: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return a row with all fields of common/docs/reference/rows.md."""
    request, pipe, values = calls.request, calls.pipe, values_of(pieces)
    found = row(request, method.call, times, uncached_times, values)
    flops, uncached = pieces[0]["flops"], uncached_pieces[0]["flops"]
    speedup = uncached / flops if flops and uncached else None
    if method.family == "peer" and speedup:
        found |= {"nfe": request.steps / speedup, "speedup_nfe": speedup}
    tail = mean_and_tail_of(values["psnr_8bit"])
    others = {name: value for name, value in request.arguments.items() if name != "num_inference_steps"}
    extra = {name: value for name, value in method.extra.items() if name in ("shift", "value")}
    unmeasured = {name: None for name in TITLES if name not in found and name not in ("label", "place")}
    return {
        "folder": type(pipe).__name__,
        "model": request.name,
        **unmeasured,
        **found,
        "psnr_8bit_p10": tail["psnr_p10"],
        "psnr_8bit_worst": tail["psnr_worst"],
        "values": values,
        "method": method.name,
        "family": method.family,
        "asked": method.asked,
        "settings": {**others, "steps": found["steps"], **extra},
        "steps": found["steps"],
        "captions": None,
        "prompts": len(request.prompts),
        "seed": calls.seed,
        "batch_size": request.batch_size,
        "flops": flops,
        "speedup_flops": speedup,
        "latency_s": None,
        "plan": method.call.name if method.name in ("budget", "budget-exact", "ertacache") else None,
        "timeline": method.extra.get("timeline"),
        "samples": None,
        "sample_prompts": None,
    }


def mean_and_tail_of(values: Sequence[float | None]) -> dict[str, float | None]:
    """Return mean and tail of PSNRs, of which None are those of equal results."""
    found = np.array([np.inf if value is None else value for value in values])
    return mean_and_tail(found) if len(found) else {"psnr_p10": None, "psnr_worst": None}
