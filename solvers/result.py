"""What a solver returns: a claim, with its proof."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from graph_capture.units import format_bytes, format_us

from .schedule import Schedule
from .scopes import BoundScope


class SolveStatus(StrEnum):
    """How a solve ended."""

    OPTIMAL = "optimal"  # proven within 0.01 % of the bound
    FEASIBLE = "feasible"  # a schedule and a bound, with a gap
    INFEASIBLE = "infeasible"  # proven that nothing fits
    UNKNOWN = "unknown"  # no schedule found, and none ruled out


class Ending(StrEnum):
    """Why a solve stopped searching."""

    SOLVED = "solved"  # proven: the optimum, or that nothing fits
    GAP = "gap"  # within the gap that was asked for
    TIME_LIMIT = "time_limit"
    STOPPED = "stopped"  # by the caller
    EXHAUSTED = "exhausted"  # the method has nothing left to try
    TOO_LARGE = "too_large"  # the method does not take a graph of this size
    FAILED = "failed"  # OR-tools' process died, was killed, or its solver gave up


OPTIMAL_GAP = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveResult:
    """A schedule, its cost, and how close it is to the least possible.

    Parameters
    ----------
    status
        See :class:`SolveStatus`.
    ending
        Why the search ended there.
    schedule
        ``None`` when no schedule was found.
    cost_ns
        Time of the whole step under ``schedule``, from the replay.
    lower_bound_ns
        No schedule within ``bound_scope`` takes less time.
    bound_scope
        What the bound covers. ``status`` has the same scope; a schedule
        outside a scope may take less than its bound.
    global_bound_ns
        No schedule whose first runs keep the base order takes less time.
    staged_infeasible
        Proven: no staged schedule fits, so that Checkmate and MOCCASIN have none.
        Others may fit.
    peak_bytes
        From the replay.
    solver
        Name of the method that found the schedule.
    solve_s
        Wall-clock time.
    log
        One line per event: who found what, when.
    """

    status: SolveStatus
    ending: Ending
    schedule: Schedule | None
    cost_ns: int | None
    lower_bound_ns: int
    bound_scope: BoundScope
    global_bound_ns: int
    staged_infeasible: bool
    peak_bytes: int | None
    solver: str
    solve_s: float
    log: tuple[str, ...] = ()

    @property
    def gap(self) -> float | None:
        """``(cost - bound) / bound``, on the time of the whole step."""
        return None if self.cost_ns is None else relative_gap(self.cost_ns, self.lower_bound_ns)

    def __repr__(self) -> str:
        if self.schedule is None or self.cost_ns is None or self.peak_bytes is None:
            found = "no schedule"
        else:
            found = (
                f"{len(self.schedule.order)} runs, peak {format_bytes(self.peak_bytes)}, "
                f"step {format_us(self.cost_ns / 1e3)}, gap {self.gap:.2%}"
            )
        return f"<SolveResult {self.status} by {self.solver}: {found}, {self.solve_s:.2f} s>"


def relative_gap(cost_ns: int, bound_ns: int) -> float:
    """``(cost - bound) / bound``; infinite above a bound of zero."""
    if bound_ns <= 0:
        return 0.0 if cost_ns == 0 else float("inf")
    return max(0.0, (cost_ns - bound_ns) / bound_ns)
