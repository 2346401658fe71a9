"""A method at one setting, before and after it was run: what evaluation.py measures."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from ertacache.plans.plan import Plan


class Run(NamedTuple):
    """What a method made of some prompts: final latents, the inputs to decode them with, seconds of its loop."""

    latents: torch.Tensor
    inputs: Any
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What a method made of all prompts: pictures float [N, H, W, 3] or videos [N, F, H, W, 3], and latents [N, …].

    flops: of the transformer, a prompt of the first batch.
    """

    pictures: np.ndarray
    latents: np.ndarray
    flops: float | None = None


@dataclass(frozen=True)
class Candidate:
    """A method at one setting, to be measured. run(part of the prompts, on_step) → Run; names as in rows.md.

    against: what its latency is compared with, the uncached run made in the same way.
    """

    method: str
    label: str
    family: str
    run: Callable[..., Run]
    against: Callable[..., Run]
    settings: dict
    nfe: float | None = None  # None: T over the speed-up in FLOPs
    plan: Plan | None = None
    path: str | None = None
    extra: dict = field(default_factory=dict)  # of the row's settings: threshold, site, shift, value

    @property
    def key(self) -> list:
        plan = self.plan and {name: getattr(self.plan, name) for name in (*self.plan.FIELDS, *self.plan.ARRAYS)}
        return ["row", self.method, self.label, self.settings, self.extra, plan]
