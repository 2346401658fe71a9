"""Search for the setting of a cache whose speed-up is nearest to a target."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any


def midpoint(a, b):
    """Return the value half-way between two values of a parameter, or None if there is none.

    It is the geometric mean of two positive floats (to three digits), the middle of two integers, and the midpoints of
    the elements of two tuples of equal length.
    """
    if a == b:
        return a
    if type(a) is type(b) is tuple and len(a) == len(b):
        midpoints = tuple(map(midpoint, a, b))
        return None if None in midpoints else midpoints
    middle = None
    if type(a) is type(b) is int:
        middle = (a + b) // 2
    elif type(a) is type(b) is float and a > 0 < b:
        middle = float(f"{math.sqrt(a * b):.3g}")
    return None if middle in (a, b) else middle


def nearest_settings(
    values: Sequence,
    between: Callable[[Any, Any], Any] | None,
    ratio_of: Callable[[Any], float],
    speedups: Iterable[float],
    refinements: int = 3,
) -> dict[float, tuple[Any, float]]:
    """Find the setting nearest to each target speed-up, in the logarithm of the ratio.

    Where the target lies between the FLOPs ratios of two neighbours of the sweep, the interval between them is halved
    up to `refinements` times.

    Args:
        values: The sweep, in its order.
        between: between(a, b) returns the value between two, or None; None for no refinement.
        ratio_of: ratio_of(value) measures uncached FLOPs over those with the cache; called once per value.
        speedups: Target speed-ups.
        refinements: Most halvings per target.

    Returns:
        For each target the value and its FLOPs ratio.
    """
    speedups, ratios = list(speedups), {}

    def distance(value, speedup) -> float:
        """Return the signed logarithm of the reached speed-up over the target."""
        if value not in ratios:
            ratios[value] = ratio_of(value)
        return math.log(ratios[value] / speedup)

    for speedup in speedups:
        brackets = [(a, b) for a, b in pairwise(values) if distance(a, speedup) * distance(b, speedup) < 0]
        if not brackets or between is None:
            continue
        a, b = min(brackets, key=lambda bracket: min(abs(distance(value, speedup)) for value in bracket))
        for _ in range(refinements):
            middle = between(a, b)
            if middle is None or distance(middle, speedup) == 0:
                break
            a, b = (a, middle) if distance(a, speedup) * distance(middle, speedup) < 0 else (middle, b)
    nearest = {s: min((*values, *ratios), key=lambda value, s=s: abs(distance(value, s))) for s in speedups}
    return {s: (value, ratios[value]) for s, value in nearest.items()}
