"""Limits of numbers that users give in several places."""

import math
from numbers import Integral, Real

from ertacache.utils.errors import UserError, shown

LEAST_STEPS = 3  # of a run that a plan is calibrated on: the first and the last are computed
LARGEST_STEPS = 1000  # T
SIZES = ("height", "width", "num_frames", "video_length")  # names of whole numbers of at least 1
COUNTS = ("height", "width", "length", "frames", "steps", "size")  # how names of numbers end that are not negative
GRIDS = ("sigmas", "timesteps")  # names of lists that are not empty
LARGEST_FPS = 1000  # frames per second
LARGEST_SEED = 2**63 - 1  # the first one's; torch takes up to 2⁶⁴ − 1


def steps_problem(steps: object, least: int = LEAST_STEPS) -> str | None:
    """Return what is wrong with T."""
    if type(steps) is not int or not least <= steps <= LARGEST_STEPS:
        return f"steps = {shown(steps)}, must be a whole number from {least} to {LARGEST_STEPS}"
    return None


def argument_problem(name: str, value: object) -> str | None:
    """Return what is wrong with an argument of a pipeline's call: numbers that are not finite, sizes below 1.

    Args:
        name: Of the argument.
        value: A number, several in a list, or anything else, with which nothing is wrong.

    Returns:
        What to do, to be written behind the argument and its value.
    """
    is_list = isinstance(value, list | tuple)
    numbers = [each for each in (value if is_list else [value]) if isinstance(each, Real)]
    if not all(-math.inf < number < math.inf for number in numbers):
        return "give finite numbers" if is_list else "give a finite number"
    if name in SIZES and not all(isinstance(n, Integral) and type(n) is not bool and n > 0 for n in numbers):
        return "give whole numbers of at least 1" if is_list else "give a whole number of at least 1"
    if name.endswith(COUNTS) and any(number < 0 for number in numbers):
        return "give a number that is not negative"
    if name in GRIDS and is_list and not value:
        return "give a number for each step, or leave it out"
    return None


def check_seed(seed: object, flag: str = "--seed") -> None:
    """Refuse a seed that is no whole number, or one that torch cannot take."""
    if type(seed) is not int or not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"{flag} {shown(seed)}: give a whole number from 0 to {LARGEST_SEED}")
