"""ERTACache: run a diffusion transformer at a fraction of its model calls, with hardly a visible change."""

from ertacache.conditions import Conditions
from ertacache.errors import PlanError, UserError
from ertacache.plan import BudgetPlan, Plan, ThresholdPlan

__version__ = "0.1.0"
__all__ = ["BudgetPlan", "Conditions", "Plan", "PlanError", "ThresholdPlan", "UserError", "__version__"]
