"""What a run will take, told before it starts: parameters, FLOPs, memory, time and cost. Pure arithmetic, without torch."""

from launcher.plan.accelerators import ACCELERATORS, Accelerator, find_accelerator
from launcher.plan.budget import TOKENS_A_PARAMETER, TrainingBudget, TrainingState, plan_budget
from launcher.plan.plan import Assumptions, Factors, Plan, StagePlan
from launcher.plan.report import plan_recipe
from launcher.plan.units import PlanError

__all__ = [
    "ACCELERATORS",
    "TOKENS_A_PARAMETER",
    "Accelerator",
    "Assumptions",
    "Factors",
    "Plan",
    "PlanError",
    "StagePlan",
    "TrainingBudget",
    "TrainingState",
    "find_accelerator",
    "plan_budget",
    "plan_recipe",
]
