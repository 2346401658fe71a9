"""Whether a run has other noise levels than its plan's calibration had, where no size of its latents explains them."""

import numpy as np

from ertacache.numerics.schedulers import FlowMatching

LEVEL_TOLERANCE = 0.01  # of the largest noise level
OTHER_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")


def other_levels(run, is_sized_alike: bool) -> str | None:
    """Return how the scheduler's own noise levels differ from those of the calibration.

    Args:
        run: A `PlannedRun`.
        is_sized_alike: Whether its latents are known to have the shape that they had in the calibration.
    """
    if run.plan is None:
        return None
    config, here, there = run.scheduler.config, np.array(run.native), np.array(run.plan.native_sigmas)
    where = "in the calibration"
    if config.get("use_dynamic_shifting") and not is_sized_alike:
        if not isinstance(run.solver, FlowMatching) or any(map(config.get, OTHER_SPACINGS)):
            return None
        there, where = _shifted(there, here, bool(config.get("shift_terminal"))), f"{where}, shifted to this size,"
    distances = np.abs(here - there)
    i = int(distances.argmax())
    if distances[i] <= LEVEL_TOLERANCE * np.abs(there).max():
        return None
    values = f"step {i} is at {here[i]:.3g}, {where} at {there[i]:.3g}"
    return f"this run has other noise levels than the plan's calibration ({values}); quality may be lower"


def _shifted(levels: np.ndarray, like: np.ndarray, is_stretched: bool) -> np.ndarray:
    """Return noise levels [T+1] as the size of other latents would shift them, the nearest to those of a run.

    A shift multiplies s / (1 − s) by one factor for all levels. It may be stretched afterwards, so that the last level
    above 0 stays where it is: 1 / (1 − s) is then linear in that of the levels without it.

    Args:
        levels: Of the calibration.
        like: Of the run.
        is_stretched: Whether the scheduler stretches them.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        fixed = 1 / (1 - levels[-2]) if is_stretched else 1.0
        above, theirs = 1 / (1 - levels[:-1]) - fixed, 1 / (1 - like[:-1]) - fixed
        factors = theirs / above
        known = factors[np.isfinite(factors) & (factors > 0)]
        factor = np.median(known) if len(known) else 1.0
        return np.append(1 - 1 / (fixed + factor * above), levels[-1])
