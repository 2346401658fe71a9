"""What calibration learned, as data: plans, their files, names, cards and drift."""

from ertacache.plans.budget import BudgetPlan
from ertacache.plans.plan import Plan
from ertacache.plans.plan_set import PlanSet
from ertacache.plans.threshold import ThresholdPlan

__all__ = ["BudgetPlan", "Plan", "PlanSet", "ThresholdPlan"]
