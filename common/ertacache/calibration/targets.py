"""What a budget plan aims at: the uncached run, or the solution that this run approximates.

Both give a trajectory of latents on a grid of noise levels, from which the plan's computed steps are chosen.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import torch

from ertacache.calibration.session import CalibrationSession
from ertacache.numerics import ode
from ertacache.utils.checkpoints import Checkpoints


class Target(Protocol):
    """The trajectory that a budget plan imitates.

    Attributes:
        name: Value of the plan's `target`.
        label: What messages call it.
        sigmas: Grid of its own that computed steps count on, [M+1]; None for the run's native grid.
        calls_per_step: Model calls per step of the grid.
    """

    name: str
    label: str
    sigmas: torch.Tensor | None
    calls_per_step: int

    def integrate(self, inputs, on_step: Callable) -> torch.Tensor:
        """Run the trajectory; on_step(i, x, v) sees it at each step. Returns the final latents [B, …]."""

    def facts(self) -> dict[str, Any]:
        """Return what a plan's provenance says of the target."""


class UncachedRun:
    """The uncached run itself, T calls per prompt."""

    name, label, sigmas, calls_per_step = "reference", "uncached run", None, 1

    def __init__(self, session: CalibrationSession, first, checkpoints: Checkpoints):
        self.session = session

    def integrate(self, inputs, on_step: Callable) -> torch.Tensor:
        return self.session.sampler.denoise(self.session.pipe, inputs, None, on_step)

    def facts(self) -> dict[str, Any]:
        return {}


class OdeSolution:
    """The finely integrated solution, three calls for each substep of `ode.CANDIDATES` · T intervals."""

    name, label = "exact", "solution"

    def __init__(self, session: CalibrationSession, first, checkpoints: Checkpoints):
        self.session, self.checkpoints = session, checkpoints
        self.sigmas = ode.candidate_grid(first.sigmas, ode.CANDIDATES * session.steps)
        self.rate = ode.rate_of(session.sampler, session.pipe, first.on(self.sigmas))

    @property
    def calls_per_step(self) -> int:
        return 3 * self.substeps

    @cached_property
    def substeps(self) -> int:
        """Substeps per interval with which the solution of the first prompts has settled."""

        def settle() -> int:
            session, count = self.session, ode.SETTLING_PROMPTS
            prompts, seeds = session.prompts[:count], session.seeds[:count]
            inputs = session.sampler.prepare(session.pipe, prompts, seeds, **session.settings)
            return ode.settled_substeps(session.sampler, session.pipe, inputs.on(self.sigmas), self.sigmas, self.rate)

        return self.checkpoints.value("substeps", settle)

    def integrate(self, inputs, on_step: Callable) -> torch.Tensor:
        options = {"rate": self.rate, "substeps": self.substeps, "on_step": on_step}
        return ode.integrate(self.session.sampler, self.session.pipe, inputs, inputs.sigmas, **options)

    def facts(self) -> dict[str, Any]:
        return {"substeps": self.substeps}


TARGETS: dict[str, type[Target]] = {target.name: target for target in (UncachedRun, OdeSolution)}
