"""ERTACache: run a diffusion transformer at a fraction of its model calls, with hardly a visible change."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ertacache.calibration.accelerate import accelerate
    from ertacache.calibration.from_pipeline import calibrate
    from ertacache.calibration.released import import_schedule
    from ertacache.pipelines.enable import disable, enable, speedup
    from ertacache.pipelines.summary import summary
    from ertacache.plans import BudgetPlan, Plan, PlanSet, ThresholdPlan
    from ertacache.plans.requirements import Requirements
    from ertacache.utils.errors import PlanError, UserError

__version__ = "0.1.0"
__all__ = [
    "BudgetPlan",
    "Plan",
    "PlanError",
    "PlanSet",
    "Requirements",
    "ThresholdPlan",
    "UserError",
    "__version__",
    "accelerate",
    "calibrate",
    "disable",
    "enable",
    "import_schedule",
    "speedup",
    "summary",
]
_MODULES = {
    "accelerate": "calibration.accelerate",
    "calibrate": "calibration.from_pipeline",
    "disable": "pipelines.enable",
    "enable": "pipelines.enable",
    "import_schedule": "calibration.released",
    "speedup": "pipelines.enable",
    "summary": "pipelines.summary",
    "BudgetPlan": "plans",
    "Plan": "plans",
    "PlanSet": "plans",
    "ThresholdPlan": "plans",
    "Requirements": "plans.requirements",
    "PlanError": "utils.errors",
    "UserError": "utils.errors",
}


def __getattr__(name: str):
    """Import names when they are used, so that importing the package costs nothing."""
    if name not in _MODULES:
        raise AttributeError(f"module 'ertacache' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ertacache.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
