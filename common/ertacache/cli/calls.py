"""Calls of one pipeline on the same prompts and seeds, each following a plan or none."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ertacache.cli.request import Request
from ertacache.pipelines.enable import disable, enable
from ertacache.plans.plan import Plan
from ertacache.utils.errors import UserError


@dataclass(frozen=True)
class Method:
    """How a call is made. scheduler: the pipeline's own, or one that follows the plan."""

    name: str
    scheduler: Any
    arguments: Mapping[str, Any]
    plan: Plan | None = None


class Calls:
    """The loaded pipeline with its prompts; prompt j starts from the noise of seed + j, whatever the batches."""

    def __init__(self, request: Request, prompts: list[str], seed: int, batch_size: int, on_drift: str = "warn"):
        self.request, self.prompts, self.seed, self.on_drift = request, prompts, seed, on_drift
        self.batches = [slice(b, min(b + batch_size, len(prompts))) for b in range(0, len(prompts), batch_size)]
        self.pipe = request.load()

    def method(self, name: str, plan: Plan | None = None, **changes) -> Method:
        """changes: of the call's arguments."""
        disable(self.pipe)
        if plan is not None:
            enable(self.pipe, plan, on_drift=self.on_drift)
        return Method(name, self.pipe.scheduler, {**self.request.arguments, **changes}, plan)

    def run(self, method: Method, part: slice) -> tuple[np.ndarray, float]:
        """Float pictures [B, H, W, 3] or videos [B, F, H, W, 3] in [0, 1], and the seconds of the call end to end."""
        self.pipe.scheduler = method.scheduler
        text = f"{method.name}, prompt {part.stop} of {len(self.prompts)}"
        self.pipe.set_progress_bar_config(disable=None, leave=False, desc=text)
        generators = [torch.Generator().manual_seed(self.seed + j) for j in range(part.start, part.stop)]
        start = time.perf_counter()
        with self.request.calling():
            result = self.pipe(prompt=self.prompts[part], generator=generators, output_type="np", **method.arguments)
        seconds = time.perf_counter() - start  # the result is in main memory, so the device has finished
        found = getattr(result, "images", getattr(result, "frames", None))
        if found is None:
            raise UserError(f"{type(self.pipe).__name__} makes neither pictures nor videos: use ertacache.enable")
        return np.asarray(found, np.float32), seconds
