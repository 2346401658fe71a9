"""How much a calibration may cost."""

from dataclasses import dataclass

from ertacache.utils.errors import UserError, shown


@dataclass(frozen=True)
class Effort:
    """Limits of one calibration.

    Attributes:
        prompts: The most prompts that a budget plan is calibrated on, the first ones of those given; None for all.
        threshold_prompts: The same of a threshold plan.
        search: Model calls per prompt that the search for a budget plan's schedule may make, over T.
        whole_ablation: Whether a threshold plan is chosen among all its parts, or among the cheapest.
    """

    prompts: int | None
    threshold_prompts: int | None
    search: int
    whole_ablation: bool


EFFORTS = {
    "quick": Effort(prompts=8, threshold_prompts=4, search=2, whole_ablation=False),
    "normal": Effort(prompts=None, threshold_prompts=None, search=4, whole_ablation=True),
    "thorough": Effort(prompts=None, threshold_prompts=None, search=40, whole_ablation=True),
}


def effort_of(name: str, argument: str = "effort") -> Effort:
    """Return the limits of an effort: quick, normal or thorough.

    Args:
        name: Of the effort.
        argument: Named in the refusal of any other.

    Raises:
        UserError: Any other value.
    """
    if not isinstance(name, str) or name not in EFFORTS:
        value = name if isinstance(name, str) else shown(name)
        raise UserError(f"{argument} {value}: give {', '.join(EFFORTS)}")
    return EFFORTS[name]
