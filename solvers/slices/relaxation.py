"""One relaxation, solved by HiGHS under the eyes of the loop that refines it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import highspy
import numpy as np
from numpy.typing import NDArray

from graph_capture.cost_graph import CostGraph

from ..arrays import GraphArrays
from ..highs import OBJECTIVE_SCALE, quiet_highs, rounded_bound
from ..incumbent import Incumbent
from ..replay import replay
from ..schedule import Schedule
from .model import SliceModel
from .repair import NAME, Repair
from .schedule import nearest_staged, schedule_of, solution_of
from .slicing import Slicing

PATIENCE_S = 2.0
"""HiGHS goes on this long without a new solution, and half as long as it has run, if more."""

ALONE_S = 5.0
"""Of a solve, before anything counts that a second thread has found."""

OUTDATED = 0.15
"""Share of what was open that an incumbent from elsewhere must close for a new start."""


class Companion(Protocol):
    """Who works beside the loop."""

    def hear(self, schedule: Schedule) -> None:
        """Hear of a solution, which may not fit."""

    def suggest(self, slicing: Slicing) -> None:
        """Hear of a round's next slicing."""

    def collect(self) -> None:
        """Offer what has been found."""


@dataclass(frozen=True)
class Relaxed:
    """What the mixed-integer solver says of one relaxation.

    ``bound`` is scaled like the objective; ``solutions`` are staged schedules,
    the best one last, which may exceed the budget.
    """

    bound: float
    solutions: list[Schedule]
    infeasible: bool
    cut: bool
    """Whether the clock, impatience or a better incumbent ended it, and not a proof."""

    outdated: bool = False
    """Whether a better incumbent ended it."""


def bound_ns(graph: CostGraph, scaled: float) -> int:
    """A bound in units of the objective as time of the whole step."""
    return graph.base_cost_ns + rounded_bound(scaled, graph.base_cost_ns)


def solve_relaxation(
    state: Incumbent,
    g: GraphArrays,
    model: SliceModel,
    *,
    staged: bool,
    seed: int,
    absolute_gap: float,
    companion: Companion | None = None,
    repair: Repair | None = None,
) -> Relaxed:
    """Run HiGHS on the model, warm-started by the incumbent.

    The run ends early when a solution is within the gap of the best bound, when the
    bound proves the incumbent, and when it takes long while its own solutions do
    not fit: then other slices are worth more than its proof. ``companion`` and
    ``repair`` hear of each solution.
    """
    if model.num_cols == 0:
        schedule = schedule_of(g, model, np.zeros(0))
        solutions = [] if schedule is None else [schedule]
        return Relaxed(0.0, solutions, model.infeasible, False)
    h = quiet_highs(time_limit_s=max(state.left_s, 0.05), seed=seed)
    h.setOptionValue("mip_abs_gap", absolute_gap)
    h.setOptionValue("mip_rel_gap", 1e-9)
    h.passModel(model.lp)
    watch = _Watch(
        state,
        g,
        model,
        staged=staged,
        absolute_gap=absolute_gap,
        companion=companion,
        repair=repair,
    )
    if state.schedule is not None:
        solution = highspy.HighsSolution()
        solution.col_value = watch.incumbent().tolist()
        solution.value_valid = True
        h.setSolution(solution)
    h.cbMipImprovingSolution.subscribe(watch.improving_solution)
    h.cbMipInterrupt.subscribe(watch.interrupt)
    h.cbMipUserSolution.subscribe(watch.user_solution)
    h.run()
    status = h.getModelStatus()
    info = h.getInfo()
    if status == highspy.HighsModelStatus.kInfeasible:
        return Relaxed(0.0, [], True, False)
    if info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
        watch.take(np.array(h.getSolution().col_value))
    return Relaxed(
        bound=info.mip_dual_bound,
        solutions=watch.solutions,
        infeasible=False,
        cut=not (status == highspy.HighsModelStatus.kOptimal or watch.is_over),
        outdated=watch.outdated,
    )


