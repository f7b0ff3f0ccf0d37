"""Checkmate: the exact mixed-integer program, and the rounding of its relaxation.

The programs are in ``reference/checkmate_model.py``, the rounding in
``reference/checkmate_rounding.py``; OR-tools solves them in a child process, HiGHS
through MathOpt by default. A reference to compare with: it has a stage for
every operator, some n² binaries, so hundreds of operators are its end.

What it proves holds for the *staged class* (``stages.py``) alone: schedules
outside of it may cost less, so ``state`` takes its bound with that scope.

Known imperfections
-------------------
- MathOpt passes on no solutions of HiGHS while it runs, and HiGHS is at times
  late for its limit. A run that has to be killed then leaves its bound (read
  off the log) and no schedule; ``backend="scip"`` and ``"cp_sat"`` stream.
- Building is Python: 366,630 binaries (a 12-layer GPT-2 of 606 operators) take
  some twenty seconds. It stops at the time limit.
- HiGHS accepts a memory that is over by a millionth. A schedule that replay
  finds over the budget is not offered; the program is solved again with that
  much less room, the bound stays that of the first.
- Beyond the paper, in the rounding's favour: runs that nobody reads are removed
  (``slices/schedule.py``), what is freed is linearized in a way of its own
  (``reference/checkmate_model.py``), and more than one allowance is tried.
- With ``"cp_sat"`` and several workers the schedule may differ from run to run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..arrays import GraphArrays, graph_arrays
from ..highs import OBJECTIVE_SCALE, rounded_bound
from ..incumbent import Incumbent
from ..replay import replay
from ..result import OPTIMAL_GAP, Ending
from ..schedule import Schedule
from ..scopes import BoundScope
from .checkmate_model import CheckmateModel, build_checkmate_model, count_columns, schedule_of
from .checkmate_rounding import rounded_schedules
from .ortools_process import BACKENDS, RunOutcome, RunStatus, run_ortools

NAME = "checkmate"
ROUNDING_NAME = "checkmate_lp_rounding"

MAX_COLUMNS = 2_000_000
"""R and S; more are refused, with a note: a machine's memory ends about there."""

ABSOLUTE_GAP = 0.01
"""Units of the objective (0.01 % of the step) within which a program counts as solved."""

MAX_TRIES = 4

ALLOWANCES = (0.1, 0.0, 0.02, 0.05, 0.15, 0.2, 0.3, 0.4, 0.5)
"""Shares of the budget that the relaxation leaves free for the rounding, the paper's own first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckmateOutcome:
    """What a run came to, by replay.

    Parameters
    ----------
    schedule, cost_ns
        The best that fits; ``None`` when there is none.
    class_bound_ns
        No staged schedule within the budget costs less.
    infeasible
        Proven: no staged schedule fits.
    allowance
        Share of the budget left free for the rounding that gave ``schedule``.
    relaxations
        How each relaxation that was solved for the rounding ended, by the share of the
        budget that it left free.
    """

    schedule: Schedule | None = None
    cost_ns: int | None = None
    class_bound_ns: int = 0
    infeasible: bool = False
    allowance: float = 0.0
    relaxations: Mapping[float, RunStatus] = field(default_factory=dict)

    @property
    def proven(self) -> bool:
        """Whether ``schedule`` is optimal in its class, within 0.01 %."""
        return (
            self.cost_ns is not None
            and self.cost_ns - self.class_bound_ns <= OPTIMAL_GAP * self.class_bound_ns
        )


def checkmate_milp(
    state: Incumbent, *, seed: int = 0, workers: int = 1, backend: str = "highs"
) -> CheckmateOutcome:
    """Solve Checkmate's program to the end of ``state``'s time; offer what it finds.

    Parameters
    ----------
    workers
        Threads, where the backend has them (SCIP has one).
    backend
        One of :data:`~solvers.reference.ortools_process.BACKENDS`.

    Raises
    ------
    ValueError
        When there is no such backend.
    BackendUnavailableError
        When it is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known are {', '.join(BACKENDS)}")
    g = graph_arrays(state.graph)
    best = _Best(state, NAME)
    bound_ns, infeasible = state.graph.base_cost_ns, False
    room = state.budget_bytes
    for turn in range(MAX_TRIES):
        if _out_of_reach(state, g, NAME):
            break
        try:
            model = build_checkmate_model(
                g,
                room,
                whole_bytes=backend == "cp_sat",
                hint=state.schedule,
                graph=state.graph,
                deadline_s=state.deadline_s,
            )
        except TimeoutError as error:
            state.note(NAME, str(error))
            break
        outcome = _run(state, g, model, best, seed=seed, workers=workers, backend=backend)
        if outcome is None:
            break
        if turn == 0:
            bound_ns = _class_bound(state, outcome)
            infeasible = outcome.status is RunStatus.INFEASIBLE
        if outcome.values is None:
            break
        excess = best.take(schedule_of(g, model, outcome.values))
        if excess <= 0:
            break
        room -= excess
        state.note(NAME, f"a solution is {excess} bytes over the budget; again with less room")
    result = CheckmateOutcome(
        schedule=best.schedule,
        cost_ns=best.cost_ns,
        class_bound_ns=bound_ns,
        infeasible=infeasible,
    )
    _report(state, NAME, result)
    return result


