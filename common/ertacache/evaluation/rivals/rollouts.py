"""What the searches of rivals ask of the model: uncached velocities, rollouts of schedules, and OSS's own states.

All of it runs on the first calibration prompts, in their batches, beside a `TargetTrajectories` that holds the uncached
trajectories. Every rank does the same work; callers share what comes out.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from ertacache.calibration import optimal_steps as oss
from ertacache.calibration.planner import Schedule
from ertacache.calibration.trajectories import TargetTrajectories
from ertacache.numerics.jump import jump
from ertacache.numerics.multistep import predicted_jumps, reused, solver_matrix


class Part(NamedTuple):
    """The first prompts of a batch: its number, how many, and their inputs."""

    batch: int
    size: int
    inputs: object


def parts(calibration: TargetTrajectories, count: int | None = None) -> Iterator[Part]:
    """Yield the batches of the first `count` calibration prompts, the last one cut; None for all prompts."""
    session = calibration.session
    stop = len(session.prompts) if count is None else count
    for batch, start in enumerate(session.starts):
        part = slice(start, min(start + session.batch_size, stop))
        if part.start < part.stop:
            prompts, seeds = session.prompts[part], session.seeds[part]
            inputs = session.sampler.prepare(session.pipe, prompts, seeds, **session.settings)
            yield Part(batch, part.stop - part.start, inputs)


@torch.no_grad()
def uncached_velocities(calibration: TargetTrajectories, part: Part) -> list[torch.Tensor]:
    """Return the velocities [B, …] of an uncached run at all T steps, float32 on the CPU; T model calls per prompt."""
    velocities: list[torch.Tensor] = []
    session = calibration.session
    session.sampler.denoise(session.pipe, part.inputs, None, lambda i, x, v: velocities.append(v.float().cpu()))
    return velocities


# --- OSS -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def optimal_steps(calibration: TargetTrajectories, budget: int, prompts: int | None = None) -> Schedule:
    """Return the steps of OSS (Pei et al., 2025, arXiv 2503.21774), by dynamic programming on the student's states.

    One schedule for all prompts, by `calibration.optimal_steps`. About N (T − N) model calls per prompt.

    Args:
        calibration: With the uncached trajectories.
        budget: N.
        prompts: How many, from the first; None for all.
    """
    calibration.trajectories()
    session, batches = calibration.session, list(parts(calibration, prompts))
    sizes = [p.size for p in batches]

    def target_latents(k: int) -> torch.Tensor:
        return torch.cat([calibration.target_latents(p.batch, k)[: p.size] for p in batches])

    def velocities(states: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        return {
            j: torch.cat([at(p, j, x) for p, x in zip(batches, states[j].split(sizes), strict=True)]) for j in states
        }

    def at(p: Part, j: int, x: torch.Tensor) -> torch.Tensor:
        v = session.sampler.velocity(session.pipe, p.inputs, x.to(p.inputs.latents), p.inputs.times[j])
        return v.float().cpu()

    noise = torch.cat([p.inputs.latents.float().cpu() for p in batches])
    return oss.optimal_steps(velocities, calibration.first_order, noise, target_latents, calibration.end, budget)


# --- errors on the uncached trajectory -------------------------------------------------------------------------------


def segment_errors(gram: np.ndarray, solver: np.ndarray) -> np.ndarray:
    """Return the squared error of reusing v_i on the steps after i, in the latents at k: ‖Σ_t A_{k,1+t} (v_i − v_t)‖².

    Args:
        gram: Gram matrix of trajectories, [2T+1, 2T+1] (calibration/gram.py).
        solver: Solver matrix A, [T+1, 1+T].

    Returns:
        Errors [T, T+1]; 0 where not i < k − 1.
    """
    steps = len(solver) - 1
    velocities, errors = gram[steps + 1 :, steps + 1 :], np.zeros((steps, steps + 1))
    for i in range(steps):
        for k in range(i + 2, steps + 1):
            row = np.zeros(steps)
            row[i + 1 : k] = -solver[k, i + 2 : k + 1]
            row[i] = -row[i + 1 : k].sum()
            errors[i, k] = max(0.0, row @ velocities @ row)
    return errors


def extrapolation_errors(velocities: Sequence[torch.Tensor], longest: int) -> np.ndarray:
    """Return E[i, j, t], the mean absolute error of v_j + (v_j − v_i) / (j − i) · (t − j) for v_t, summed over prompts.

    Args:
        velocities: Of T steps, [B, …].
        longest: Largest j − i, and above every t − j.

    Returns:
        Errors [T, T, T], 0 where not i < j < t within these distances.
    """
    steps, errors = len(velocities), np.zeros((len(velocities),) * 3)
    for j in range(1, steps):
        for i in range(max(0, j - longest), j):
            slope = (velocities[j] - velocities[i]) / (j - i)
            for t in range(j + 1, min(steps, j + longest)):
                error = velocities[j] + slope * (t - j) - velocities[t]
                errors[i, j, t] = error.abs().flatten(1).mean(1).sum().item()
    return errors


# --- rollouts --------------------------------------------------------------------------------------------------------


class Rollouts:
    """Runs of schedules that reuse the last velocity on skipped steps, with the model's own solver.

    Args:
        calibration: With the uncached trajectories.
        prompts: How many, from the first.
        solver: Solver matrix; by default that of the first prompt's run.

    Attributes:
        calls: Model calls so far, over all prompts.
    """

    def __init__(self, calibration: TargetTrajectories, prompts: int, solver: np.ndarray | None = None):
        self.calibration, self.parts = calibration, list(parts(calibration, prompts))
        calibration.trajectories()
        self.solver = matrix_of(calibration) if solver is None else solver
        self.prompts, self.calls = prompts, 0
        self.last: tuple[Schedule, list[list[torch.Tensor]]] = ((), [[] for _ in self.parts])

    @cached_property
    def uncached(self) -> list[list[torch.Tensor]]:
        """The uncached velocities of each part."""
        self.calls += self.calibration.end * self.prompts
        return [uncached_velocities(self.calibration, part) for part in self.parts]

    @torch.no_grad()
    def error(self, schedule: Schedule, uncached: int = 0) -> float:
        """Return the mean squared error of the final latents over the prompts.

        The velocities of the steps that the schedule has in common with the last one from the beginning are kept.

        Args:
            schedule: The computed steps.
            uncached: So many of the first of them are those of the uncached run, all from 0 on.
        """
        weights, scales = predicted_jumps(self.solver, schedule, reused)
        session, squares, kept = self.calibration.session, [], self.known(schedule, uncached)
        for part, velocities in zip(self.parts, kept, strict=True):
            self.calls += part.size * (len(schedule) - len(velocities))
            x, history = part.inputs.latents, []
            for place, (step, row, scale) in enumerate(zip(schedule, weights.tolist(), scales.tolist(), strict=True)):
                if place == len(velocities):
                    v = session.sampler.velocity(session.pipe, part.inputs, x, part.inputs.times[step])
                    velocities.append(v.cpu())
                history = [velocities[place].to(x.device), *history][: weights.shape[1]]
                x = jump(x, history, row, scale)
            target = self.calibration.target_latents(part.batch, self.calibration.end)[: part.size]
            squares += (x.float().cpu() - target).square().flatten(1).mean(1).tolist()
        self.last = (schedule, kept)
        return float(np.mean(squares))

    def known(self, schedule: Schedule, uncached: int) -> list[list[torch.Tensor]]:
        """Return for each part the velocities of the first steps of a schedule that need no model call."""
        if uncached:
            return [velocities[:uncached] for velocities in self.uncached]
        pairs = zip(schedule, self.last[0], strict=False)
        same = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(schedule), len(self.last[0])))
        return [velocities[:same] for velocities in self.last[1]]


def matrix_of(calibration: TargetTrajectories) -> np.ndarray:
    """Return the solver matrix of the model, on the uncached run's grid."""
    first = next(parts(calibration, 1))
    return solver_matrix(calibration.session.sampler, calibration.session.pipe, first.inputs)
