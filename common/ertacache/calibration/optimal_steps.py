"""Optimal stepsizes (OSS, arXiv 2503.21774): a schedule by dynamic programming on the states of fewer solver steps.

After n steps the first-order solver may stand at any step j of the uncached run's grid, in the best state x_j^n that n
steps have led to. From each of these states it jumps to every later step k, and of all that arrive at k the one nearest
to the uncached run's latents is kept:

    x_k^{n+1} = a x_j^n + w v(x_j^n, j)    with the j that has the least ‖x_k^{n+1} − x_k‖²

So every jump starts from where the solver is, not from the uncached run; one schedule serves all prompts.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from ertacache.calibration.paused_call import PausedCalls

Velocities = Callable[[Mapping[int, torch.Tensor]], Mapping[int, torch.Tensor]]


def optimal_steps(
    velocities: Velocities,
    first_order: Callable[[int, int], tuple[float, float]],
    noise: torch.Tensor,
    target_latents: Callable[[int], torch.Tensor],
    steps: int,
    budget: int,
) -> tuple[int, ...]:
    """Return the schedule of optimal stepsizes. It takes 1 + (N − 1)(T − N + 1) model calls per prompt.

    Args:
        velocities: velocities({j: x_j}) returns {j: v(x_j, j)}, for latents [B, …] at several steps.
        first_order: first_order(j, k) returns (a, w) of the solver's first-order jump x_k = a x_j + w v_j.
        noise: Latents before the first step, [B, …].
        target_latents: target_latents(k) returns the uncached run's latents before step k, [B, …]; the final ones at T.
        steps: T.
        budget: N, from 1 to T.

    Returns:
        The N computed steps, ascending from 0.
    """
    states, paths = {0: noise}, {0: (0,)}
    for n in range(budget):
        is_last = n == budget - 1
        reached: dict[int, tuple[float, torch.Tensor, tuple[int, ...]]] = {}
        found = velocities(states)
        ends = [steps] if is_last else range(n + 1, steps - (budget - n - 2))
        for k in ends:
            target = target_latents(k)
            for j in (j for j in states if j < k):
                scale, weight = first_order(j, k)
                x = scale * states[j] + weight * found[j]
                error = (x - target).square().mean().item()
                if k not in reached or error < reached[k][0]:
                    reached[k] = (error, x, (*paths[j], k))
        states = {k: x for k, (_, x, _) in reached.items()}
        paths = {k: path for k, (_, _, path) in reached.items()}
    return paths[steps][:-1]


def velocities_in_call(
    sampler: PausedCalls, prompts: Sequence, seeds: Sequence[int], states: Mapping[int, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """Return the velocities of latents at several steps, by one call of the pipeline that is handed them on its way.

    Args:
        sampler: The pipeline's calls.
        prompts, seeds: Of the batch.
        states: Latents [B, …] by step.

    Returns:
        Velocities, float32 on the CPU. One model call for each step, and one for step 0, at which a call begins.
    """
    schedule = sorted({0, *states})
    found = {}
    with sampler:
        call = sampler.prepare(sampler.pipe, prompts, seeds).restricted_to(tuple(schedule), ())
        for step, following in zip(schedule, [*schedule[1:], None], strict=True):
            if step in states:
                found[step] = call.velocity.float().cpu()
            call.go_on(call.latents if following is None else states[following])
    return found