class _Watch:
    """Looks on while HiGHS runs: takes its solutions, and tells it when to stop."""

    def __init__(
        self,
        state: Incumbent,
        g: GraphArrays,
        model: SliceModel,
        *,
        staged: bool,
        absolute_gap: float,
        companion: Companion | None,
        repair: Repair | None,
    ) -> None:
        self.state, self.g, self.model = state, g, model
        self.staged, self.companion, self.repair = staged, companion, repair
        self.given_ns: int | None = None
        known_ns = state.bound_ns if staged else state.global_bound_ns
        self.enough_ns = known_ns + absolute_gap * state.graph.base_cost_ns / OBJECTIVE_SCALE
        self.begin_s = self.latest_s = time.monotonic()
        self.fits = False
        self.cannot_improve = False
        self.proven = False
        self.outdated = False
        self.solutions: list[Schedule] = []

    @property
    def is_over(self) -> bool:
        """Whether nothing was left to do when HiGHS was told to stop."""
        return self.proven or self.cannot_improve

    def incumbent(self) -> NDArray[np.float64]:
        """The best schedule known, as a solution."""
        schedule = self.state.schedule
        assert schedule is not None
        self.given_ns = self.state.cost_ns
        if self.staged:
            schedule = nearest_staged(self.g, schedule)
        return solution_of(self.state.graph, self.g, self.model, schedule)

    def user_solution(self, event: highspy.HighsCallbackEvent) -> None:
        """Hand over what others have found since."""
        if self.companion is None or self.state.elapsed_s < ALONE_S:
            return
        self.companion.collect()
        cost_ns = self.state.cost_ns
        if cost_ns is None or (self.given_ns is not None and cost_ns >= self.given_ns):
            return
        event.data_in.setSolution(self.incumbent())

    def take(self, values: NDArray[np.float64]) -> None:
        """Turn a solution into schedules.

        Raises
        ------
        RuntimeError
            When it misses an input: a defect of the model, never to be hidden.
        """
        schedule = schedule_of(self.g, self.model, values)
        if schedule is None:
            raise RuntimeError("a solution of the slice relaxation misses an input")
        self.state.offer(schedule_of(self.g, self.model, values, staged=False), NAME)
        self.state.offer(schedule, NAME)
        outcome = replay(self.state.graph, schedule)
        self.fits = outcome.peak_bytes <= self.state.budget_bytes
        self.cannot_improve = outcome.cost_ns <= self.enough_ns
        if schedule in self.solutions[-1:]:
            return
        self.solutions.append(schedule)
        if self.companion is not None:
            self.companion.hear(schedule)
        if self.repair is not None and not self.fits:
            self.repair.at_once(schedule)
        self.latest_s = time.monotonic()

    def improving_solution(self, event: highspy.HighsCallbackEvent) -> None:
        self.take(np.array(event.data_out.mip_solution))

    def interrupt(self, event: highspy.HighsCallbackEvent) -> None:
        state = self.state
        proven_ns = bound_ns(state.graph, event.data_out.mip_dual_bound)
        self.proven = state.suffices(proven_ns)
        now_s = time.monotonic()
        idle_s = now_s - self.latest_s
        slow = not self.fits and idle_s > max(PATIENCE_S, 0.5 * (now_s - self.begin_s))
        self.outdated = self._outdated(now_s, proven_ns)
        if self.is_over or slow or self.outdated or state.left_s <= 0:
            event.interrupt()

    def _outdated(self, now_s: float, proven_ns: int) -> bool:
        """Whether others have found so much that a new start from there is worth it.

        HiGHS asks for solutions rarely; before the first branching it may take
        a minute until then.
        """
        if self.companion is None or self.state.elapsed_s < ALONE_S:
            return False
        if now_s - self.begin_s < PATIENCE_S:
            return False
        self.companion.collect()
        cost_ns, given_ns = self.state.cost_ns, self.given_ns
        if cost_ns is None or given_ns is None:
            return cost_ns is not None
        return given_ns - cost_ns > OUTDATED * (given_ns - proven_ns)
