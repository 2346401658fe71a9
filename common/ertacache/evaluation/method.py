"""A method at one setting, and what a run of it gives."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from ertacache.plans.plan import Plan


class MethodRun(NamedTuple):
    """A run over some prompts.

    Attributes:
        latents: Final latents [B, …].
        inputs: What to decode them with; None where the stock pipeline ran.
        seconds: Of the denoising loop.
    """

    latents: torch.Tensor
    inputs: Any
    seconds: float


Runner = Callable[..., MethodRun]  # run(part, on_step=None): on a slice of the prompts


@dataclass(frozen=True)
class Outcome:
    """Results over all prompts.

    Attributes:
        images: Images float [N, H, W, 3], or videos [N, F, H, W, 3], in [0, 1].
        latents: Final latents [N, …].
        flops: Of the transformer, per prompt of the first batch.
    """

    images: np.ndarray
    latents: np.ndarray
    flops: float | None = None


@dataclass(frozen=True)
class Method:
    """A method at one setting, to be measured; names are those of a row (rows.py).

    Args:
        name: Of the method.
        label: The method with its setting, for tables.
        family: "budget", "ertacache", "steps", "peer" or "none".
        run: Runs it.
        reference: Runs uncached in the same way; latency is compared with it.
        settings: Of the run.
        nfe: Computed steps; None for T over the speed-up in FLOPs.
        plan: That it follows.
        path: Of the plan, relative to the repository.
        extra: Further settings of the row: threshold, site, shift, value.
        learned_on: Hash of the prompts that a method without a plan was fitted on.
    """

    name: str
    label: str
    family: str
    run: Runner
    reference: Runner
    settings: dict[str, Any]
    nfe: float | None = None
    plan: Plan | None = None
    path: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    learned_on: str = ""

    @property
    def is_uncached(self) -> bool:
        return self.name == "none"

    @property
    def key(self) -> list:
        """Identifies the row in the result cache."""
        plan = self.plan and {name: getattr(self.plan, name) for name in (*self.plan.FIELDS, *self.plan.ARRAYS)}
        learned_on = [self.learned_on] if self.learned_on else []
        return ["row", self.name, self.label, self.settings, self.extra, plan, *learned_on]