def checkmate_lp_rounding(state: Incumbent, *, seed: int = 0) -> CheckmateOutcome:
    """Round Checkmate's relaxation (Section 5 of the paper), with less and more room left free.

    The relaxation is solved for a budget of ``(1 - allowance) B``; its S is
    rounded at thresholds, and at random, and R completed (``reference/checkmate_rounding.py``).
    The cheapest schedule that fits is offered, over all of :data:`ALLOWANCES` that
    there is time for, the paper's 0.1 first. No guarantee: nothing may fit.
    """
    g = graph_arrays(state.graph)
    best = _Best(state, ROUNDING_NAME)
    bound_ns, infeasible = state.graph.base_cost_ns, False
    used = 0.0
    relaxations: dict[float, RunStatus] = {}
    too_much = math.inf  # allowances from which on nothing is left to solve
    for allowance in ALLOWANCES:
        if allowance >= too_much:
            continue
        if _out_of_reach(state, g, ROUNDING_NAME):
            break
        room = int((1.0 - allowance) * state.budget_bytes)
        try:
            model = build_checkmate_model(g, room, integer=False, deadline_s=state.deadline_s)
        except TimeoutError as error:
            state.note(ROUNDING_NAME, str(error))
            break
        outcome = _run(state, g, model, None, seed=seed, workers=1, backend="highs")
        if outcome is None:
            break
        relaxations[allowance] = outcome.status
        if allowance == 0.0:
            bound_ns = _class_bound(state, outcome)
            infeasible = outcome.status is RunStatus.INFEASIBLE
        if outcome.status is not RunStatus.OPTIMAL or outcome.values is None:
            state.note(
                ROUNDING_NAME,
                f"relaxation at {1 - allowance:.2f} of the budget: "
                f"{outcome.status} {outcome.message}",
            )
            if outcome.status is not RunStatus.INFEASIBLE:
                break
            too_much = min(too_much, allowance)
            continue
        before_ns = best.cost_ns
        for schedule in rounded_schedules(g, model, outcome.values, np.random.default_rng(seed)):
            best.take(schedule)
            if state.left_s <= 0:
                break
        if best.cost_ns != before_ns:
            used = allowance
        if best.cost_ns is not None and best.cost_ns <= bound_ns:
            break
    if best.schedule is None:
        state.note(ROUNDING_NAME, "nothing that was rounded fits")
    result = CheckmateOutcome(
        schedule=best.schedule,
        cost_ns=best.cost_ns,
        class_bound_ns=bound_ns,
        infeasible=infeasible,
        allowance=used,
        relaxations=relaxations,
    )
    _report(state, ROUNDING_NAME, result)
    return result


class _Best:
    """The best schedule of this method, whatever ``state`` knows already."""

    def __init__(self, state: Incumbent, name: str) -> None:
        self.state, self.name = state, name
        self.schedule: Schedule | None = None
        self.cost_ns: int | None = None

    def take(self, schedule: Schedule) -> int:
        """Replay and offer; the bytes over the budget."""
        outcome = replay(self.state.graph, schedule)
        excess = outcome.peak_bytes - self.state.budget_bytes
        if excess <= 0 and (self.cost_ns is None or outcome.cost_ns < self.cost_ns):
            self.schedule, self.cost_ns = schedule, outcome.cost_ns
            self.state.offer(schedule, self.name)
        return excess


def _out_of_reach(state: Incumbent, g: GraphArrays, name: str) -> bool:
    """Whether there is no time left, or the program is too large; says so."""
    if state.left_s <= 0:
        state.note(name, "no time left")
        return True
    num = count_columns(g)
    if num > MAX_COLUMNS:
        reason = f"{num} binaries for {g.num_operators} operators are too many"
        state.give_up(name, Ending.TOO_LARGE, reason)
        return True
    return False


def _run(
    state: Incumbent,
    g: GraphArrays,
    model: CheckmateModel,
    best: _Best | None,
    *,
    seed: int,
    workers: int,
    backend: str,
) -> RunOutcome | None:
    """Solve ``model`` in what time there is; ``None`` when there is none or it came to no end."""

    def take(values: NDArray[np.float64]) -> None:
        if best is not None:
            best.take(schedule_of(g, model, values))

    if state.left_s <= 0:
        state.note(backend, f"no time left after building {len(model.program.cost)} columns")
        return None
    state.note(backend, f"{len(model.program.cost)} columns, {len(model.program.row_lower)} rows")
    nanosecond = OBJECTIVE_SCALE / max(1, state.graph.base_cost_ns)
    outcome = run_ortools(
        model.program,
        time_limit_s=state.left_s,
        stop=lambda: state.stopped,
        seed=seed,
        workers=workers,
        backend=backend,
        absolute_gap=max(ABSOLUTE_GAP, 0.9 * nanosecond),
        on_solution=take,
    )
    if outcome.status in (RunStatus.KILLED, RunStatus.DIED, RunStatus.FAILED):
        state.give_up(backend, Ending.FAILED, f"{outcome.status}: {outcome.message}")
    return outcome


def _class_bound(state: Incumbent, outcome: RunOutcome) -> int:
    base = state.graph.base_cost_ns
    if outcome.bound is None:
        return base
    return base + rounded_bound(outcome.bound, base)


def _report(state: Incumbent, name: str, result: CheckmateOutcome) -> None:
    """Raise the bound of staged schedules, or exclude them."""
    if result.infeasible:
        state.exclude(name, "its program has no solution", staged=True)
        return
    state.raise_bound(result.class_bound_ns, name, staged=True)
    if result.proven:
        state.note(name, f"optimal among {BoundScope.STAGED.words}")
