"""ERTACache: run a diffusion transformer at a fraction of its model calls, with hardly a visible change."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ertacache.budget_plan import BudgetPlan
    from ertacache.conditions import Conditions
    from ertacache.errors import PlanError, UserError
    from ertacache.pipeline_calibration import calibrate
    from ertacache.pipelines import disable, enable, summary
    from ertacache.plan import Plan
    from ertacache.threshold_plan import ThresholdPlan

__version__ = "0.1.0"
__all__ = [
    "BudgetPlan",
    "Conditions",
    "Plan",
    "PlanError",
    "ThresholdPlan",
    "UserError",
    "__version__",
    "calibrate",
    "disable",
    "enable",
    "summary",
]
_MODULES = {
    "conditions": ("Conditions",),
    "errors": ("PlanError", "UserError"),
    "pipeline_calibration": ("calibrate",),
    "pipelines": ("disable", "enable", "summary"),
    "plan": ("Plan",),
    "budget_plan": ("BudgetPlan",),
    "threshold_plan": ("ThresholdPlan",),
}


def __getattr__(name: str):
    """Names are looked up when they are used, so that importing the package costs nothing."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"ertacache.{module}"), name)
    raise AttributeError(f"module 'ertacache' has no attribute {name!r}")
