"""Train a PyTorch model under a byte budget: plan what to recompute, apply it, measure it."""

from .errors import (
    CallMismatchError,
    CaptureError,
    InfeasibleBudgetError,
    PlanError,
    PlanMismatchError,
)
from .measure import Measurement, measure
from .optimize import optimize
from .plan import Plan

__all__ = [
    "CallMismatchError",
    "CaptureError",
    "InfeasibleBudgetError",
    "Measurement",
    "Plan",
    "PlanError",
    "PlanMismatchError",
    "measure",
    "optimize",
]
