"""Names of plans: files in a model folder's cache/, Hub ids, and the numbers by which a plan is asked for."""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ertacache.utils.errors import UserError, shown

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.json)(?<!\.safetensors)")
HUB_PREFIX = "hf://"  # before the Hub id of a plan that is read where paths are too
LEAST_BUDGET = 2  # computed steps of a budget plan
TARGETS = {  # what a plan imitates, in words
    "reference": "the uncached run",
    "exact": "the exact solution, which the uncached run approximates",
}


def model_source(model: str) -> str:
    """Return what loads a model: the folder's path, or the Hub id as it is.

    Raises:
        UserError: Neither a folder that is there nor an id, so that a mistyped path is not looked up on the Hub.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():
        return str(path)
    if not HUB_ID.fullmatch(model):
        raise UserError(f"no model {model!r}: give a folder that is there, or a Hub id of the form OWNER/NAME")
    return model


def threshold_name(model: str, steps: int, threshold: float, site: str) -> str:
    """Return the file name of a threshold plan: MODEL-STEPS-λ.json, with "-blocks" for that site."""
    return f"{short_name(model)}-{steps}-{threshold:g}{'-blocks' if site == 'blocks' else ''}.json"


def budget_name(model: str, steps: int, budget: int, target: str = "reference") -> str:
    """Return the file name of a budget plan: MODEL-STEPS-budget-N.json, with "-exact" for that target."""
    return f"{short_name(model)}-{steps}-budget-{budget}{'-exact' if target == 'exact' else ''}.json"


def with_settings(name: str, settings: Mapping[str, Any], weights: str) -> str:
    """Return a plan's file name with what it was calibrated at: NAME-guidance5-height64-….json.

    Args:
        name: Of `threshold_name` or `budget_name`.
        settings: Of the run; texts are shown by a hash.
        weights: Fingerprint of the model.
    """
    words = [f"{key}{_short_value(value)}" for key, value in settings.items() if value not in (None, "")]
    return "-".join([name.removesuffix(".json"), *words, weights[:8]]) + ".json"


def _short_value(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if re.fullmatch(r"[\w.+-]{1,12}", text) else hashlib.sha256(text.encode()).hexdigest()[:6]


def short_name(model: str | Path) -> str:
    """Return the last part of a Hub id or path, as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", Path(model).name).strip("-") or "model"


def budget_of(steps: int, speedup: float, flag: str = "--speedup") -> int:
    """Return N, the number of computed steps for a speed-up of T/N: from 2 to T.

    Raises:
        UserError: A speed-up above T/2.
    """
    if speedup > steps / LEAST_BUDGET:
        raise UserError(f"{flag} {speedup:g}: at most {steps / LEAST_BUDGET:g} of {steps} steps")
    return min(steps, round(steps / speedup))


def check_budget(budget: int, steps: int, flag: str = "--budget", given: float | None = None) -> None:
    """Refuse a number of computed steps outside of 2 … T. given: the value of the flag, where it is another number."""
    if not LEAST_BUDGET <= budget <= steps:
        value = budget if given is None else f"{given:g}"
        raise UserError(f"{flag} {value}: give a number of computed steps from {LEAST_BUDGET} to {steps}")


def check_speedups(speedups: Sequence[float], flag: str = "--speedups") -> None:
    """Refuse a speed-up that is not a finite number of at least 1."""
    for speedup in speedups:
        is_number = isinstance(speedup, int | float) and not isinstance(speedup, bool)
        if not (is_number and math.isfinite(speedup) and speedup >= 1):
            raise UserError(f"{flag} {shown(speedup)}: a speed-up is a number of at least 1")
