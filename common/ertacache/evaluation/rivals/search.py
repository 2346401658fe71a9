"""The searches of rivals for their schedules, as pure functions. Steps count from 0; T is the end."""

import math
import random
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np

from ertacache.calibration.planner import Schedule

LOCAL_RADIUS, LOCAL_SHARE, ONE_MOVE_SHARE = 3, 0.7, 0.9  # of BudCache's proposals
ANNEALING, POLISHING = 200, 20  # BudCache's: iterations of simulated annealing, rounds of hill climbing
ANNEALING_SHARE = 0.75  # of a limited cost
HOTTEST, COOLEST = 0.25, 5e-5  # temperatures, over the first error; their ratio is BudCache's, 0.05 to 1e-5


def minimax_path(errors: np.ndarray, budget: int) -> Schedule:
    """Return the lexicographic minimax path of LeMiCa (Gao et al., 2025, arXiv 2511.00090).

    Of all paths from 0 to T with N edges it has the smallest largest edge, of these the smallest second largest, and so
    on. Exact dynamic programming: adding one edge to two paths of equal length does not change their order.

    Args:
        errors: Error of edge i → k, [T, T+1]; read where i < k.
        budget: N.

    Returns:
        The nodes where edges begin, N computed steps.
    """
    steps = len(errors)
    best: dict[int, tuple[tuple[float, ...], Schedule]] = {0: ((), ())}  # by node: edges, largest first; nodes before
    for n in range(budget):
        reached: dict[int, tuple[tuple[float, ...], Schedule]] = {}
        for i, (edges, nodes) in best.items():
            for k in [steps] if n == budget - 1 else range(i + 1, steps - (budget - n - 2)):
                longer = tuple(sorted((*edges, float(errors[i, k])), reverse=True))
                if k not in reached or longer < reached[k][0]:
                    reached[k] = (longer, (*nodes, i))
        best = reached
    return best[steps][1]


def pair_costs(errors: np.ndarray) -> np.ndarray:
    """Return C[i, j, k], the errors at the steps between j and k of predictions from steps i and j, summed.

    Args:
        errors: E[i, j, t], [T, T, T]; read where i < j < t.

    Returns:
        Costs [T, T, T+1]; ∞ where not i < j < k.
    """
    steps = len(errors)
    costs = np.full((steps, steps, steps + 1), np.inf)
    for j in range(1, steps):
        sums = np.cumsum(errors[:j, j, j + 1 :], axis=1)
        costs[:j, j, j + 1] = 0.0
        costs[:j, j, j + 2 :] = sums
    return costs


def pair_schedule(costs: np.ndarray, budget: int, first: int = 3, longest: int = 8) -> Schedule:
    """Return DPCache's schedule (arXiv 2602.22654), by the exact dynamic program over pairs of steps of SGLang.

    The first steps and the last one are computed; of all schedules of N steps with gaps of at most `longest` it has the
    least sum of C[i, j, k] over triples of neighbours, k = T after the last one.

    Args:
        costs: Of `pair_costs`.
        budget: N, above `first`.
        first: Number of first steps that are computed, at least 2.
        longest: Largest distance of neighbours.

    Raises:
        ValueError: No schedule has gaps that small.
    """
    steps = len(costs)
    best: dict[tuple[int, int], tuple[float, Schedule]] = {(first - 2, first - 1): (0.0, tuple(range(first)))}
    for _ in range(first, budget):
        reached: dict[tuple[int, int], tuple[float, Schedule]] = {}
        for (i, j), (cost, nodes) in best.items():
            for k in range(j + 1, min(steps, j + longest + 1)):
                total = cost + costs[i, j, k]
                if (j, k) not in reached or total < reached[j, k][0]:
                    reached[j, k] = (total, (*nodes, k))
        best = reached
    ends = [(cost + costs[i, j, steps], nodes) for (i, j), (cost, nodes) in best.items() if j == steps - 1]
    if not ends:
        raise ValueError(f"no {budget} of {steps} steps have gaps of at most {longest}")
    return min(ends)[1]


