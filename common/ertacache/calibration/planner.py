"""Budget plans: which N of T steps to compute, and how to jump from one to the next.

Steps 0 = c_1 < … < c_N are computed. From one the run jumps straight to the next (or to the end, T) along a weighted
sum of the newest H outputs, its anchors:

    x_{k} = x_{c} + Σ_j w_j v_{c_j},   c_1 = c > c_2 > …: the newest anchors first.                          (jump)

The schedule is found exactly, by dynamic programming over costs read off the Gram matrix of reference trajectories; the
weights by least squares on the plan's own trajectory (`budget.py`). Works on numpy arrays in float64; T ≈ 50 takes
seconds. Nothing here calls a model.
"""

from itertools import combinations

import numpy as np

from ertacache.calibration.gram import Gram

RIDGE = 1e-6  # share of the diagonal added to the normal equations
LARGEST_TABLE = 2**25  # entries of a table of jump costs (256 MiB): 75 candidate steps with 3 anchors

Schedule = tuple[int, ...]


def anchor_tuples(steps: int, anchors: int) -> list[tuple[int, ...]]:
    """The histories a jump may start from, newest step first: H computed steps, or fewer that reach back to step 0."""
    full = [t[::-1] for t in combinations(range(steps), anchors)]
    early = [(*t[::-1], 0) for m in range(anchors - 1) for t in combinations(range(1, steps), m)]
    return full + early


def jump_costs(gram: Gram, anchors: int = 2, scaled: bool = False) -> np.ndarray:
    """min_w ‖(x_k − x_c) − Σ_j w_j v_{c_j}‖² for every history c_1 > c_2 > … and target k > c_1, on the reference.

    Returns [T+1] * H + [T+1]: one axis an anchor, newest first, where index T means "none", and the target k. ∞ where
    the order is impossible. scaled: x_c has a weight of its own too (solvers with x' = a x + b v, a ≠ 1).
    """
    steps, g = gram.steps, gram.matrix
    costs = np.full((steps + 1,) * (anchors + 1), np.inf)
    by_length: dict[int, list] = {}
    for history in anchor_tuples(steps, anchors):
        by_length.setdefault(len(history), []).append(history)
    for length, histories in by_length.items():
        index = np.array(histories)  # [M, length]
        newest, rows = index[:, 0], gram.v(index)
        if scaled:
            rows = np.concatenate([rows, newest[:, None]], axis=1)
        targets = np.arange(steps + 1)
        normal = g[rows[:, :, None], rows[:, None, :]]  # [M, R, R]
        # Moments of (x_k − x_c) with the regressors, [M, R, T+1], and its own squares, [M, T+1].
        moment = g[rows[:, :, None], targets] - g[rows, newest[:, None]][:, :, None]
        square = g[targets, targets] - 2 * g[newest[:, None], targets] + g[newest, newest][:, None]
        weights = np.linalg.solve(_with_ridge(normal), moment)
        error = square - 2 * (weights * moment).sum(1) + (weights * (normal @ weights)).sum(1)
        error = np.where(targets > newest[:, None], np.maximum(error, 0.0), np.inf)
        places = [index[:, j] if j < length else np.full(len(index), steps) for j in range(anchors)]
        costs[tuple(places)] = error
    return costs


def _with_ridge(normal: np.ndarray) -> np.ndarray:
    """normal [..., R, R] with a little on the diagonal, so that equal anchors cannot make it singular."""
    diagonal = np.einsum("...ii->...i", normal)
    floor = np.finfo(np.float64).tiny
    return normal + np.einsum("...i,ij->...ij", RIDGE * diagonal + floor, np.eye(normal.shape[-1]))


