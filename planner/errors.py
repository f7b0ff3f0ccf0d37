"""The planner's errors; each message says what to do next."""

from __future__ import annotations

from graph_capture.errors import CaptureError
from graph_capture.printable import printable


class PlanError(ValueError):
    """A plan cannot be made, read or applied."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, lines=True))  # it may quote a file


class InfeasibleBudgetError(PlanError):
    """No schedule within the budget was found.

    Parameters
    ----------
    message
        The error's text.
    budget_bytes
        The requested budget, headroom included.
    min_budget_bytes
        A budget for which a schedule is known, with the same ``headroom=``.
    lower_bound_bytes
        No lower budget can work with the same ``headroom=``.
    """

    def __init__(
        self, message: str, *, budget_bytes: int, min_budget_bytes: int, lower_bound_bytes: int
    ) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.min_budget_bytes = min_budget_bytes
        self.lower_bound_bytes = lower_bound_bytes


class PlanMismatchError(PlanError):
    """The plan was made for another model, input, version or device."""


class CallMismatchError(PlanError):
    """A planned module was called in another way than it was planned for."""


class PlanWarning(UserWarning):
    """A training step is correct, but not as its plan promised: unplanned, or above the budget."""


class OutcomeChangedError(CallMismatchError):
    """A value that decides a branch or a size differs from the one the plan was made for."""


__all__ = [
    "CallMismatchError",
    "CaptureError",
    "InfeasibleBudgetError",
    "OutcomeChangedError",
    "PlanError",
    "PlanMismatchError",
    "PlanWarning",
]
