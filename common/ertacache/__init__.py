"""ERTACache: run a diffusion transformer at a fraction of its model calls, with hardly a visible change."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ertacache.calibration.from_pipeline import calibrate
    from ertacache.pipelines.enable import disable, enable
    from ertacache.pipelines.summary import summary
    from ertacache.plans.budget import BudgetPlan
    from ertacache.plans.plan import Plan
    from ertacache.plans.requirements import Conditions
    from ertacache.plans.threshold import ThresholdPlan
    from ertacache.utils.errors import PlanError, UserError

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
    "calibration.from_pipeline": ("calibrate",),
    "pipelines.enable": ("disable", "enable"),
    "pipelines.summary": ("summary",),
    "plans": ("BudgetPlan", "Plan", "ThresholdPlan"),
    "plans.requirements": ("Conditions",),
    "utils.errors": ("PlanError", "UserError"),
}


def __getattr__(name: str):
    """Names are looked up when they are used, so that importing the package costs nothing."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"ertacache.{module}"), name)
    raise AttributeError(f"module 'ertacache' has no attribute {name!r}")
