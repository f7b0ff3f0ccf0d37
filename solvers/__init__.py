"""Find a schedule for a cost graph within a budget, with a proof. Does not depend on torch."""

from .any_order.memory import least_memory_in_any_order
from .any_order.solve import solve_in_any_order
from .instances import budget_of, load_instance
from .least_memory import LeastMemory, least_memory
from .portfolio import SOLVERS, solve
from .progress import ProgressEvent
from .replay import InvalidScheduleError, Replay, replay
from .result import Ending, SolveResult, SolveStatus
from .schedule import Schedule
from .scopes import BoundScope

__all__ = [
    "SOLVERS",
    "BoundScope",
    "Ending",
    "InvalidScheduleError",
    "LeastMemory",
    "ProgressEvent",
    "Replay",
    "Schedule",
    "SolveResult",
    "SolveStatus",
    "budget_of",
    "least_memory",
    "least_memory_in_any_order",
    "load_instance",
    "replay",
    "solve",
    "solve_in_any_order",
]
