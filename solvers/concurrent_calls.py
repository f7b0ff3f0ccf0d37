"""Schedule a step of which several calls are alive before the first is differentiated.

A siamese or contrastive loss, and a pipeline's micro-batches, run forward several times
before they run backward. All calls run by one schedule. Beside the call that runs, each of
the others holds what its backward pass will read: ``S`` bytes, which depend on the schedule.
So a schedule peaks at its own peak plus ``W(S)``, see :meth:`Calls.waiting_bytes`.

For a fixed ``S`` this is the problem that all methods here solve: ``W(S)`` bytes are resident,
and the loss has that much scratch that what a call holds while the loss runs is at most
``S``. So the search is a branch and bound over ``S``: a node is an interval ``[a, b]``, and its
relaxation has ``W(a)`` resident and at most ``b`` held. Its bound holds for every schedule
whose ``S`` lies in the interval.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from graph_capture.cost_graph import CostGraph

from .replay import replay
from .result import OPTIMAL_GAP, Ending, SolveResult, SolveStatus, relative_gap
from .schedule import Schedule
from .scopes import BoundScope

WAITING = "waiting"
"""Category of the storage that stands for what the other calls hold."""

SHARE_OF_A_SOLVE = 0.125
"""Of the time limit, for one node."""

FIRST_SHARES = (0.98, 0.92, 0.85)
"""Of the most that a call could hold: where schedules are searched first."""

SHARES_OF_SCRATCH = (0.25, 0.5, 0.7, 0.85)
"""Of a call's own least memory, for the loss, where the least of all calls is searched for."""

SEARCHES_FOR_LEAST = 1 + len(SHARES_OF_SCRATCH)

NARROWEST = 0.002
"""Intervals below this share of the most that a call could hold are not divided again."""


