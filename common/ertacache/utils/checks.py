"""Limits of numbers that users give in several places."""

import math
from numbers import Real

from ertacache.utils.errors import UserError, shown

LEAST_STEPS = 3  # of a run that a plan is calibrated on: the first and the last are computed
LARGEST_STEPS = 1000  # T
COUNTS = ("height", "width", "length", "frames", "steps", "size")  # how names of numbers end that are not negative
LARGEST_SEED = 2**63 - 1  # the first one's; torch takes up to 2⁶⁴ − 1


def steps_problem(steps: object, least: int = LEAST_STEPS) -> str | None:
    """Return what is wrong with T."""
    if type(steps) is not int or not least <= steps <= LARGEST_STEPS:
        return f"steps = {shown(steps)}, must be a whole number from {least} to {LARGEST_STEPS}"
    return None


def argument_problem(name: str, value: object) -> str | None:
    """Return what is wrong with an argument of a pipeline's call: numbers that are not finite, negative sizes.

    Args:
        name: Of the argument.
        value: A number, several in a list, or anything else, with which nothing is wrong.
    """
    numbers = [each for each in (value if isinstance(value, list | tuple) else [value]) if isinstance(each, Real)]
    if not all(-math.inf < number < math.inf for number in numbers):
        remedy = "give a finite number" if numbers == [value] else "give finite numbers"
        return f"{name} = {shown(value)}, {remedy}"
    if name.endswith(COUNTS) and any(number < 0 for number in numbers):
        return f"{name} = {shown(value)}, give a number that is not negative"
    return None


def check_seed(seed: object, flag: str = "--seed") -> None:
    """Refuse a seed that is no whole number, or one that torch cannot take."""
    if type(seed) is not int or not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"{flag} {shown(seed)}: give a whole number from 0 to {LARGEST_SEED}")
