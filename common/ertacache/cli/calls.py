"""Calls of one pipeline on the same prompts and seeds, each with a plan or without."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ertacache.cli.request import Request
from ertacache.pipelines.enable import disable, enable, parts_of
from ertacache.plans import Plan
from ertacache.utils import parallel
from ertacache.utils.errors import UserError
from ertacache.utils.progress import bar_options


@dataclass(frozen=True)
class Call:
    """How a call is made.

    Attributes:
        name: For files and tables.
        parts: The pipeline's own scheduler and denoisers, or the stand-ins that follow the plan, by name.
        arguments: Of the call.
        plan: That the stand-ins follow.
        within: Returns a context that the call is made in: one with another cache.
    """

    name: str
    parts: Mapping[str, Any]
    arguments: Mapping[str, Any]
    plan: Plan | None = None
    within: Callable[[], AbstractContextManager] = nullcontext

    @property
    def key(self) -> list:
        """What its results depend on, besides the identity of `Calls`."""
        return [self.name, dict(self.arguments), self.plan and asdict(self.plan)]


class Calls:
    """The loaded pipeline with its prompts; prompt j starts from the noise of seed + j, whatever the batches.

    Args:
        request: Pipeline, prompts and arguments.
        seed: Of the first prompt.
        on_drift: As in `ertacache.enable`.
    """

    def __init__(self, request: Request, seed: int, on_drift: str = "warn"):
        self.request, self.prompts, self.seed, self.on_drift = request, list(request.prompts), seed, on_drift
        count, size = len(self.prompts), request.batch_size
        self.batches = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        self.pipe = request.load()
        self.made: set[str] = set()  # names of the calls that this process has made

    @property
    def identity(self) -> list:
        """What the results depend on, besides the plan."""
        request = self.request
        return [request.model, request.words(), request.prompts, self.seed, request.batch_size, self.on_drift]

    def call(
        self,
        name: str,
        plan: Plan | None = None,
        within: Callable[[], AbstractContextManager] = nullcontext,
        **changes,
    ) -> Call:
        """Return a call with a plan or without, or within a context. changes: of its arguments."""
        disable(self.pipe)
        if plan is not None:
            with self.request.naming_flags():
                enable(self.pipe, plan, on_drift=self.on_drift)
        return Call(name, parts_of(self.pipe), {**self.request.arguments, **changes}, plan, within)

    def run(self, call: Call, part: slice) -> tuple[np.ndarray, float]:
        """Make a call for some prompts.

        Returns:
            Images [B, H, W, 3] or videos [B, F, H, W, 3] in [0, 1], and the seconds of the call end to end.
        """
        for part_name, its_part in call.parts.items():
            setattr(self.pipe, part_name, its_part)
        text = f"{call.name}, prompt {part.stop} of {len(self.prompts)}"
        self.pipe.set_progress_bar_config(**bar_options(text, "step", silent=not parallel.is_main()))
        generators = [torch.Generator().manual_seed(self.seed + j) for j in range(part.start, part.stop)]
        start = time.perf_counter()
        with self.request.calling(), call.within(), np.errstate(all="ignore"):  # the result is looked at below
            result = self.pipe(prompt=self.prompts[part], generator=generators, output_type="np", **call.arguments)
        seconds = time.perf_counter() - start  # the result is in main memory, so the device has finished
        self.made.add(call.name)
        images = getattr(result, "images", getattr(result, "frames", None))
        if images is None:
            raise UserError(f"{type(self.pipe).__name__} makes neither images nor videos: use ertacache.enable")
        images = np.asarray(images, np.float32)
        if not np.isfinite(images).all():
            remedy = "try another --dtype, or check the arguments of the call"
            raise UserError(f"{call.name}: the result holds numbers that are not finite: {remedy}")
        return images, seconds
