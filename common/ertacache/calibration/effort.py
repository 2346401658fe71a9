"""How much a calibration may cost."""

import contextlib
import math
from dataclasses import dataclass

from ertacache.utils.errors import UserError, shown
from ertacache.utils.words import counted


@dataclass(frozen=True)
class Effort:
    """Limits of one calibration.

    Attributes:
        name: As plans record it and messages say it.
        prompts: The most prompts that a budget plan is calibrated on, the first ones of those given; None for all.
        threshold_prompts: The same of a threshold plan.
        search: Model calls per prompt that the search for a budget plan's schedule may make, over T.
        whole_ablation: Whether a threshold plan is chosen among all its parts, or among the cheapest.
        minutes: In which all of the calibration ends; ∞ where model calls alone are limited.
    """

    name: str
    prompts: int | None
    threshold_prompts: int | None
    search: int
    whole_ablation: bool
    minutes: float = math.inf


EFFORTS = {  # the least first
    "quick": Effort("quick", prompts=8, threshold_prompts=4, search=2, whole_ablation=False),
    "normal": Effort("normal", prompts=None, threshold_prompts=None, search=4, whole_ablation=True),
    "thorough": Effort("thorough", prompts=None, threshold_prompts=None, search=40, whole_ablation=True),
}


def effort_of(effort: str | float, argument: str = "effort", in_minutes: bool = True) -> Effort:
    """Return the limits of an effort.

    Args:
        effort: quick, normal or thorough; or a number of minutes above 0, which may be a text like "20 minutes".
        argument: Named in the refusal of any other.
        in_minutes: Whether a number of minutes is one.

    Raises:
        UserError: Any other value.
    """
    if isinstance(effort, str) and effort in EFFORTS:
        return EFFORTS[effort]
    minutes = math.nan
    if isinstance(effort, str | int | float) and not isinstance(effort, bool):
        with contextlib.suppress(ValueError, OverflowError):
            minutes = float(str(effort).removesuffix(" minutes").removesuffix(" minute"))
    if in_minutes and 0 < minutes < math.inf:
        name = counted(f"{minutes:g}", "minute")
        return Effort(name, prompts=None, threshold_prompts=None, search=40, whole_ablation=True, minutes=minutes)
    value, names = effort if isinstance(effort, str) else shown(effort), ", ".join(EFFORTS)
    raise UserError(f"{argument} {value}: give {names}{' or a number of minutes' if in_minutes else ''}")


def serves(made: Effort, asked: Effort) -> bool:
    """Return whether a plan made with one effort needs not be made anew with another one.

    What a number of minutes comes to depends on the machine: it counts as quick, and for fewer minutes.
    """
    if asked.minutes < math.inf:
        return made.name == "thorough" or asked.minutes <= made.minutes < math.inf
    ascending = list(EFFORTS)
    return ascending.index("quick" if made.minutes < math.inf else made.name) >= ascending.index(asked.name)
