"""What fields and arrays of a plan may hold. Each check returns what is wrong, or None.

A kind of value is a type, or several; [kind] for a list of it; {name: kind} for an object that may have these names and
others; {str: kind} for an object of any names. Shapes are written like "N,H": one size per dimension.
"""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ertacache.utils.checks import LARGEST_STEPS
from ertacache.utils.errors import UserError, shown

LARGEST_NUMBER = 1e4  # in an array
LARGEST_VALUE = 2.0**64  # of a field: seeds are the largest
LARGEST_ARRAY = 2_000_000  # numbers
DEEPEST = 12  # objects and lists in one another
NUMBER = (int, float)
OPTIONAL_NUMBER = (int, float, type(None))
OBJECT: dict = {}
REPEATING = ("FlowMatchHeunDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler")  # two calls at a noise level
TEXTS = "texts"  # any value whose texts can be written to a file
PROVENANCE = {
    **{"model": str, "weights": (str, type(None)), "date": str, "batch_size": int, "site": str},
    **{"seeds": [int], "libraries": {str: str}},
    "prompts": {"count": int, "fitted": int, "sha256": str},
    "calibration": {
        **{"metric": str, "error_metric": str, "chosen": str, "effort": str, "errors": {str: NUMBER}},
        **{"rollouts": int, "finished": bool, "substeps": int},
        **{"projection_bound": NUMBER, "noise_gain": NUMBER, "noise_gain_uncached": NUMBER},
    },
}


def value_problem(name: str, value: Any, kind: Any) -> str | None:
    """Return what is wrong with a field's value. Numbers must be finite; true and false are no numbers."""
    if kind is TEXTS:
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            return f"{name} holds a text that is no Unicode"
        return None
    if isinstance(kind, dict):
        if not isinstance(value, Mapping):
            return f"{name} = {shown(value)}, must be an object"
        pairs = [(f"{name}.{key}", value[key], kind.get(key, kind.get(str))) for key in value]
        pairs = [(key, part, expected) for key, part, expected in pairs if expected is not None]
    elif isinstance(kind, list):
        if not isinstance(value, list | tuple):
            return f"{name} = {shown(value)}, must be a list"
        pairs = [(f"{name}[{i}]", part, kind[0]) for i, part in enumerate(value)]
    else:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            return f"{name} = {shown(value)}, must be {names}"
        if isinstance(value, int | float) and not abs(value) <= LARGEST_VALUE:  # NaN neither
            return f"{name} = {shown(value)}, must be finite and at most {LARGEST_VALUE:g}"
        return None
    return next((problem for pair in pairs if (problem := value_problem(*pair))), None)


def depth_problem(value: Any) -> str | None:
    """Return whether objects and lists are nested too deep to be read safely."""
    level = [value]
    for _ in range(DEEPEST):
        level = [part for whole in level for part in _parts(whole)]
        if not level:
            return None
    return f"more than {DEEPEST} objects and lists in one another"


def _parts(value: Any) -> list:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def array_problem(name: str, value: Any, shape: str, sizes: dict[str, int]) -> str | None:
    """Return what is wrong with an array.

    Args:
        name: Of the array.
        value: An array, or nested sequences of numbers.
        shape: Like "N,H" or "T+1".
        sizes: Known sizes by letter; those of new letters are added.
    """
    letters = shape.split(",")
    expected = ", ".join(str(_size(letter, sizes)) for letter in letters)
    expected = f"{name} must hold finite numbers up to {LARGEST_NUMBER:g}, [{expected}]"
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        return expected
    if array.ndim != len(letters) or is_too_large(array.shape):
        return expected
    for letter, size in zip(letters, array.shape, strict=True):
        if _size(letter, sizes) == letter:
            sizes[letter] = size
        if _size(letter, sizes) != size:
            return expected
    return None if np.all(np.abs(array) <= LARGEST_NUMBER) else expected  # false for NaN


def is_too_large(shape: Sequence[int]) -> bool:
    """Return whether an array would take too much memory as lists, also where a dimension is 0."""
    is_empty = 0 in shape  # and may have any number of rows without a byte
    return math.prod(max(1, size) for size in shape) > LARGEST_ARRAY or (is_empty and max(shape) > LARGEST_STEPS)


def _size(letter: str, sizes: Mapping[str, int]) -> int | str:
    """Return the size that "N", or "N+1" or "N-1", stands for; itself where it is not known."""
    name, change = letter[0], int(letter[1:] or 0)
    return sizes[name] + change if name in sizes else letter


def grid_problem(name: str, levels: Sequence[float], scheduler: Mapping[str, Any]) -> str | None:
    """Return whether noise levels do not fall from step to step, or rise where the scheduler's do.

    The last two may be equal, as some pipelines have them. Elsewhere two in a row may be so on schedulers alone that
    call the model twice at a level.

    Args:
        name: Of the levels.
        levels: Before each step and at the end, [T+1].
        scheduler: Class and config.
    """
    rises = bool(scheduler.get("invert_sigmas"))
    lengths = np.diff(levels) * (1 if rises else -1)
    stays = lengths == 0
    may_stay = np.full(len(lengths), scheduler.get("class") in REPEATING)
    may_stay[-1:] = True
    may_stay[1:] &= ~stays[:-1]
    wrong = np.flatnonzero(~((lengths > 0) | (stays & may_stay)))  # NaN too
    if len(wrong):
        i = int(wrong[0])
        text = f"{name} must {'rise' if rises else 'fall'} from noise to data"
        return f"{text} (step {i} leads from {levels[i]:.3g} to {levels[i + 1]:.3g})"
    return None


def check_levels(levels: Sequence[float], scheduler: Mapping[str, Any]) -> None:
    """Refuse the noise levels of a run, [T+1], that `grid_problem` finds wrong. scheduler: class and config."""
    problem = grid_problem("the noise levels of this run", levels, scheduler)
    if problem:
        shown = textwrap.shorten(", ".join(f"{level:.3g}" for level in levels), 80, placeholder=" …")
        raise UserError(f"{problem}, and are {shown}: give the call another size, or other sigmas")
