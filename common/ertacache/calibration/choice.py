"""How candidates for a plan are compared: by their errors on several prompts."""

import numpy as np

METRIC = "geometric mean over prompts of the mean squared error of the final latents"
CHOICE_METRIC = f"{METRIC}, over the best three quarters of them"


def geometric_mean(errors: np.ndarray) -> float:
    """Return the geometric mean of squared errors."""
    return float(np.exp(np.log(np.maximum(errors, np.finfo(np.float64).tiny)).mean()))


def typical_error(errors: np.ndarray) -> float:
    """Return the geometric mean of the best three quarters of the errors, [P], by which candidates are compared.

    Whether one of the other prompts tips to another image is chance, and would decide.
    """
    best = np.sort(errors)[: -(-3 * len(errors) // 4)]
    return geometric_mean(best) if best.any() else 0.0
