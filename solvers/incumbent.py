"""The state of a solve: best schedule, best bound, event log, and when to stop."""

from __future__ import annotations

import threading
import time

from graph_capture.cost_graph import CostGraph

from .checked import checked_budget
from .progress import Progress, ProgressEvent
from .replay import InvalidScheduleError, replay
from .result import OPTIMAL_GAP, Ending, SolveResult, SolveStatus, relative_gap
from .schedule import Schedule
from .scopes import BoundScope


class Incumbent:
    """The best schedule and the best bound of one solve.

    Schedules come in as claims and are replayed; only valid ones within the budget are
    taken. There are two bounds: one for every schedule whose first runs keep the base
    order, and one for staged schedules only (``stages.py``), the class that the exact
    models of the field cover.

    Parameters
    ----------
    enough_gap
        Gap at which the solve stops.
    """

    def __init__(
        self,
        graph: CostGraph,
        budget_bytes: int,
        time_limit_s: float,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
        enough_gap: float = 0.0,
    ) -> None:
        self.enough_gap = max(enough_gap, OPTIMAL_GAP)
        self.graph = graph
        self.budget_bytes = checked_budget(budget_bytes)
        self.begin_s = time.monotonic()
        self.deadline_s = self.begin_s + time_limit_s
        self.progress = progress
        self.stop = stop
        self.schedule: Schedule | None = None
        self.cost_ns: int | None = None
        self.peak_bytes: int | None = None
        self.global_bound_ns = graph.base_cost_ns
        self.staged_bound_ns = graph.base_cost_ns
        self.infeasible = False
        self.staged_infeasible = False
        self.gave_up: Ending | None = None
        self.solver = ""
        self.log: list[str] = []

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.begin_s

    @property
    def stopped(self) -> bool:
        return self.stop is not None and self.stop.is_set()

    @property
    def left_s(self) -> float:
        """Seconds left; zero once ``stop`` is set."""
        return 0.0 if self.stopped else self.deadline_s - time.monotonic()

    @property
    def bound_ns(self) -> int:
        """Lower bound on staged schedules; never above the incumbent's cost."""
        bound_ns = max(self.global_bound_ns, self.staged_bound_ns)
        return bound_ns if self.cost_ns is None else min(bound_ns, self.cost_ns)

    @property
    def bound_scope(self) -> BoundScope:
        """The scope of :attr:`bound_ns`: the wider one where both bounds prove as much."""
        if self.bound_ns <= self.global_bound_ns or self._proven_by(self.global_bound_ns):
            return BoundScope.BASE_ORDER
        return BoundScope.STAGED

    @property
    def gap(self) -> float | None:
        return None if self.cost_ns is None else relative_gap(self.cost_ns, self.bound_ns)

    def _proven_by(self, bound_ns: int) -> bool:
        return self.cost_ns is not None and relative_gap(self.cost_ns, bound_ns) <= OPTIMAL_GAP

    @property
    def solved(self) -> bool:
        """Whether the solve is proven optimal or proven infeasible."""
        return self.infeasible or self._proven_by(self.bound_ns)

    @property
    def done(self) -> bool:
        """Whether nothing is left to do: solved, or within the requested gap."""
        return self.solved or self.suffices(self.bound_ns)

    def suffices(self, bound_ns: int) -> bool:
        """Whether the best schedule would be close enough to this bound."""
        return self.cost_ns is not None and relative_gap(self.cost_ns, bound_ns) <= self.enough_gap

    def offer(self, schedule: Schedule | None, solver: str) -> bool:
        """Replay ``schedule`` and return whether it is the best so far.

        Raises
        ------
        RuntimeError
            When it costs less than the bound. This is a defect and is never hidden.
        """
        if schedule is None:
            return False
        try:
            outcome = replay(self.graph, schedule)
        except InvalidScheduleError as error:
            self.note(solver, f"schedule refused: {error}")
            return False
        if outcome.peak_bytes > self.budget_bytes:
            return False
        if outcome.cost_ns < self.global_bound_ns:
            raise RuntimeError(
                f"{solver}: a schedule of {outcome.cost_ns} below the bound {self.global_bound_ns}"
            )
        if self.cost_ns is not None and outcome.cost_ns >= self.cost_ns:
            return False
        self.schedule = schedule
        self.cost_ns = outcome.cost_ns
        self.peak_bytes = outcome.peak_bytes
        self.solver = solver
        self.note(solver, f"schedule with {self._overhead(outcome.cost_ns)} overhead")
        return True

    def raise_bound(self, bound_ns: int, solver: str, *, staged: bool = False) -> bool:
        """Take ``bound_ns`` if it is higher, and return whether it was.

        Parameters
        ----------
        staged
            The bound holds for staged schedules only.

        Raises
        ------
        RuntimeError
            When the bound is above the best schedule and that is within its scope. This
            is a defect and is never hidden.
        """
        if not staged and self.cost_ns is not None and bound_ns > self.cost_ns:
            raise RuntimeError(f"{solver}: bound {bound_ns} above a schedule of {self.cost_ns}")
        if bound_ns <= (self.bound_ns if staged else self.global_bound_ns):
            return False
        if staged:
            self.staged_bound_ns = bound_ns
        else:
            self.global_bound_ns = bound_ns
        scope = ", of staged schedules" if staged else ""
        self.note(solver, f"bound of {self._overhead(bound_ns)} overhead{scope}")
        return True

    def exclude(self, solver: str, reason: str, *, staged: bool = False) -> None:
        """Record that nothing fits.

        Raises
        ------
        RuntimeError
            When a schedule within the scope does fit. This is a defect and is never
            hidden.
        """
        if staged:
            self.staged_infeasible = True
            self.note(solver, f"no staged schedule fits: {reason}")
            return
        if self.schedule is not None:
            raise RuntimeError(f"{solver}: excludes a budget that a schedule fits in: {reason}")
        self.infeasible = True
        self.note(solver, f"nothing fits in {self.budget_bytes} bytes: {reason}")

    def give_up(self, solver: str, ending: Ending, reason: str) -> None:
        """Record that a method ended before it had searched to its end."""
        self.gave_up = ending
        self.note(solver, reason)

    def note(self, solver: str, words: str) -> None:
        """Log what a method says and report it to the caller."""
        message = f"{solver}: {words}"
        elapsed_s = self.elapsed_s
        self.log.append(f"{elapsed_s:8.2f} s  {message}")
        if self.progress is not None:
            self.progress(
                ProgressEvent(
                    elapsed_s=elapsed_s,
                    incumbent_ns=self.cost_ns,
                    bound_ns=self.bound_ns,
                    gap=self.gap,
                    message=message,
                    global_bound_ns=self.global_bound_ns,
                    solver=solver,
                )
            )

    def result(self) -> SolveResult:
        """Return the claim as it stands."""
        if self.schedule is None:
            status = SolveStatus.INFEASIBLE if self.infeasible else SolveStatus.UNKNOWN
        elif self.solved:
            status = SolveStatus.OPTIMAL
        else:
            status = SolveStatus.FEASIBLE
        proven_globally = self.bound_scope is BoundScope.BASE_ORDER
        return SolveResult(
            status=status,
            ending=self._ending(),
            schedule=self.schedule,
            cost_ns=self.cost_ns,
            lower_bound_ns=self.global_bound_ns if proven_globally else self.bound_ns,
            bound_scope=self.bound_scope,
            global_bound_ns=self.global_bound_ns,
            staged_infeasible=self.staged_infeasible,
            peak_bytes=self.peak_bytes,
            solver=self.solver,
            solve_s=self.elapsed_s,
            log=tuple(self.log),
        )

    def _ending(self) -> Ending:
        if self.solved:
            return Ending.SOLVED
        if self.done:
            return Ending.GAP
        if self.stopped:
            return Ending.STOPPED
        if self.gave_up is not None:
            return self.gave_up
        return Ending.TIME_LIMIT if self.left_s <= 0 else Ending.EXHAUSTED

    def _overhead(self, cost_ns: int) -> str:
        base = max(1, self.graph.base_cost_ns)
        return f"{100 * (cost_ns - base) / base:.3f} %"
