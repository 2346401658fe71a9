"""A jump: the linear multistep update with fitted coefficients by which budget plans step."""

import torch


def jump(x: torch.Tensor, history: list[torch.Tensor], weights, scale: float = 1.0) -> torch.Tensor:
    """The step of a budget plan, x' = a x + Σ_j w_j v_j: from one computed step straight to the next (planner.py).

    history: the newest outputs, newest first; weights: at least as many numbers. Formed in float32, in the dtype of x.
    """
    total = scale * x.to(torch.float32)
    for v, weight in zip(history, weights, strict=False):
        total = total + weight * v.to(torch.float32)
    return total.to(x.dtype)


def follow(velocity, inputs, plan, on_step=None) -> torch.Tensor:
    """The loop of a budget plan: N model calls and N weighted sums, no scheduler.

    velocity(x, t): the model's output after guidance. inputs: latents (the noise), sigmas [T+1] and times [T] of the
    grid that the plan's steps count on. on_step(i, x, v): as in `denoise`.
    """
    x, history = inputs.latents, []
    for i, weights, scale in zip(plan.computed, plan.weights_on(inputs.sigmas), plan.scale, strict=True):
        v = velocity(x, inputs.times[i])
        steered = on_step(i, x, v) if on_step is not None else None
        history = [v if steered is None else steered, *history][: plan.anchors]
        x = jump(x, history, weights, scale)
    return x