def best_schedules(costs: np.ndarray, largest: int, power: float = 1.0) -> dict[int, Schedule]:
    """For each budget N = 1 … `largest` the schedule with the least Σ cost^p over its jumps; p = ∞: the least maximum.

    costs: of `jump_costs`. Exact dynamic programming over histories: O(N T^(H+1)) operations.
    """
    anchors, steps = costs.ndim - 1, len(costs) - 1
    costs = costs if np.isinf(power) else costs**power
    join = np.maximum if np.isinf(power) else np.add
    best = np.full((steps + 1,) * anchors, np.inf)  # best[c_1, …, c_H] after n computed steps
    best[(0, *[steps] * (anchors - 1))] = 0.0
    parents, found = [], {}
    for budget in range(1, largest + 1):
        total = join(best, costs[..., steps])
        history = np.unravel_index(np.argmin(total), total.shape)
        found[budget] = _trace(history, parents, steps)
        step = join(best[..., None], costs)  # [c_1, …, c_H, k]
        parents.append(np.moveaxis(step.argmin(anchors - 1), -1, 0))  # the oldest anchor, [k, c_1, …, c_{H−1}]
        best = np.moveaxis(step.min(anchors - 1), -1, 0).copy()
        best[steps] = np.inf  # T is the end, not a step to compute
    return found


def _trace(history, parents, none: int) -> Schedule:
    """The computed steps that led to this history (newest first), from the table of oldest anchors."""
    history, schedule = tuple(int(c) for c in history), []
    for table in reversed(parents):
        schedule.append(history[0])
        history = (*history[1:], int(table[history]))
    assert history[0] == 0 and all(c == none for c in history[1:])
    return (0, *reversed(schedule))


def candidate_schedules(gram: Gram, budgets: list[int], scaled: bool = False) -> dict[int, dict[str, Schedule]]:
    """For each budget the different schedules that the costs propose, by name: 2 anchors with p = ½, 1 and ∞, and 3
    anchors with p = 1 where their table is not too large. Which is best depends on the model and the budget;
    calibration tries them."""
    found: dict[int, dict[str, Schedule]] = {n: {} for n in budgets}
    sizes = [anchors for anchors in (2, 3) if (gram.steps + 1) ** (anchors + 1) <= LARGEST_TABLE]
    costs = {anchors: jump_costs(gram, anchors, scaled) for anchors in sizes}
    for anchors, power in ((2, 0.5), (2, 1.0), (2, np.inf), (3, 1.0)):
        if anchors not in costs:
            continue
        schedules = best_schedules(costs[anchors], max(budgets), power)
        for n in budgets:
            if schedules[n] not in found[n].values():
                found[n][f"{anchors} anchors, p = {power:g}"] = schedules[n]
    return found


