"""The jump of budget plans: a linear multistep update with fitted coefficients."""

from collections.abc import Callable, Sequence

import torch

from ertacache.utils.errors import PlanError


def jump(
    x: torch.Tensor, history: Sequence[torch.Tensor], weights: Sequence[float], scale: float = 1.0
) -> torch.Tensor:
    """Return x' = a x + Σ_j w_j v_j, the step of a budget plan from one computed step straight to the next.

    Args:
        x: Latents at the computed step, any float dtype.
        history: The newest velocities, newest first, each of the shape of x.
        weights: w; at least as many as there are velocities.
        scale: a.

    Returns:
        Latents at the next computed step, summed in float32 and returned in the dtype of x.
    """
    total = scale * x.to(torch.float32)
    for v, weight in zip(history, weights, strict=False):
        total = total + weight * v.to(torch.float32)
    return total.to(x.dtype)


def follow(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    inputs,
    plan,
    on_step: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """Run the loop of a budget plan: N model calls and N jumps, without a scheduler.

    Args:
        velocity: velocity(x, t) returns the model output after guidance.
        inputs: Latents (the initial noise), sigmas [T+1] and times [T] of the grid that the plan's steps count on.
        plan: A `BudgetPlan`.
        on_step: Called as on_step(i, x, v) at each computed step; a velocity that it returns replaces v.

    Returns:
        The final latents [B, …].
    """
    if plan.begin or plan.end:
        text = f"the plan is for the steps from {plan.begin} to {plan.end or plan.steps} of a call alone"
        raise PlanError(f"{text}: use it with such a pipeline, by ertacache.enable")
    x, history = inputs.latents, []
    for i, weights, scale in zip(plan.computed, plan.weights_on(inputs.sigmas), plan.scale, strict=True):
        v = velocity(x, inputs.times[i])
        steered = on_step(i, x, v) if on_step is not None else None
        history = [v if steered is None else steered, *history][: plan.history_length]
        x = jump(x, history, weights, scale)
    return x


def adams_bashforth(
    first_order: Callable[[float, float], tuple[float, float]], levels: Sequence[float], steps: Sequence[int], end: int
) -> tuple[float, list[float]]:
    """Return (a, w) of a jump by the second-order Adams–Bashforth method, or of first order from a single velocity.

    Args:
        first_order: first_order(s, s') returns (a, w) of the solver's first-order jump.
        levels: Noise levels, [T+1].
        steps: The computed steps, newest first; the jump begins at the newest.
        end: The step that it leads to.
    """
    scale, weight = first_order(levels[steps[0]], levels[end])
    if len(steps) == 1 or levels[steps[0]] == levels[steps[1]]:
        return scale, [weight]
    ratio = (levels[end] - levels[steps[0]]) / (levels[steps[0]] - levels[steps[1]]) / 2
    return scale, [weight * (1 + ratio), -weight * ratio]
