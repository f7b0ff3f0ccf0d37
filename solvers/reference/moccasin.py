"""MOCCASIN: retention intervals in a constraint program, solved by CP-SAT.

The program is in ``reference/moccasin_model.py``; OR-tools solves it in a child process.
As in the paper, Section 2.5, two phases: where nothing is known to fit, first the
peak is minimized down to the budget, from the schedule that keeps everything;
then the cost, from what was found.

What it proves holds for the staged class (``stages.py``) with no operator run
more than C times. With C = 2, the paper's choice, that costs something:
chain8h at half its memory needs 14.81 % where 13.43 % is possible. Its bound
is narrower than both scopes of :class:`Incumbent`, so it goes to the log and the outcome.

Known imperfections
-------------------
- With several workers CP-SAT's schedules, not its optima, may differ from run
  to run.
- CP-SAT counts in 64 bits: bytes (divided by their greatest common divisor)
  times n²/2 events must stay below 9e18, else it refuses the program.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..arrays import GraphArrays, graph_arrays
from ..incumbent import Incumbent
from ..replay import replay
from ..result import OPTIMAL_GAP, Ending
from ..schedule import Schedule
from ..scopes import staged_words
from ..stages import order_of, stages_of
from .moccasin_model import MoccasinModel, build_moccasin_model, schedule_of
from .ortools_process import RunOutcome, RunStatus, run_ortools

NAME = "moccasin"


@dataclass(frozen=True, slots=True, kw_only=True)
class MoccasinOutcome:
    """What a run came to, by replay.

    Parameters
    ----------
    schedule, cost_ns
        The best that fits; ``None`` when none was found.
    class_bound_ns
        No staged schedule within the budget that runs every operator at most
        ``num_runs`` times costs less.
    infeasible
        Proven: no such schedule fits.
    num_runs
        C.
    """

    schedule: Schedule | None
    cost_ns: int | None
    class_bound_ns: int
    infeasible: bool
    num_runs: int

    @property
    def proven(self) -> bool:
        """Whether ``schedule`` is optimal in its class, within 0.01 %."""
        return (
            self.cost_ns is not None
            and self.cost_ns - self.class_bound_ns <= OPTIMAL_GAP * self.class_bound_ns
        )


def moccasin(
    state: Incumbent, *, seed: int = 0, workers: int = 1, num_runs: int = 2
) -> MoccasinOutcome:
    """Solve MOCCASIN's program to the end of ``state``'s time; offer what it finds.

    Parameters
    ----------
    workers
        CP-SAT's threads.
    num_runs
        C: how often an operator may run.
    """
    if num_runs < 1:
        raise ValueError(f"an operator runs at least once, not {num_runs} times")
    g = graph_arrays(state.graph)
    # CP-SAT takes no demand below zero: what is there all the while stands for the difference.
    below_bytes = max(0, -int(g.workspace.min(initial=0)))
    g = g._replace(
        workspace=g.workspace + below_bytes, resident_bytes=g.resident_bytes - below_bytes
    )
    search = _Search(state, g, seed, workers, num_runs)
    start = _start(state, num_runs)
    if start is None:
        start = search.fit()
    if start is not None:
        search.take(start)
        search.improve(start)
    outcome = MoccasinOutcome(
        schedule=search.schedule,
        cost_ns=search.cost_ns,
        class_bound_ns=search.bound_ns,
        infeasible=search.infeasible,
        num_runs=num_runs,
    )
    _report(state, outcome)
    return outcome


def _start(state: Incumbent, num_runs: int) -> Schedule | None:
    """What is known already, if it or the staged schedule nearest to it is of the class."""
    for known in (state.schedule, Schedule.keep_all(state.graph)):
        if known is None:
            continue
        schedule = Schedule(tuple(order_of(stages_of(known))))
        if max(schedule.recomputed().values(), default=0) >= num_runs:
            continue
        if replay(state.graph, schedule).peak_bytes <= state.budget_bytes:
            return schedule
    return None


class _Search:
    """The two phases, and the best that they found."""

    def __init__(
        self, state: Incumbent, g: GraphArrays, seed: int, workers: int, num_runs: int
    ) -> None:
        self.state, self.g = state, g
        self.seed, self.workers, self.num_runs = seed, workers, num_runs
        self.schedule: Schedule | None = None
        self.cost_ns: int | None = None
        self.bound_ns = state.graph.base_cost_ns
        self.infeasible = False

    def fit(self) -> Schedule | None:
        """Phase 1: lower the peak until it fits."""
        outcome, model = self._run(Schedule.keep_all(self.state.graph), least_peak=True)
        if outcome is None or outcome.values is None:
            return None
        least = model.program.domains[model.peak][0]
        if outcome.bound is not None and outcome.bound > least + 0.5:
            self.infeasible = True
            return None
        schedule = schedule_of(self.g, model, outcome.values.tolist())
        if replay(self.state.graph, schedule).peak_bytes > self.state.budget_bytes:
            self.state.note(NAME, "phase 1 found nothing that fits")
            return None
        return schedule

    def improve(self, start: Schedule) -> None:
        """Phase 2: lower the cost."""
        outcome, _ = self._run(start, least_peak=False)
        if outcome is None:
            return
        if outcome.status is RunStatus.INFEASIBLE:
            raise RuntimeError(f"{NAME}: the program excludes a schedule that fits")
        if outcome.bound is not None:
            self.bound_ns += max(0, int(np.ceil(outcome.bound - 1e-6)))

    def take(self, schedule: Schedule) -> None:
        """Replay and offer."""
        outcome = replay(self.state.graph, schedule)
        if outcome.peak_bytes > self.state.budget_bytes:
            raise RuntimeError(
                f"{NAME}: a solution needs {outcome.peak_bytes} bytes of {self.state.budget_bytes}"
            )
        if self.cost_ns is None or outcome.cost_ns < self.cost_ns:
            self.schedule, self.cost_ns = schedule, outcome.cost_ns
            self.state.offer(schedule, NAME)

    def _run(self, start: Schedule, *, least_peak: bool) -> tuple[RunOutcome | None, MoccasinModel]:
        state = self.state
        model = build_moccasin_model(
            self.g,
            state.budget_bytes,
            num_runs=self.num_runs,
            least_peak=least_peak,
            hint=start,
            graph=state.graph,
        )
        phase = 1 if least_peak else 2
        if state.left_s <= 0:
            state.note(NAME, f"no time left for phase {phase}")
            return None, model
        num_columns, num_intervals = len(model.program.domains), len(model.program.intervals)
        state.note(NAME, f"phase {phase}, {num_columns} columns, {num_intervals} intervals")

        def found(values: NDArray[np.float64]) -> None:
            if not least_peak:
                self.take(schedule_of(self.g, model, values.tolist()))

        outcome = run_ortools(
            model.program,
            time_limit_s=state.left_s,
            stop=lambda: state.stopped,
            seed=self.seed,
            workers=self.workers,
            on_solution=found,
        )
        if outcome.status in (RunStatus.KILLED, RunStatus.DIED, RunStatus.FAILED):
            state.give_up(NAME, Ending.FAILED, f"{outcome.status}: {outcome.message}")
        return outcome, model


def _report(state: Incumbent, outcome: MoccasinOutcome) -> None:
    """Say what is proven of the class."""
    scope = staged_words(outcome.num_runs)
    if outcome.infeasible:
        state.note(NAME, f"nothing fits among {scope}")
        return
    base = max(1, state.graph.base_cost_ns)
    overhead = 100 * (outcome.class_bound_ns - base) / base
    word = "optimal" if outcome.proven else "bound"
    state.note(NAME, f"{word}, {overhead:.3f} % overhead at least, among {scope}")
