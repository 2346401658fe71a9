"""The search for the setting of a method that is nearest to an asked speed-up."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any


def midpoint(a, b):
    """Half-way between two values of a parameter, None where nothing is.

    The geometric mean of two positive numbers to three digits, the middle of whole numbers, tuples part by part.
    """
    if a == b:
        return a
    if type(a) is type(b) is tuple and len(a) == len(b):
        parts = tuple(map(midpoint, a, b))
        return None if None in parts else parts
    middle = None
    if type(a) is type(b) is int:
        middle = (a + b) // 2
    elif type(a) is type(b) is float and a > 0 < b:
        middle = float(f"{math.sqrt(a * b):.3g}")
    return None if middle in (a, b) else middle


def nearest_settings(
    values: Sequence,
    between: Callable[[Any, Any], Any] | None,
    saved_of: Callable[[Any], float],
    speedups: Iterable[float],
    refinements: int = 3,
) -> dict[float, tuple[Any, float]]:
    """For each speed-up the (value, FLOPs saved) that comes nearest to it, in the logarithm of the ratio.

    values: a sweep, in its order. between(a, b): the value between two, or None. saved_of(value): uncached FLOPs over
    the method's own, asked once a value. Between two neighbours with the speed-up between their savings, the interval
    is halved up to `refinements` times.
    """
    speedups, saved = list(speedups), {}

    def off(value, speedup) -> float:
        if value not in saved:
            saved[value] = saved_of(value)
        return math.log(saved[value] / speedup)

    for speedup in speedups:
        around = [(a, b) for a, b in pairwise(values) if off(a, speedup) * off(b, speedup) < 0]
        if not around or between is None:
            continue
        a, b = min(around, key=lambda pair: min(abs(off(value, speedup)) for value in pair))
        for _ in range(refinements):
            middle = between(a, b)
            if middle is None or off(middle, speedup) == 0:
                break
            a, b = (a, middle) if off(a, speedup) * off(middle, speedup) < 0 else (middle, b)
    nearest = {s: min((*values, *saved), key=lambda value, s=s: abs(off(value, s))) for s in speedups}
    return {s: (value, saved[value]) for s, value in nearest.items()}
