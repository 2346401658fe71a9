"""Optimal stepsizes: the dynamic program against a search through all schedules, and velocities within a call."""

from itertools import pairwise

import pytest
import torch

from ertacache.calibration.optimal_steps import optimal_steps, velocities_in_call
from ertacache.calibration.paused_call import PausedCalls
from helpers import PROMPTS, CallCounter, with_prompts
from tiny_pipelines import flux, wan

STEPS = 8
GRID = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64) ** 2
NOISE = torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=torch.float64)
CALLS = {"flux": flux, "wan": wan}


def velocity(x, j):
    return torch.sin(3 * x) + GRID[j] * x.flip(1)


def euler(x, schedule):
    for j, k in pairwise([*schedule, STEPS]):
        x = x + (GRID[k] - GRID[j]) * velocity(x, j)
    return x


def found(budget, asked=None):
    """The schedule; asked: gets the steps of each pass."""

    def velocities(states):
        if asked is not None:
            asked.append(sorted(states))
        return {j: velocity(x, j) for j, x in states.items()}

    targets = [NOISE]
    for j in range(STEPS):
        targets.append(targets[j] + (GRID[j + 1] - GRID[j]) * velocity(targets[j], j))

    def first_order(j, k):
        return 1.0, (GRID[k] - GRID[j]).item()

    return optimal_steps(velocities, first_order, NOISE, targets.__getitem__, STEPS, budget)


def test_two_steps_are_the_best_two():
    final = euler(NOISE, range(STEPS))
    best = min(range(1, STEPS), key=lambda k: (euler(NOISE, (0, k)) - final).square().mean())
    assert found(2) == (0, best)


def test_it_makes_as_many_steps_as_asked_for_and_calls_each_state_once():
    asked = []
    schedule = found(4, asked)
    assert len(schedule) == 4 and schedule[0] == 0 and list(schedule) == sorted(set(schedule))
    assert [len(steps) for steps in asked] == [1, *[STEPS - 4 + 1] * 3]
    assert found(STEPS) == tuple(range(STEPS)) and found(1) == (0,)


@pytest.mark.parametrize("name", ["flux", pytest.param("wan", marks=pytest.mark.slow)])
def test_a_pipelines_call_gives_the_velocities_of_latents_that_it_is_handed(name):
    """At the uncached run's own latents they are its velocities; at others those of a call that stands there."""
    tiny = with_prompts(CALLS[name]())
    sampler = PausedCalls(tiny.pipe, {**tiny.arguments, "num_inference_steps": STEPS})
    latents, velocities = {}, {}

    def keep(i, x, v):
        latents[i], velocities[i] = x.clone(), v.clone()

    with sampler:
        sampler.denoise(tiny.pipe, sampler.prepare(tiny.pipe, PROMPTS[:2], [0, 1]), None, keep)
    states = {step: latents[step] for step in (2, 3, 6)}
    with CallCounter(tiny.pipe.transformer) as calls:
        again = velocities_in_call(sampler, PROMPTS[:2], [0, 1], states)
    assert calls.count == 4 * tiny.branches
    for step in states:
        assert torch.allclose(again[step], velocities[step].float(), atol=1e-5)
    states[3] = latents[0]
    other = velocities_in_call(sampler, PROMPTS[:2], [0, 1], states)
    assert not torch.allclose(other[3], again[3], atol=1e-3) and torch.allclose(other[6], again[6], atol=1e-5)