def solve_weights(normal: np.ndarray, moment: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """argmin_w ‖y − V w‖² + ridge ‖w − prior‖²_diag, from VᵀV [R, R] and Vᵀy [R]; never worse than the prior itself.

    The ridge is `RIDGE` times the diagonal: it keeps the weights of nearly equal anchors from running away.
    """
    return prior + np.linalg.solve(_with_ridge(normal), moment - normal @ prior)


def fit_predictor(grams: np.ndarray, anchors: int, fitted: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the prediction [anchors] (0 where there are fewer outputs), and each prompt's squared error [P].

    grams: [P, R, R], scalar products of a computed step's output (row 0) and those before it, newest first, for each
    prompt. fitted: how many prompts, the first ones, the weights are fitted on.
    """
    weights, total = np.zeros(anchors), grams[:fitted].sum(0)
    count = grams.shape[1] - 1
    if count == 0:
        return weights, np.zeros(len(grams))
    hold = np.array([1.0] + [0.0] * (count - 1))  # the newest output itself
    weights[:count] = solve_weights(total[1:, 1:], total[1:, 0], hold)
    error = np.concatenate([[1.0], -weights[:count]])
    return weights, np.maximum(np.einsum("i,pij,j->p", error, grams, error), 0.0)


def euler_weights(sigmas: np.ndarray, schedule: Schedule, anchors: int) -> np.ndarray:
    """The jumps of fewer Euler steps, [N, H]: s_{c_{k+1}} − s_{c_k} on the newest output, 0 on the others."""
    weights = np.zeros((len(schedule), anchors))
    weights[:, 0] = np.diff(np.asarray(sigmas, np.float64)[[*schedule, len(sigmas) - 1]])
    return weights


def projection_bound(gram: Gram, schedule: Schedule, scaled: bool = False) -> float:
    """min_w ‖(x_T − x_0) − Σ_c w_c v_c‖² / elements on the reference: what no weighting of these outputs gets below.

    Outputs are those of the reference trajectory, so that it is a bound for plans that stay near it.
    """
    rows = [gram.v(c) for c in schedule] + ([0] if scaled else [])
    normal = gram.matrix[np.ix_(rows, rows)]
    moment = gram.matrix[rows, gram.steps] - gram.matrix[rows, 0]
    square = gram.matrix[[gram.steps, 0], [gram.steps, 0]].sum() - 2 * gram.matrix[gram.steps, 0]
    weights = np.linalg.lstsq(normal, moment, rcond=None)[0]
    return max(0.0, float(square - moment @ weights)) / gram.elements


def neighbours(schedule: Schedule, steps: int) -> list[Schedule]:
    """The schedules in which one computed step (not the first) is moved by one place."""
    found = []
    for place in range(1, len(schedule)):
        for moved in (schedule[place] - 1, schedule[place] + 1):
            if moved not in schedule and 0 < moved < steps:
                found.append((*schedule[:place], moved, *schedule[place + 1 :]))
    return found


# --- weights that need no replay, to compare with ------------------------------------------------------------------


def offline_weights(
    gram: Gram, schedule: Schedule, anchors: int, scaled: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Weights [N, H] and scales [N] of jumps fitted on the reference trajectory instead of the plan's own."""
    weights, scale = np.zeros((len(schedule), anchors)), np.ones(len(schedule))
    for k, (i, target) in enumerate(zip(schedule, [*schedule[1:], gram.steps], strict=True)):
        rows = [gram.v(c) for c in schedule[max(0, k + 1 - anchors) : k + 1][::-1]]
        count, rows = len(rows), rows + [i] * scaled
        moment = gram.matrix[rows, target] - gram.matrix[rows, i]
        solved = np.linalg.solve(_with_ridge(gram.matrix[np.ix_(rows, rows)]), moment)
        weights[k, :count], scale[k] = solved[:count], 1 + solved[count] if scaled else 1.0
    return weights, scale


def predictor_weights(gram: Gram, steps: list[tuple[float, float]], schedule: Schedule, anchors: int):
    """Weights [N, H] and scales [N] of linear prediction: every skipped output is predicted from the anchors by least
    squares on the reference, and the solver makes all its T steps x_{i+1} = a x_i + w v_i, given as pairs (a, w).

    That is the form that learned linear predictors of this field take, written as jumps.
    """
    weights, scale = np.zeros((len(schedule), anchors)), np.ones(len(schedule))
    for k, (i, target) in enumerate(zip(schedule, [*schedule[1:], gram.steps], strict=True)):
        rows = gram.v(np.array(schedule[max(0, k + 1 - anchors) : k + 1][::-1]))
        between = gram.matrix[np.ix_(rows, gram.v(np.arange(i, target)))]
        predict = np.linalg.solve(_with_ridge(gram.matrix[np.ix_(rows, rows)]), between)  # [anchors, skipped]
        for place, (a, w) in enumerate(steps[i:target]):
            weights[k], scale[k] = a * weights[k], a * scale[k]
            weights[k, : len(rows)] += w * predict[:, place]
    return weights, scale


def adams_bashforth_weights(sigmas: np.ndarray) -> np.ndarray:
    """[N, 2]: the second-order Adams–Bashforth method on a grid of any intervals, Euler in the first step."""
    h = np.diff(np.asarray(sigmas, np.float64))
    weights = np.zeros((len(h), 2))
    weights[0, 0] = h[0]
    weights[1:, 0], weights[1:, 1] = h[1:] * (1 + h[1:] / (2 * h[:-1])), -(h[1:] ** 2) / (2 * h[:-1])
    return weights