def least_gap(steps: int, budget: int, first: int) -> int:
    """Return the least `longest` with which `pair_schedule` finds a schedule."""
    return -(-(steps - first) // (budget - first))


def anneal(
    error_of: Callable[[Schedule], float],
    steps: int,
    budget: int,
    prefix: int,
    spent: Callable[[], float] = lambda: 0.0,
    seed: int = 0,
) -> tuple[Schedule, float, int]:
    """Search a schedule as BudCache does (arXiv 2606.13496): simulated annealing, then steepest descent.

    A proposal moves one computed step (nine times of ten) or two; a single one mostly to a place within three steps.
    Temperatures are relative to the first error. Where its cost is limited, annealing takes the first three quarters.

    Args:
        error_of: Rolls a schedule out; its error. Called once per schedule.
        steps: T.
        budget: N.
        prefix: Number of first steps that are always computed, at least 1.
        spent: Share of what the search may cost that is spent; from 1 on nothing is rolled out. The start always is.
        seed: Of the search.

    Returns:
        The best schedule, its error, and how many were rolled out.
    """
    chance, known = random.Random(seed), {}

    def error(schedule: Schedule) -> float | None:
        """Return a schedule's error; None where the limit is reached."""
        if schedule not in known:
            if known and spent() >= 1:
                return None
            known[schedule] = error_of(schedule)
        return known[schedule]

    later = chance.sample(range(prefix, steps), budget - prefix)
    current = (*range(prefix), *sorted(later))
    value = start = error(current)
    for iteration in range(ANNEALING):
        progress = max(iteration / ANNEALING, spent() / ANNEALING_SHARE)
        if progress >= 1:
            break
        candidate = proposal(current, steps, prefix, chance)
        new = error(candidate)
        temperature = start * HOTTEST * (COOLEST / HOTTEST) ** progress
        if new < value or chance.random() < math.exp(-(new - value) / max(temperature, 1e-300)):
            current, value = candidate, new
    current = min(known, key=known.get)
    for _ in range(POLISHING):
        errors = {schedule: error(schedule) for schedule in moved(current, steps, prefix)}
        best = min((near for near, new in errors.items() if new is not None), key=known.get, default=current)
        if known[best] >= known[current]:
            break
        current = best
    return current, known[current], len(known)


def proposal(schedule: Schedule, steps: int, prefix: int, chance: random.Random) -> Schedule:
    """Return a schedule with one or two computed steps moved, none of the first `prefix`."""
    movable = [c for c in schedule if c >= prefix]
    places = [c for c in range(prefix, steps) if c not in schedule]
    if not movable or not places:
        return schedule
    if chance.random() < ONE_MOVE_SHARE or min(len(movable), len(places)) < 2:
        source = chance.choice(movable)
        near = [c for c in places if abs(c - source) <= LOCAL_RADIUS]
        sources, targets = [source], [chance.choice(near if near and chance.random() < LOCAL_SHARE else places)]
    else:
        sources, targets = chance.sample(movable, 2), chance.sample(places, 2)
    return tuple(sorted({*schedule} - {*sources} | {*targets}))


def moved(schedule: Schedule, steps: int, prefix: int) -> list[Schedule]:
    """Return the schedules in which one computed step moves by at most three, none of the first `prefix`."""
    found = []
    for source in (c for c in schedule if c >= prefix):
        for target in range(max(prefix, source - LOCAL_RADIUS), min(steps, source + LOCAL_RADIUS + 1)):
            if target not in schedule:
                found.append(tuple(sorted({*schedule} - {source} | {target})))
    return found


def spectrum_schedule(steps: int, warmup: int, window: float, growth: float) -> Schedule:
    """Return the steps that Spectrum computes: all of the warm-up, then the last of each window.

    A window of ⌊w⌋ steps ends with a computed one; then w grows by α (arXiv 2603.01623, appendix B.1).

    Args:
        steps: T.
        warmup: Number of first steps that are computed.
        window: w at the end of the warm-up.
        growth: α.
    """
    computed, skipped = list(range(min(warmup, steps))), 0
    for i in range(len(computed), steps):
        if (skipped + 1) % math.floor(window) == 0:
            computed.append(i)
            window, skipped = round(window + growth, 3), 0
        else:
            skipped += 1
    return tuple(computed)


def spectrum_settings(steps: int, budget: int, growths: Sequence[float]) -> list[tuple[int, int, float]]:
    """Return Spectrum's warm-ups, first windows and growths with which it computes exactly N steps, one per schedule.

    Its own are a warm-up of 5, a window of 2 and growths of 0.75 and 3. Of the settings that compute N steps these are
    all with the warm-up and window nearest to its own, whatever their growth.

    Args:
        steps: T.
        budget: N.
        growths: Values to try.
    """
    nearest = sorted(product(range(1, budget + 1), range(2, 9)), key=lambda pair: (abs(pair[0] - 5), abs(pair[1] - 2)))
    for warmup, window in nearest:
        schedules = {spectrum_schedule(steps, warmup, window, growth): growth for growth in growths}
        found = [(warmup, window, growth) for schedule, growth in schedules.items() if len(schedule) == budget]
        if found:
            return found
    return []
