"""Names of plans: files in a model folder's cache/, Hub ids, and the numbers by which a plan is asked for."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from ertacache.utils.errors import UserError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.json)(?<!\.safetensors)")
LEAST_BUDGET = 2  # computed steps of a budget plan
TARGETS = {  # what a plan imitates, in words
    "reference": "the uncached run",
    "exact": "the exact solution, which the uncached run approximates",
}


def threshold_name(model: str, steps: int, threshold: float, site: str) -> str:
    """Return the file name of a threshold plan: MODEL-STEPS-λ.json, with "-blocks" for that site."""
    return f"{short_name(model)}-{steps}-{threshold:g}{'-blocks' if site == 'blocks' else ''}.json"


def budget_name(model: str, steps: int, budget: int, target: str = "reference") -> str:
    """Return the file name of a budget plan: MODEL-STEPS-budget-N.json, with "-exact" for that target."""
    return f"{short_name(model)}-{steps}-budget-{budget}{'-exact' if target == 'exact' else ''}.json"


def short_name(model: str | Path) -> str:
    """Return the last part of a Hub id or path, as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", Path(model).name).strip("-") or "model"


def budget_of(steps: int, speedup: float) -> int:
    """Return N, the number of computed steps for a speed-up of T/N: from 2 to T."""
    return max(LEAST_BUDGET, min(steps, round(steps / speedup)))


def check_budget(budget: int, steps: int, flag: str = "--budget", given: float | None = None) -> None:
    """Refuse a number of computed steps outside of 2 … T. given: the value of the flag, where it is another number."""
    if not LEAST_BUDGET <= budget <= steps:
        value = budget if given is None else f"{given:g}"
        raise UserError(f"{flag} {value}: give a number of computed steps from {LEAST_BUDGET} to {steps}")


def check_speedups(speedups: Sequence[float], flag: str = "--speedups") -> None:
    """Refuse a speed-up that is not a finite number of at least 1."""
    for speedup in speedups:
        if not (math.isfinite(speedup) and speedup >= 1):
            raise UserError(f"{flag} {speedup:g}: a speed-up is a number of at least 1")