class Search(Protocol):
    """Solves a graph under a budget, as :func:`solvers.portfolio.solve` does."""

    def __call__(
        self, graph: CostGraph, budget_bytes: int, *, time_limit_s: float, hint: Schedule | None
    ) -> SolveResult:
        """Return a schedule and a bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """How many calls are alive at once, and what of one stays after its backward pass.

    Parameters
    ----------
    number
        Of calls, this one included; at least 2.
    gradient_bytes
        Of parameters, which all calls share and which are there after a first backward
        pass; 0 where each call's are counted in ``summed_bytes``.
    summed_bytes
        Of a set of gradients beside the earlier ones that they will be added to: where one
        backward pass goes through several calls, autograd sums theirs before it adds them.
    """

    number: int
    gradient_bytes: int = 0
    summed_bytes: int = 0

    def held_bytes(self, graph: CostGraph, schedule: Schedule) -> int:
        """What a call holds while the loss runs: ``S``, its inputs included."""
        outcome = replay(graph, schedule)
        turn = schedule.order.index(_loss_of(graph))
        own = outcome.memory_bytes[turn] - graph.operators[_loss_of(graph)].workspace_bytes
        return own - graph.resident_bytes + _input_bytes(graph)

    def waiting_bytes(self, graph: CostGraph, held_bytes: int) -> int:
        """``W(S)``: what calls beside the one that runs hold, at most.

        While the first backward pass runs, all others wait. Later ones have less waiting
        beside them, but a finished call leaves its outputs and inputs, and the parameters
        have gradients.
        """
        others = self.number - 1
        left = _left_bytes(graph) - self.gradient_bytes
        return self.summed_bytes + max(
            (others - done) * held_bytes + done * left + min(done, 1) * self.gradient_bytes
            for done in {0, 1, others}
        )

    def most_held_bytes(self, graph: CostGraph, waiting_bytes: int) -> int:
        """The largest ``S`` with a ``W(S)`` of at most these bytes; negative if there is none."""
        if self.waiting_bytes(graph, 0) > waiting_bytes:
            return -1
        low, high = 0, waiting_bytes
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.waiting_bytes(graph, middle) <= waiting_bytes
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def beside(graph: CostGraph, waiting_bytes: int) -> CostGraph:
    """Return the graph with these bytes held by the other calls."""
    place = next(k for k, s in enumerate(graph.storages) if s.category == WAITING)
    storages = list(graph.storages)
    storages[place] = replace(storages[place], size_bytes=waiting_bytes)
    return CostGraph(graph.operators, tuple(storages))


def limited(graph: CostGraph, budget_bytes: int, most_held_bytes: int) -> CostGraph:
    """Return the graph with so much scratch for the loss that a schedule within the budget
    holds at most these bytes of a call."""
    turn = _loss_of(graph)
    loss = graph.operators[turn]
    room = budget_bytes - graph.resident_bytes - (most_held_bytes - _input_bytes(graph))
    operators = list(graph.operators)
    operators[turn] = replace(loss, workspace_bytes=max(loss.workspace_bytes, room))
    return CostGraph(tuple(operators), graph.storages)


def solve_calls(
    graph: CostGraph,
    budget_bytes: int,
    calls: Calls,
    search: Search,
    *,
    time_limit_s: float,
    gap: float = 0.0,
    known: Schedule | None = None,
) -> SolveResult:
    """Find the fastest schedule by which all calls together stay within the budget.

    Parameters
    ----------
    graph
        Of one call, with a storage of the category :data:`WAITING`.
    search
        Solves the nodes.
    time_limit_s
        Of all nodes together.
    gap
        At which to stop, as a fraction of the step's time.
    known
        A schedule that may fit.

    Returns
    -------
    SolveResult
        Its peak is that of all calls, its cost that of one. The bound holds for every
        schedule that all calls run by.
    """
    tree = _Tree(graph, budget_bytes, calls, search, time_limit_s, max(gap, OPTIMAL_GAP))
    for schedule, name in ((Schedule.keep_all(graph), "keep_all"), (known, "hint")):
        if schedule is not None:
            tree.offer(schedule, name)
    return tree.run()


@dataclass(order=True, frozen=True)
class _Node:
    """An interval of ``S`` in bytes, and a bound on the time of the schedules within it."""

    bound_ns: int
    place: int
    least: int = field(compare=False)
    most: int = field(compare=False)


@dataclass
class _Tree:
    graph: CostGraph
    budget_bytes: int
    calls: Calls
    search: Search
    time_limit_s: float
    gap: float
    best: tuple[int, int, Schedule, str] | None = None  # nanoseconds, peak, schedule, method
    began_s: float = field(default_factory=time.monotonic)
    log: list[str] = field(default_factory=list)

    def offer(self, schedule: Schedule, name: str) -> None:
        """Take a schedule over if it fits and is faster than the best one."""
        held_bytes = self.calls.held_bytes(self.graph, schedule)
        waiting_bytes = self.calls.waiting_bytes(self.graph, held_bytes)
        outcome = replay(beside(self.graph, waiting_bytes), schedule)
        if outcome.peak_bytes <= self.budget_bytes and (
            self.best is None or outcome.cost_ns < self.best[0]
        ):
            self.best = outcome.cost_ns, outcome.peak_bytes, schedule, name
            self.log.append(
                f"{self.elapsed_s:.1f} s: {name} takes {outcome.cost_ns} ns, and a waiting call "
                f"holds {held_bytes} bytes"
            )

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began_s

    def run(self) -> SolveResult:
        least = _floor_bytes(self.graph)
        most = self._most_bytes()
        root = _Node(self.graph.base_cost_ns, 0, least, most)
        if most < least:
            return self._result([], exhausted=True)
        nodes, numbers = [root], itertools.count(1)
        if not self._closed(root):
            for share in FIRST_SHARES:
                self._fit(least + int(share * (most - least)))
        ending: Ending | None = None
        closed: list[int] = []  # bounds of intervals that are not divided again
        while nodes and not self._closed(nodes[0]):
            if self.elapsed_s >= self.time_limit_s:
                ending = Ending.TIME_LIMIT
                break
            node = heapq.heappop(nodes)
            relaxed = self._solve(
                limited(self._beside(node.least), self.budget_bytes, node.most), self._known()
            )
            if relaxed.status is SolveStatus.INFEASIBLE:
                continue
            bound_ns = max(node.bound_ns, relaxed.global_bound_ns)
            middle = (node.least + node.most) // 2
            if relaxed.schedule is not None:
                self.offer(relaxed.schedule, relaxed.solver)
                held_bytes = self.calls.held_bytes(self.graph, relaxed.schedule)
                margin = (node.most - node.least) // 8
                middle = min(max(held_bytes, node.least + margin), node.most - max(margin, 1))
            if node.most - node.least <= NARROWEST * most:
                self._fit(node.most)
                closed.append(bound_ns)
                continue
            self._fit(middle)
            for low, high in ((node.least, middle), (middle + 1, node.most)):
                heapq.heappush(nodes, _Node(bound_ns, next(numbers), low, high))
        open_ns = [*closed, *(node.bound_ns for node in nodes)]
        return self._result(open_ns, exhausted=not nodes, ending=ending)

    def _closed(self, node: _Node) -> bool:
        """Whether no schedule of an interval is better than the best one by more than the gap."""
        return self.best is not None and relative_gap(self.best[0], node.bound_ns) <= self.gap

    def _most_bytes(self) -> int:
        """What one of the calls can hold at most, with all of them in the budget."""
        room = self.budget_bytes - beside(self.graph, 0).resident_bytes
        within = (room + _input_bytes(self.graph)) // self.calls.number
        everything = self.calls.held_bytes(self.graph, Schedule.keep_all(self.graph))
        return min(within, everything)

    def _beside(self, held_bytes: int) -> CostGraph:
        return beside(self.graph, self.calls.waiting_bytes(self.graph, held_bytes))

    def _known(self) -> Schedule | None:
        return None if self.best is None else self.best[2]

    def _fit(self, held_bytes: int) -> None:
        """Search among the schedules of which a call holds at most this, all of which fit."""
        found = self._solve(
            limited(self._beside(held_bytes), self.budget_bytes, held_bytes), self._known()
        )
        if found.schedule is not None:
            self.offer(found.schedule, found.solver)

    def _solve(self, graph: CostGraph, known: Schedule | None) -> SolveResult:
        left_s = max(self.time_limit_s - self.elapsed_s, 0.5)
        limit_s = min(left_s, max(SHARE_OF_A_SOLVE * self.time_limit_s, 0.5))
        return self.search(graph, self.budget_bytes, time_limit_s=limit_s, hint=known)

    def _result(
        self, open_ns: list[int], *, exhausted: bool, ending: Ending | None = None
    ) -> SolveResult:
        bounds = open_ns if self.best is None else [*open_ns, self.best[0]]
        bound_ns = min(bounds, default=self.graph.base_cost_ns)
        if self.best is None:
            status = SolveStatus.INFEASIBLE if exhausted and not open_ns else SolveStatus.UNKNOWN
            solved = status is SolveStatus.INFEASIBLE
        else:
            gap = relative_gap(self.best[0], bound_ns)
            solved = gap <= OPTIMAL_GAP
            status = SolveStatus.OPTIMAL if solved else SolveStatus.FEASIBLE
        otherwise = ending or (Ending.EXHAUSTED if exhausted else Ending.GAP)
        return SolveResult(
            status=status,
            ending=Ending.SOLVED if solved else otherwise,
            schedule=None if self.best is None else self.best[2],
            cost_ns=None if self.best is None else self.best[0],
            lower_bound_ns=bound_ns,
            bound_scope=BoundScope.BASE_ORDER,
            global_bound_ns=bound_ns,
            staged_infeasible=False,
            peak_bytes=None if self.best is None else self.best[1],
            solver="none" if self.best is None else self.best[3],
            solve_s=self.elapsed_s,
            log=tuple(self.log),
        )


def least_for_calls(
    graph: CostGraph,
    calls: Calls,
    least: Callable[[CostGraph], Schedule],
) -> Schedule:
    """Search for the schedule by which all calls together take the least memory.

    What a call holds counts ``number - 1`` times more than its peak does. Both are lowered
    together by giving the loss scratch: the least peak of that graph is tried for several
    amounts of it.

    Parameters
    ----------
    least
        Returns the schedule of a graph's least peak.
    """
    alone = beside(graph, 0)
    found = [least(alone)]
    room = replay(alone, found[0]).peak_bytes - alone.resident_bytes
    turn = _loss_of(alone)
    for share in SHARES_OF_SCRATCH:
        operators = list(alone.operators)
        scratch = max(int(share * room), operators[turn].workspace_bytes)
        operators[turn] = replace(operators[turn], workspace_bytes=scratch)
        found.append(least(CostGraph(tuple(operators), alone.storages)))
    return min(found, key=lambda schedule: peak_of_calls(graph, calls, schedule))


def peak_of_calls(graph: CostGraph, calls: Calls, schedule: Schedule) -> int:
    """Peak of all calls together, each by this schedule, in bytes."""
    held_bytes = calls.held_bytes(graph, schedule)
    return replay(beside(graph, calls.waiting_bytes(graph, held_bytes)), schedule).peak_bytes


def _loss_of(graph: CostGraph) -> int:
    return next(v for v, op in enumerate(graph.operators) if op.phase == "loss")


def _input_bytes(graph: CostGraph) -> int:
    return sum(s.size_bytes for s in graph.storages if s.category == "input" and s.producer is None)


def _left_bytes(graph: CostGraph) -> int:
    """What a call leaves after its backward pass: inputs, outputs and gradients."""
    return _input_bytes(graph) + sum(s.size_bytes for s in graph.storages if s.kept)


def _floor_bytes(graph: CostGraph) -> int:
    """What every call holds while the loss runs: its inputs, and outputs that stay."""
    made = {v for v, op in enumerate(graph.operators) if op.phase in ("forward", "loss")}
    return _input_bytes(graph) + sum(
        s.size_bytes for s in graph.storages if s.kept and s.producer in made
    )


__all__ = [
    "WAITING",
    "Calls",
    "beside",
    "least_for_calls",
    "limited",
    "peak_of_calls",
    "solve_calls",
]
