"""The state of a solve: best schedule, best bound, what happened, when to stop."""

from __future__ import annotations

import time

from graph_capture.cost_graph import CostGraph

from .progress import Progress, ProgressEvent
from .replay import InvalidScheduleError, replay
from .result import OPTIMAL_GAP, SolveResult, SolveStatus
from .schedule import Schedule

GLOBAL_SCOPE = "every schedule whose first runs keep the base order"


class Incumbent:
    """Best schedule and best bound of one solve.

    Schedules come in as claims and are replayed; only valid ones within the
    budget are taken.
    """

    def __init__(
        self,
        graph: CostGraph,
        budget_bytes: int,
        time_limit_s: float,
        progress: Progress | None = None,
    ) -> None:
        self.graph = graph
        self.budget_bytes = budget_bytes
        self.begin_s = time.monotonic()
        self.deadline_s = self.begin_s + time_limit_s
        self.progress = progress
        self.schedule: Schedule | None = None
        self.cost_ns: int | None = None
        self.peak_bytes: int | None = None
        self.bound_ns = graph.base_cost_ns
        self.infeasible = False
        self.solver = ""
        self.log: list[str] = []

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.begin_s

    @property
    def left_s(self) -> float:
        return self.deadline_s - time.monotonic()

    @property
    def gap(self) -> float | None:
        if self.cost_ns is None:
            return None
        if self.bound_ns <= 0:
            return 0.0 if self.cost_ns == 0 else float("inf")
        return max(0.0, (self.cost_ns - self.bound_ns) / self.bound_ns)

    @property
    def solved(self) -> bool:
        """Whether nothing is left to do: proven optimal or proven infeasible."""
        return self.infeasible or (self.gap is not None and self.gap <= OPTIMAL_GAP)

    def offer(self, schedule: Schedule | None, solver: str) -> bool:
        """Replay ``schedule``; whether it is the best so far.

        Raises
        ------
        RuntimeError
            When it costs less than the bound: a defect, never to be hidden.
        """
        if schedule is None:
            return False
        try:
            outcome = replay(self.graph, schedule)
        except InvalidScheduleError as error:
            self.note(f"{solver}: schedule refused: {error}")
            return False
        if outcome.peak_bytes > self.budget_bytes:
            return False
        if outcome.cost_ns < self.bound_ns:
            raise RuntimeError(
                f"{solver}: a schedule of {outcome.cost_ns} below the bound {self.bound_ns}"
            )
        if self.cost_ns is not None and outcome.cost_ns >= self.cost_ns:
            return False
        self.schedule = schedule
        self.cost_ns = outcome.cost_ns
        self.peak_bytes = outcome.peak_bytes
        self.solver = solver
        self.note(f"{solver}: schedule with {self._overhead(outcome.cost_ns)} overhead")
        return True

    def raise_bound(self, bound_ns: int, solver: str) -> bool:
        """Take ``bound_ns`` if it is higher; whether it was.

        Raises
        ------
        RuntimeError
            When the bound is above the best schedule: a defect, never to be hidden.
        """
        if self.cost_ns is not None and bound_ns > self.cost_ns:
            raise RuntimeError(f"{solver}: bound {bound_ns} above a schedule of {self.cost_ns}")
        if bound_ns <= self.bound_ns:
            return False
        self.bound_ns = bound_ns
        self.note(f"{solver}: bound of {self._overhead(bound_ns)} overhead")
        return True

    def exclude(self, solver: str, reason: str) -> None:
        """Take note that nothing fits.

        Raises
        ------
        RuntimeError
            When a schedule does fit: a defect, never to be hidden.
        """
        if self.schedule is not None:
            raise RuntimeError(f"{solver}: excludes a budget that a schedule fits in: {reason}")
        self.infeasible = True
        self.note(f"{solver}: nothing fits in {self.budget_bytes} bytes: {reason}")

    def note(self, message: str) -> None:
        """Write down an event and tell the caller."""
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
                )
            )

    def result(self) -> SolveResult:
        """The claim as it stands."""
        if self.schedule is None:
            status = SolveStatus.INFEASIBLE if self.infeasible else SolveStatus.UNKNOWN
        elif self.solved:
            status = SolveStatus.OPTIMAL
        else:
            status = SolveStatus.FEASIBLE
        return SolveResult(
            status=status,
            schedule=self.schedule,
            cost_ns=self.cost_ns,
            lower_bound_ns=self.bound_ns,
            bound_scope=GLOBAL_SCOPE,
            peak_bytes=self.peak_bytes,
            solver=self.solver,
            solve_s=self.elapsed_s,
            log=tuple(self.log),
        )

    def _overhead(self, cost_ns: int) -> str:
        base = max(1, self.graph.base_cost_ns)
        return f"{100 * (cost_ns - base) / base:.3f} %"
