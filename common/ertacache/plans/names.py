"""Names of plans: files in a model folder's cache/, Hub ids, and the numbers that they are asked for by."""

import math
import re
from pathlib import Path

from ertacache.utils.errors import UserError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.json)(?<!\.safetensors)")


def plan_name(model: str, steps: int, threshold: float, site: str) -> str:
    """File name of a threshold plan: MODEL-STEPS-λ.json, with "-blocks" for that site."""
    return f"{short_name(model)}-{steps}-{threshold:g}{'-blocks' if site == 'blocks' else ''}.json"


def budget_name(model: str, steps: int, budget: int, target: str = "reference") -> str:
    """File name of a budget plan: MODEL-STEPS-budget-N.json, with "-exact" for that target."""
    return f"{short_name(model)}-{steps}-budget-{budget}{'-exact' if target == 'exact' else ''}.json"


def short_name(model: str | Path) -> str:
    """The last part of a Hub id or path, as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", Path(model).name).strip("-") or "model"


def budget_of(steps: int, speedup: float) -> int:
    """The number of computed steps for a speed-up of T/N, at least 2."""
    return max(2, min(steps, round(steps / speedup)))


def check_speedups(values: list[float], flag: str = "--speedups") -> None:
    for value in values:
        if not (math.isfinite(value) and value >= 1):
            raise UserError(f"{flag} {value:g}: a speed-up is a number of at least 1")
