"""Calibration of budget plans: weights for the schedules of planner.py, fitted on the plan's own trajectory.

The target's trajectory is run once over the prompts, which gives the Gram matrix and the latents to aim at. A rollout
then takes all prompts through a schedule together (N calls per prompt): at every computed step the weights of the next
jump are fitted over all prompts, from the rollout's latents to the target's. So later jumps correct a part of the
errors of earlier ones. The schedules of planner.py are rolled out, then those near the best one. Rollouts share the
model calls of the steps that they have in common from the beginning.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ertacache.calibration import planner
from ertacache.calibration.choice import METRIC, geometric_mean, typical_error
from ertacache.calibration.effort import effort_of
from ertacache.calibration.gram import Gram, products
from ertacache.calibration.planner import Schedule
from ertacache.calibration.search import HISTORY_LENGTHS, Interrupted, Search
from ertacache.calibration.session import CalibrationSession
from ertacache.calibration.trajectories import TargetTrajectories
from ertacache.numerics.jump import jump
from ertacache.plans.budget import BudgetPlan
from ertacache.plans.names import check_budget
from ertacache.plans.plan import as_tuples
from ertacache.utils import parallel
from ertacache.utils.errors import UserError
from ertacache.utils.words import counted

ROUNDING = 1e-13  # mean squared error of the final latents over their mean square, of float32
LARGE_GAP = 10.0  # dB between the error of the fit and that of held-out prompts, above which there is a warning


@dataclass(frozen=True)
class Rollout:
    """A schedule with the coefficients fitted on it.

    Attributes:
        schedule: The computed steps.
        arrays: Arrays of a `BudgetPlan`, by name.
        errors: Mean squared error of the final latents of each prompt, [P], those left out of the fit last.
        velocities: By batch of this process, velocities of the computed steps, in main memory; empty when the rollout
            was read from its checkpoint.
    """

    schedule: Schedule
    arrays: dict[str, np.ndarray]
    errors: np.ndarray
    velocities: dict[int, list[torch.Tensor]]

    @property
    def history_length(self) -> int:
        """H."""
        return self.arrays["weights"].shape[1]

    @property
    def error(self) -> float:
        """By which rollouts are compared."""
        return typical_error(self.errors)

    def shared(self, schedule: Schedule, history_length: int) -> int:
        """Return how many computed steps a rollout of another schedule shares with this one, from the beginning.

        With another H the jumps are the same until one of them has more than the smaller H of velocities.
        """
        same = next((j for j, (a, b) in enumerate(zip(self.schedule, schedule, strict=False)) if a != b), len(schedule))
        if history_length != self.history_length:
            same = min(same, min(history_length, self.history_length) + 1)
        return same


class BatchState:
    """A batch of prompts on its way through a schedule, in a model folder's loop.

    Args:
        session: The calibration's.
        inputs: Of the batch.
        schedule: The computed steps.
        known: Velocities of the first of them, which need no model call.

    Attributes:
        x: Latents, [B, …].
        history: The newest velocities, newest first.
    """

    def __init__(self, session: CalibrationSession, inputs, schedule: Schedule, known: Sequence[torch.Tensor] = ()):
        self.session, self.inputs, self.x = session, inputs, inputs.latents
        self.known = dict(zip(schedule, known, strict=False))
        self.history: list[torch.Tensor] = []

    def velocity(self, i: int) -> torch.Tensor:
        """Return the velocity at step i, a computed one."""
        if i in self.known:
            return self.known[i].to(self.x.device)
        return self.session.sampler.velocity(self.session.pipe, self.inputs, self.x, self.inputs.times[i])

    def jump(self, scale: float, weights: list[float]) -> None:
        """Move the latents to the next computed step."""
        self.x = jump(self.x, self.history, weights, scale)


class BudgetCalibration(TargetTrajectories):
    """The target's trajectory, candidate schedules and on-policy weights for one session.

    Args:
        session, target, around_pass: As of `TargetTrajectories`.
        state_of: state_of(session, inputs, schedule, known) returns the state of a batch, as `BatchState` does.
        good_enough: Mean squared error of the final latents, relative to their mean square, at which the search ends
            before its limit; 0: never.

    Raises:
        UserError: Too few prompts, or too small latents, to fit the weights.
    """

    def __init__(
        self,
        session: CalibrationSession,
        target: str = "reference",
        *,
        state_of: Callable[..., BatchState] = BatchState,
        around_pass: Callable[[], AbstractContextManager] = nullcontext,
        good_enough: float = 0.0,
    ):
        super().__init__(session, target, around_pass=around_pass)
        self.state_of, self.good_enough = state_of, good_enough
        if self.fitted * self.elements < 10 * (max(HISTORY_LENGTHS) + self.scaled):
            size = f"{self.fitted} calibration prompts of {self.elements} numbers each"
            raise UserError(f"{size} are too few to fit the weights: give more prompts, or larger latents")

    # --- rollouts ----------------------------------------------------------------------------------------------------

    def rollout(self, schedule: Schedule, history_length: int, like: Rollout | None = None) -> Rollout:
        """Take all prompts through a schedule and fit its weights on the way, N calls per prompt; stored on disk.

        Args:
            schedule: The computed steps.
            history_length: H.
            like: A rollout whose model calls are shared as far as its schedule is the same.
        """
        known = like.shared(schedule, history_length) if like and self.repeatable else 0
        velocities = {batch: vs[:known] for batch, vs in like.velocities.items()} if known else {}
        key = ["rollout", self.target.name, schedule, history_length]
        arrays = self.checkpoints.arrays(key, lambda: self.fit_schedule(schedule, history_length, velocities))
        if any(len(vs) < len(schedule) for vs in velocities.values()) or not velocities:  # it was stored
            self.session.spare(self.session.of_this_process(self.cost(schedule, history_length, like)))
            velocities = {}
        errors = arrays.pop("errors")
        return Rollout(schedule, arrays, errors, velocities)

    @property
    def repeatable(self) -> bool:
        """Whether a model call gives the same when it is left out before."""
        return getattr(self.session.sampler, "repeatable", True)

    def cost(self, schedule: Schedule, history_length: int, like: Rollout | None) -> int:
        """Return the most model calls per prompt of a rollout. Its first step has a price: pipelines repeat it."""
        shared = like.shared(schedule, history_length) if like and self.repeatable else 0
        return len(schedule) - max(0, shared - 1)

    @torch.no_grad()
    def fit_schedule(
        self, schedule: Schedule, history_length: int, velocities: dict[int, list[torch.Tensor]]
    ) -> dict[str, np.ndarray]:
        """Return the arrays and errors of a rollout.

        Each process runs its own batches; their normal equations are added in the order of batches.

        Args:
            schedule: The computed steps.
            history_length: H.
            velocities: By batch, the known velocities of the first steps; all others are appended.
        """
        batches, rows = parallel.mine(self.session.batches), []
        known = len(next(iter(velocities.values()), ()))
        with self.around_pass():
            states = {
                batch: self.state_of(self.session, self.inputs(batch), schedule, tuple(velocities.get(batch, ())))
                for batch in batches
            }
            for place, (i, k) in enumerate(zip(schedule, [*schedule[1:], self.end], strict=True)):
                grams = []
                for batch, state in states.items():
                    grams.append(self.compute(batch, state, i, k, history_length))
                    if place < known:
                        self.session.spare(int(place == 0))  # the first step has its price in `cost`
                    else:
                        self.session.called()
                        velocities.setdefault(batch, []).append(state.history[0].cpu())
                grams = np.concatenate(parallel.in_order(grams))
                rows.append(parallel.share(self.fit(grams, history_length, self.first_order(i, k))))
                for state in states.values():
                    state.jump(float(rows[-1]["scale"]), rows[-1]["weights"].tolist())
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        arrays["prediction_errors"] = arrays["prediction_errors"].T.copy()  # [P, N]
        return arrays | {"errors": self.errors_of(states)}

    def compute(self, batch: int, state: BatchState, i: int, k: int, history_length: int) -> np.ndarray:
        """Compute step i of a batch. Returns scalar products [B, R, R] from which the jump from i to k is fitted.

        The R rows are the velocities, newest first; the latents where they have a coefficient; target − latents at i
        and at k.
        """
        v = state.velocity(i)
        self.session.require_finite(v, batch, i)
        state.history = [v, *state.history][:history_length]
        errors = [self.target_latents(batch, step).to(state.x.device) - state.x.float() for step in (i, k)]
        rows = products([*state.history, *([state.x] if self.scaled else []), *errors], self.free(batch))
        return self.by_prompt(batch, rows).sum(0)

    def fit(
        self, grams: np.ndarray, history_length: int, first_order: tuple[float, float]
    ) -> dict[str, np.ndarray | float]:
        """Fit one row of each array of a plan.

        Args:
            grams: Scalar products of `compute` for every prompt, [P, R, R].
            history_length: H.
            first_order: (a, w) of the solver's own jump, to which the ridge pulls the weights.
        """
        fitted, end = grams[: self.fitted], grams.shape[1] - 2
        velocities = end - self.scaled
        prior, zero = np.zeros(end), np.zeros(end)
        prior[0], prior[velocities:] = first_order[1], first_order[0] - 1
        row = {}
        for name, scale, column, start in (("weights", "scale", -1, prior), ("repair", "repair_scale", -2, zero)):
            products_of = (fitted[:, :end, :end], fitted[:, :end, column], fitted[:, column, column])
            solved = planner.robust_weights(*products_of, start)
            row[name] = np.pad(solved[:velocities], (0, history_length - velocities))
            row[scale] = 1 + solved[velocities:].sum()
        products_of_velocities = grams[:, :velocities, :velocities]
        row["predictor"], squares = planner.fit_predictor(products_of_velocities, history_length - 1, self.fitted)
        return row | {"prediction_errors": np.sqrt(squares / self.elements)}

    def errors_of(self, states: dict[int, BatchState]) -> np.ndarray:
        """Return the mean squared error of each prompt's final latents, [P]."""
        errors = [self.squared_errors(batch, state.x) for batch, state in states.items()]
        return np.array([error for batch in parallel.in_order(errors) for error in batch])

    # --- plans -------------------------------------------------------------------------------------------------------

    def plans(self, budgets: Sequence[int], effort: str | float = "normal") -> dict[int, BudgetPlan]:
        """Return a plan for each budget; arguments as of `each_plan`."""
        return dict(zip(budgets, self.each_plan(budgets, effort), strict=True))

    def each_plan(self, budgets: Sequence[int], effort: str | float = "normal") -> Iterator[BudgetPlan]:
        """Make a plan for each budget, one by one.

        Args:
            budgets: Numbers of computed steps, from 2 to T.
            effort: quick, normal, thorough or a number of minutes.

        Raises:
            Interrupted: Ctrl-C, with the best plan of the budget in progress.
        """
        steps = self.end if self.target.sigmas is None else self.session.steps
        for budget in budgets:
            check_budget(budget, steps)
        self.effort = effort_of(effort)
        limit, uncached = self.effort.search * steps, self.end * self.target.calls_per_step
        if self.fitted == len(self.session.prompts):
            text = f"{counted(self.fitted, 'calibration prompt')}, so that none is held out to measure the plan"
            warnings.warn(f"{text}: give at least 4", stacklevel=2)
        self.session.announce(uncached + limit * len(budgets), self.effort, least=uncached + sum(budgets))
        gram = self.trajectories()
        balanced = planner.balanced(self.grams, self.scaled)
        candidates = parallel.share(planner.candidate_schedules(balanced, list(budgets), self.scaled))
        for place, budget in enumerate(budgets):
            yield self.plan(gram, candidates[budget], *self.session.allowance(limit, len(budgets) - place))

    def plan(self, gram: Gram, candidates: dict[str, Schedule], limit: int, until: float) -> BudgetPlan:
        """Roll out candidate schedules, then the best one with another history length, then those near it.

        Args:
            gram: Of the target's trajectories.
            candidates: Schedules by name, the most promising first.
            limit: Of model calls per prompt; the first rollout is made whatever it costs.
            until: Time at which the search ends, after the rollout in progress.
        """
        search, size = Search(self, candidates, limit), gram.matrix[gram.steps, gram.steps] / gram.elements
        try:
            for _ in search:
                self.session.progress.update(0, f"best error {search.best.error:.2e}")
                if search.best.error <= self.good_enough * size or parallel.share(time.monotonic() >= until):
                    break
        except KeyboardInterrupt:
            if search.best is None:
                raise
            raise Interrupted(self.plan_of(gram, search, finished=False)) from None
        self.session.spare(self.session.of_this_process(search.left))
        return self.plan_of(gram, search)

    def plan_of(self, gram: Gram, search: Search, finished: bool = True) -> BudgetPlan:
        """Return the plan of a search's best rollout."""
        best = search.best
        start_weights, start_scale = self.starts(gram, best.schedule, best.history_length)
        fitted, held_out = best.errors[: self.fitted], best.errors[self.fitted :]
        gap = 10 * np.log10(geometric_mean(held_out) / geometric_mean(fitted)) if len(held_out) else 0.0
        if gap > LARGE_GAP:
            text = f"N = {search.budget}: prompts that the fit did not use come out {gap:.0f} dB worse than its own"
            warnings.warn(f"{text}: give more prompts", stacklevel=2)
        size = gram.matrix[gram.steps, gram.steps] / gram.elements
        if search.budget < self.end and geometric_mean(best.errors) < ROUNDING * size:
            text = f"N = {search.budget}: the plan's error is at the level of rounding, which is too good"
            warnings.warn(f"{text}: check that the uncached results depend on the prompts and the noise", stacklevel=2)
        return BudgetPlan(
            requirements=self.session.calibrated,
            computed=tuple(self.begin + i for i in best.schedule),
            begin=self.begin,
            end=0 if self.target.sigmas is not None or self.stop == self.session.steps else self.stop,
            native_sigmas=tuple(self.native_sigmas.tolist()),
            target=self.target.name,
            sigmas=() if self.target.sigmas is None else tuple(self.target.sigmas.tolist()),
            predicted_error=geometric_mean(fitted),
            held_out_error=geometric_mean(held_out) if len(held_out) else None,
            provenance=self.provenance(gram, search, finished),
            start_weights=as_tuples(start_weights.tolist()),
            start_scale=as_tuples(start_scale.tolist()),
            **{name: as_tuples(array.tolist()) for name, array in best.arrays.items()},
        )

    def starts(self, gram: Gram, schedule: Schedule, history_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the weights [T, H, H] and scales [T, H] of runs that begin at a later step (plans/budget.py).

        On a grid of the target's own a run begins at the native step's nearest level.
        """
        native, steps = self.native_sigmas.cpu().double().numpy(), len(self.native_sigmas) - 1
        weights, scales = np.zeros((steps, history_length, history_length)), np.ones((steps, history_length))
        own = self.target.sigmas
        grid = native[self.begin : self.stop + 1] if own is None else own.cpu().double().numpy()
        for step in range(self.begin + 1, steps if own is not None else self.stop):
            begin = int(np.abs(grid[:-1] - native[step]).argmin())
            later = [c for c in schedule if c > begin]
            fitted = planner.late_start_weights(gram, (begin, *later), history_length, self.scaled)
            weights[step], scales[step] = fitted
            end = grid[later[0] if later else -1]
            if grid[begin] != end:
                weights[step, 0] *= (native[step] - end) / (grid[begin] - end)
        return weights, scales

    def provenance(self, gram: Gram, search: Search, finished: bool) -> dict[str, Any]:
        best, arrays = search.best, search.best.arrays
        provenance = self.session.provenance(self.checkpoints, search.chosen, search.errors)
        provenance["prompts"] = {**provenance["prompts"], "fitted": self.fitted}
        provenance["calibration"] |= {
            "error_metric": METRIC,
            "rollouts": len(search.tried),
            "finished": finished,
            "effort": self.effort.name,
            "projection_bound": planner.projection_bound(gram, best.schedule, self.scaled),
            "noise_gain": planner.noise_gain(arrays["weights"], arrays["scale"]),
            "noise_gain_uncached": self.uncached_noise_gain(),
            **self.target.facts(),
        }
        return provenance

    def uncached_noise_gain(self) -> float:
        """Return the noise gain of the solver's own steps."""
        steps = [self.first_order(i, i + 1) for i in range(self.end)]
        return planner.noise_gain(np.array([[w] for _, w in steps]), np.array([a for a, _ in steps]))

    def finish(self) -> None:
        """Delete the checkpoints; call it once the plans are saved."""
        self.session.finish(self.checkpoints)
