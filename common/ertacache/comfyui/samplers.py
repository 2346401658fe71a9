"""Sampler functions for ComfyUI, which own the denoising loop: exactly N model calls by a plan, and the uncached run.

A sampler function is f(model, x, sigmas, extra_args=None, callback=None, disable=None, **options). model(x, sigma) has
the denoised latents after guidance, ControlNet and masks, so that v = (x − denoised) / sigma is dx/dsigma: the velocity
of flow matching, and the noise of epsilon prediction in ComfyUI's sigma space, x = data + sigma · noise.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from tqdm.auto import trange

from ertacache.comfyui.grid import begin_of, computed_from
from ertacache.pipelines.course import Course
from ertacache.pipelines.enabled import Enabled
from ertacache.pipelines.steps import BudgetSteps
from ertacache.plans.budget import BudgetPlan


class PlannedLoop:
    """The computed steps of a plan on given noise levels, and the jumps between them.

    Args:
        plan: To follow.
        sigmas: Noise levels of the computed steps, and the last one, [M+1]: as `grid.sigmas_of` gives them.

    Attributes:
        steps: The computed steps, of the plan's T, [M].

    Raises:
        PlanError: Noise levels that are not the plan's.
    """

    leads, enabled = False, Enabled(None)  # of the run that BudgetSteps expects: nothing is done on drift
    solver = SimpleNamespace(first_order=lambda s, s_next: (1.0, s_next - s))

    def __init__(self, plan: BudgetPlan, sigmas: list[float]):
        begin = begin_of(plan, sigmas)
        self.plan, self.planned, self.levels = plan, plan.on_native, plan.calibrated_levels()
        self.steps = computed_from(plan, begin)
        for step, sigma in zip((*self.steps, plan.steps), sigmas, strict=True):
            self.levels[step] = sigma
        self.course = Course(plan.steps, self.planned, None, plan)
        self.course.begin = begin
        self.jumps = BudgetSteps(self)

    def jump(self, j: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return the latents at computed step j + 1, from latents and velocity at computed step j. Shapes: [B, …]."""
        return self.jumps.jump_from(self.steps[j], x, v)


@torch.no_grad()
def sample_plan(
    model: Callable[..., torch.Tensor],
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    plan: BudgetPlan,
) -> torch.Tensor:
    """Follow a plan: one model call for each of the M noise levels but the last.

    Args:
        model: model(x, sigma, **extra_args) returns the denoised latents; x [B, …], sigma [B].
        x: Latents at sigmas[0], [B, …].
        sigmas: Noise levels of the plan's computed steps, and the last one, [M+1]; M = N for a whole run.
        extra_args: Keyword arguments of the model.
        callback: Called at each model call with x, i, sigma, sigma_hat and denoised.
        disable: Whether to show no progress bar.
        plan: To follow.

    Returns:
        Latents at sigmas[-1], [B, …], in the dtype of x.

    Raises:
        PlanError: Noise levels that are not the plan's.
    """
    loop = PlannedLoop(plan, sigmas.tolist())
    for j in trange(len(loop.steps), disable=disable):
        x = loop.jump(j, x, velocity(model, x, sigmas, j, extra_args, callback))
    return x


@torch.no_grad()
def sample_uncached(
    model: Callable[..., torch.Tensor],
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    on_step: Callable[[int, torch.Tensor, torch.Tensor], None] = lambda i, x, v: None,
) -> torch.Tensor:
    """Run all T steps by Euler's method, bit for bit as ComfyUI's sampler "euler" without churn.

    Args:
        model, x, extra_args, callback, disable: As in `sample_plan`.
        sigmas: Noise levels, [T+1].
        on_step: Called as on_step(i, x, v) at each step.

    Returns:
        Latents at sigmas[-1], [B, …].
    """
    for i in trange(len(sigmas) - 1, disable=disable):
        v = velocity(model, x, sigmas, i, extra_args, callback)
        on_step(i, x, v)
        x = x + v * (sigmas[i + 1] - sigmas[i])
    return x


def velocity(model, x: torch.Tensor, sigmas: torch.Tensor, i: int, extra_args=None, callback=None) -> torch.Tensor:
    """Return v = (x − denoised) / sigma at the noise level sigmas[i]; arguments as in `sample_plan`."""
    sigma = sigmas[i]
    denoised = model(x, sigma * x.new_ones([len(x)]), **(extra_args or {}))
    if callback is not None:
        callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
    return (x - denoised) / sigma
