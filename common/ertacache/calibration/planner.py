"""Schedules of budget plans: which N of T steps to compute.

Steps 0 = c_1 < … < c_N are computed. From each of them the run jumps straight to the next one (or to the end, T) along
a weighted sum of the newest H velocities:

    x_k = x_c + Σ_j w_j v_{c_j},   c = c_1 > c_2 > … the newest H computed steps, newest first               (jump)

H is the history length, the order of this linear multistep method; (c_1, c_2, …) is the history of the jump. Some
schedules are optimal for costs read off the Gram matrix of the target's trajectories (gram.py), by dynamic programming;
others are uniform or bent. Which is best shows when they are rolled out, and the weights of a plan are fitted on the
way (budget.py). Everything is numpy in float64; T ≈ 50 takes seconds. No function here calls a model.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from ertacache.calibration.gram import Gram
from ertacache.numerics.jump import adams_bashforth
from ertacache.numerics.multistep import Predictor

RIDGE = 1e-6  # fraction of the diagonal added to the normal equations
REWEIGHTED = 8  # solutions of the normal equations in `robust_weights`
LEAST_SHARE = 1e-6  # least error of a prompt in `robust_weights`, relative to the mean
DENSER_AT_THE_START, DENSER_AT_THE_END = 0.75, 1.5  # exponents of `bent_schedule`
START_HISTORY, START_NOISE = 2, 3.0  # of runs that begin late; see `late_start_weights`
LARGEST_TABLE = 2**23  # entries of a table of jump costs (64 MiB): 202 steps with H = 2, 52 with H = 3

Schedule = tuple[int, ...]  # computed steps, ascending from 0


def histories(steps: int, history_length: int) -> list[tuple[int, ...]]:
    """Return all histories a jump may have, newest step first: H computed steps, or fewer that reach back to step 0."""
    full = [t[::-1] for t in combinations(range(steps), history_length)]
    early = [(*t[::-1], 0) for m in range(history_length - 1) for t in combinations(range(1, steps), m)]
    return full + early


def jump_costs(gram: Gram, history_length: int = 2, scaled: bool = False) -> np.ndarray:
    """Return min_w ‖(x_k − x_c) − Σ_j w_j v_{c_j}‖² for every history c = c_1 > c_2 > … and target step k > c.

    Args:
        gram: Of the target's trajectories.
        history_length: H.
        scaled: Whether x_c has a coefficient of its own too (solvers with x' = a x + b v, a ≠ 1).

    Returns:
        Costs, shape [T+1] * H + [T+1]: one axis per step of the history, newest first, where index T means "none", and
        one for k. ∞ where the order is impossible.
    """
    steps, g = gram.steps, gram.matrix
    costs = np.full((steps + 1,) * (history_length + 1), np.inf)
    by_length: dict[int, list[tuple[int, ...]]] = {}
    for history in histories(steps, history_length):
        by_length.setdefault(len(history), []).append(history)
    for length, group in by_length.items():
        index = np.array(group)  # [M, length]
        newest, rows = index[:, 0], gram.v(index)
        if scaled:
            rows = np.concatenate([rows, newest[:, None]], axis=1)
        targets = np.arange(steps + 1)
        normal = g[rows[:, :, None], rows[:, None, :]]  # [M, R, R]
        # Scalar products of x_k − x_c with the regressors, [M, R, T+1], and its squared norms, [M, T+1].
        moment = g[rows[:, :, None], targets] - g[rows, newest[:, None]][:, :, None]
        square = g[targets, targets] - 2 * g[newest[:, None], targets] + g[newest, newest][:, None]
        weights = np.linalg.solve(_with_ridge(normal), moment)
        error = square - 2 * (weights * moment).sum(1) + (weights * (normal @ weights)).sum(1)
        error = np.where(targets > newest[:, None], np.maximum(error, 0.0), np.inf)
        axes = [index[:, j] if j < length else np.full(len(index), steps) for j in range(history_length)]
        costs[tuple(axes)] = error
    return costs


def _with_ridge(normal: np.ndarray) -> np.ndarray:
    """Return normal [..., R, R] with a small addition on its diagonal, so that equal velocities keep it regular."""
    diagonal = np.einsum("...ii->...i", normal)
    floor = np.finfo(np.float64).tiny
    return normal + np.einsum("...i,ij->...ij", RIDGE * diagonal + floor, np.eye(normal.shape[-1]))


def best_schedules(costs: np.ndarray, largest: int) -> dict[int, Schedule]:
    """Return for each budget N = 1 … `largest` the schedule with the least sum of its jumps' costs.

    Exact dynamic programming over histories, O(N T^(H+1)) operations.

    Args:
        costs: Of `jump_costs`.
        largest: Largest budget, at most T.
    """
    history_length, steps = costs.ndim - 1, len(costs) - 1
    best = np.full((steps + 1,) * history_length, np.inf)  # best[c_1, …, c_H] after n computed steps
    best[(0, *[steps] * (history_length - 1))] = 0.0
    parents, schedules = [], {}
    for budget in range(1, largest + 1):
        total = best + costs[..., steps]
        history = np.unravel_index(np.argmin(total), total.shape)
        schedules[budget] = _trace(history, parents, steps)
        step = best[..., None] + costs  # [c_1, …, c_H, k]
        parents.append(np.moveaxis(step.argmin(history_length - 1), -1, 0))  # the oldest step c_H, [k, c_1, …, c_{H−1}]
        best = np.moveaxis(step.min(history_length - 1), -1, 0).copy()
        best[steps] = np.inf  # T is the end, not a step to compute
    return schedules


def _trace(history: Sequence[int], parents: list[np.ndarray], none: int) -> Schedule:
    """Return the computed steps that led to a history (newest first), from the tables of oldest steps."""
    history, schedule = tuple(int(c) for c in history), []
    for table in reversed(parents):
        schedule.append(history[0])
        history = (*history[1:], int(table[history]))
    assert history[0] == 0 and all(c == none for c in history[1:])
    return (0, *reversed(schedule))


def candidate_schedules(gram: Gram, budgets: list[int], scaled: bool = False) -> dict[int, dict[str, Schedule]]:
    """Return the different schedules to try for each budget by name, the most promising first.

    Two have the least costs, with histories of H = 2 and H = 3, where the tables are not too large. The others know
    nothing of the model: uniform in the step, without and with the last one, and bent towards either end. Which one is
    best depends on the model and the budget; calibration tries them. Names are kept in plan files.

    Args:
        gram: Of the target's trajectories.
        budgets: Numbers of computed steps.
        scaled: As in `jump_costs`.
    """
    steps = gram.steps
    lengths = [length for length in (2, 3) if (steps + 1) ** (length + 1) <= LARGEST_TABLE]
    least = {length: best_schedules(jump_costs(gram, length, scaled), max(budgets)) for length in lengths}
    candidates: dict[int, dict[str, Schedule]] = {}
    for n in budgets:
        named = {f"least cost, H = {length}": least[length][n] for length in lengths[:1]}
        named |= {
            "uniform with the last step": bent_schedule(steps, n, 1.0),
            "denser at the start": bent_schedule(steps, n, DENSER_AT_THE_START),
            "denser at the end": bent_schedule(steps, n, DENSER_AT_THE_END),
        }
        named |= {f"least cost, H = {length}": least[length][n] for length in lengths[1:]}
        named["uniform"] = uniform_schedule(steps, n)
        candidates[n] = {}
        for name, schedule in named.items():
            if schedule not in candidates[n].values():
                candidates[n][name] = schedule
    return candidates


def balanced(grams: Sequence[Gram], scaled: bool = False) -> Gram:
    """Return the sum of the Gram matrices of single prompts in which each counts by the ratio of its errors.

    In a plain sum the prompts with the largest errors would place the steps. Here each is divided by its own error
    along a uniform schedule of a third of the steps, with weights fitted on all; iterated, as in `robust_weights`.

    Args:
        grams: One of each prompt.
        scaled: As in `jump_costs`.
    """
    steps, elements, prompts = grams[0].steps, sum(g.elements for g in grams), sum(g.prompts for g in grams)
    matrices, schedule = np.stack([gram.matrix for gram in grams]), uniform_schedule(steps, max(2, steps // 3))
    shares = np.ones(len(grams))
    for _ in range(REWEIGHTED):
        total = Gram(np.einsum("p,pij->ij", shares, matrices), elements, prompts)
        misses = _misses(schedule, *offline_weights(total, schedule, 3, scaled), steps)
        errors = np.maximum(np.einsum("ji,pik,jk->p", misses, matrices, misses), 0.0)
        floor = LEAST_SHARE * errors.mean() + np.finfo(np.float64).tiny
        shares = floor / np.maximum(errors, floor)
    return Gram(np.einsum("p,pij->ij", shares / shares.mean(), matrices), elements, prompts)


def _misses(schedule: Schedule, weights: np.ndarray, scale: np.ndarray, steps: int) -> np.ndarray:
    """Return what each jump of a schedule misses its target by, as a combination of the rows of a Gram matrix."""
    rows = np.zeros((len(schedule), 2 * steps + 1))
    for j, (i, k) in enumerate(zip(schedule, [*schedule[1:], steps], strict=True)):
        newest_first = schedule[j::-1][: weights.shape[1]]
        rows[j, [steps + 1 + c for c in newest_first]] = weights[j, : len(newest_first)]
        rows[j, i] += scale[j]
        rows[j, k] -= 1
    return rows


def uniform_schedule(end: int, budget: int) -> Schedule:
    """Return `budget` steps from 0 on, at equal distances to the step `end`, rounded."""
    return tuple(round(i * end / budget) for i in range(budget))


def bent_schedule(steps: int, budget: int, power: float) -> Schedule:
    """Return `budget` steps from 0 to the last one, T − 1: (T − 1) (1 − (1 − u)^p) at equal distances of u, rounded.

    Args:
        steps: T.
        budget: N, from 2 to T.
        power: p; 1 is uniform, above 1 denser at the end.
    """
    bent = np.rint((steps - 1) * (1 - (1 - np.linspace(0, 1, budget)) ** power)).astype(int)
    places = np.arange(budget)
    apart = np.maximum.accumulate(bent - places) + places  # no step twice
    return tuple(np.minimum(apart, steps - budget + places).tolist())


def solve_weights(normal: np.ndarray, moment: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Return argmin_w ‖y − V w‖² + ridge ‖w − prior‖²_diag; never a larger ‖y − V w‖² than the prior's.

    The ridge is `RIDGE` times the diagonal: it bounds the weights of nearly equal velocities.

    Args:
        normal: VᵀV, [R, R].
        moment: Vᵀy, [R].
        prior: Weights that the ridge pulls to, [R].
    """
    return prior + np.linalg.solve(_with_ridge(normal), moment - normal @ prior)


def robust_weights(normals: np.ndarray, moments: np.ndarray, squares: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Return argmin_w Σ_p log ‖y_p − V_p w‖² over prompts p, with the ridge of `solve_weights`.

    Where a prompt's run has tipped to another picture its error is some hundred times that of the others. Least squares
    over all prompts would give the weights up for that one; here every prompt counts by the ratio of its errors. It is
    solved by iteratively reweighted least squares, with the inverse of each prompt's squared error as its share, which
    never leaves a larger sum than the prior's.

    Args:
        normals: V_pᵀV_p, [P, R, R].
        moments: V_pᵀy_p, [P, R].
        squares: ‖y_p‖², [P].
        prior: Weights that the ridge pulls to, and where the solution begins, [R].
    """
    weights = prior
    for _ in range(REWEIGHTED):
        errors = squares - 2 * moments @ weights + np.einsum("i,pij,j->p", weights, normals, weights)
        floor = LEAST_SHARE * np.abs(errors).mean() + np.finfo(np.float64).tiny
        shares = floor / np.maximum(errors, floor)
        normal, moment = np.einsum("p,pij->ij", shares, normals), shares @ moments
        weights = solve_weights(normal, moment, prior)
    return weights


def fit_predictor(grams: np.ndarray, history_length: int, fitted: int) -> tuple[np.ndarray, np.ndarray]:
    """Fit the prediction of a computed step's velocity from those before it (drift.py).

    Args:
        grams: Scalar products of the velocity (row 0) and those before it, newest first, per prompt, [P, R, R].
        history_length: Number of weights.
        fitted: Number of prompts, from the first, that the weights are fitted on.

    Returns:
        Weights [history_length], 0 where there are fewer velocities, and each prompt's squared error [P].
    """
    weights, total = np.zeros(history_length), grams[:fitted].sum(0)
    count = grams.shape[1] - 1
    if count == 0:
        return weights, np.zeros(len(grams))
    prior = np.array([1.0] + [0.0] * (count - 1))  # the newest velocity itself
    weights[:count] = solve_weights(total[1:, 1:], total[1:, 0], prior)
    error = np.concatenate([[1.0], -weights[:count]])
    return weights, np.maximum(np.einsum("i,pij,j->p", error, grams, error), 0.0)


def late_start_weights(
    gram: Gram, schedule: Schedule, count: int, scaled: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Fit the first jumps of a run that begins at a later step, as image-to-image does.

    Such a run begins with an image and noise, off the trajectories of the calibration, and its first velocities may
    change as those never do. So its jumps combine the newest two velocities only, and the very first one counts less
    in the second jump: with an error of its own, whose mean square is `START_NOISE` times that of its change over one
    step.

    Args:
        gram: Of the target's trajectories.
        schedule: The step at which the run begins, and the computed steps after it.
        count: Number of jumps, H.
        scaled: As in `jump_costs`.

    Returns:
        Weights [H, H] and scales [H]; 0 and 1 where there is no jump.
    """
    weights, scale = np.zeros((count, count)), np.ones(count)
    ends = [*schedule[1:], gram.steps]
    for j, (i, target) in enumerate(zip(schedule[:count], ends, strict=False)):
        rows = [gram.v(c) for c in schedule[max(0, j + 1 - START_HISTORY) : j + 1][::-1]]
        velocities, rows = len(rows), rows + ([i] if scaled else [])
        normal = gram.matrix[np.ix_(rows, rows)].copy()
        if j == 1:
            first, second = gram.v(schedule[0]), gram.v(schedule[0] + 1)
            change = gram.matrix[[first, second], [first, second]].sum() - 2 * gram.matrix[first, second]
            normal[1, 1] += START_NOISE * change
        moment = gram.matrix[rows, target] - gram.matrix[rows, i]
        solution = np.linalg.solve(_with_ridge(normal), moment)
        weights[j, :velocities], scale[j] = solution[:velocities], 1 + solution[velocities] if scaled else 1.0
    return weights, scale


def euler_weights(sigmas: np.ndarray, schedule: Schedule, history_length: int) -> np.ndarray:
    """Return the jumps of fewer Euler steps: s_{c_{k+1}} − s_{c_k} on the newest velocity, 0 on the others.

    Args:
        sigmas: The grid, [T+1].
        schedule: N computed steps.
        history_length: H.

    Returns:
        Weights, [N, H].
    """
    weights = np.zeros((len(schedule), history_length))
    weights[:, 0] = np.diff(np.asarray(sigmas, np.float64)[[*schedule, len(sigmas) - 1]])
    return weights


def projection_bound(gram: Gram, schedule: Schedule, scaled: bool = False) -> float:
    """Return min_w ‖(x_T − x_0) − Σ_c w_c v_c‖² / elements, a lower bound for any weighting of these velocities.

    The velocities are those of the target's trajectory, so that the bound holds for plans that stay near it.

    Args:
        gram: Of the target's trajectories.
        schedule: The computed steps c.
        scaled: As in `jump_costs`.
    """
    rows = [gram.v(c) for c in schedule] + ([0] if scaled else [])
    normal = gram.matrix[np.ix_(rows, rows)]
    moment = gram.matrix[rows, gram.steps] - gram.matrix[rows, 0]
    square = gram.matrix[[gram.steps, 0], [gram.steps, 0]].sum() - 2 * gram.matrix[gram.steps, 0]
    weights = np.linalg.lstsq(normal, moment, rcond=None)[0]
    return max(0.0, float(square - moment @ weights)) / gram.elements


def neighbours(schedule: Schedule, steps: int) -> list[Schedule]:
    """Return the schedules in which one computed step, not the first, moves by one or by two within 1 … `steps` − 1.

    Late ones come first: their rollouts share the most model calls with the schedule's own.
    """
    moved_schedules = []
    for place in reversed(range(1, len(schedule))):
        for step in (schedule[place] + d for d in (-1, 1, -2, 2)):
            if step not in schedule and 0 < step < steps:
                moved_schedules.append(tuple(sorted((*schedule[:place], step, *schedule[place + 1 :]))))
    return moved_schedules


def noise_gain(weights: np.ndarray, scale: np.ndarray) -> float:
    """Return the standard deviation that independent noise of deviation 1 in every velocity has in the final latents.

    Velocities in return to noisy latents are taken as they are, so that gains tell plans apart, not models.

    Args:
        weights: Of the jumps, [N, H], newest velocity first.
        scale: Their coefficients of the latents, [N].
    """
    total = np.zeros(len(weights))  # of each velocity in the latents after the jumps so far
    for k, (row, factor) in enumerate(zip(weights, scale, strict=True)):
        total *= factor
        newest_first = total[k::-1][: len(row)]  # a view
        newest_first += row[: len(newest_first)]
    return float(np.sqrt(np.square(total).sum()))


# --- weights without a rollout, for comparison ---------------------------------------------------------------------


def offline_weights(
    gram: Gram, schedule: Schedule, history_length: int, scaled: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Fit jumps on the target's trajectory instead of the plan's own.

    Args:
        gram: Of the target's trajectories.
        schedule: N computed steps.
        history_length: H.
        scaled: As in `jump_costs`.

    Returns:
        Weights [N, H] and scales [N].
    """
    weights, scale = np.zeros((len(schedule), history_length)), np.ones(len(schedule))
    for k, (i, target) in enumerate(zip(schedule, [*schedule[1:], gram.steps], strict=True)):
        rows = [gram.v(c) for c in schedule[max(0, k + 1 - history_length) : k + 1][::-1]]
        count, rows = len(rows), rows + ([i] if scaled else [])
        moment = gram.matrix[rows, target] - gram.matrix[rows, i]
        solution = np.linalg.solve(_with_ridge(gram.matrix[np.ix_(rows, rows)]), moment)
        weights[k, :count], scale[k] = solution[:count], 1 + solution[count] if scaled else 1.0
    return weights, scale


def fitted_predictor(gram: Gram, history_length: int) -> Predictor:
    """Return linear prediction of a velocity from the newest H computed ones, by least squares on the target's
    trajectories: the form of learned linear predictors in this field.

    Args:
        gram: Of the trajectories.
        history_length: H.
    """

    def predictor(computed: tuple[int, ...], t: int) -> list[float]:
        newest = gram.v(np.array(computed[-history_length:]))
        cross = gram.matrix[np.ix_(newest, gram.v(np.array([t])))]
        weights = np.linalg.solve(_with_ridge(gram.matrix[np.ix_(newest, newest)]), cross)[:, 0]
        return [0.0] * (len(computed) - len(newest)) + weights.tolist()

    return predictor


def adams_bashforth_weights(sigmas: np.ndarray) -> np.ndarray:
    """Return the second-order Adams–Bashforth method as jumps on any grid [N+1], Euler in the first step.

    Returns:
        Weights for the newest two velocities, [N, 2].
    """
    weights, levels = np.zeros((len(sigmas) - 1, 2)), np.asarray(sigmas, np.float64)
    for k in range(len(weights)):
        row = adams_bashforth(lambda s, s_next: (1.0, s_next - s), levels, [k, k - 1][: k + 1], k + 1)[1]
        weights[k, : len(row)] = row
    return weights
