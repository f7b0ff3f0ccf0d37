"""The exact reference: shortest paths over all that memory can hold. For some ten operators.

A state is the next base operator and the set of storages in memory; a step is
one run, of the next base operator or of an earlier one that is not pinned.
Every schedule whose first runs keep the base order is a path from nothing to
the end, and every path is such a schedule. What the rules of
``solvers/replay.py`` mean for a path:

- A version dies right after its last use. A use, or the production where
  nobody reads it, is a run that touches it, so after each run any part of what
  it touched may go, and nothing else ever does.
- A use reads the latest version. When a storage is made again its old version
  has had its last use, so there are never two, and a set suffices. Where a
  path still holds the old one, there is a path as cheap that let go of it.
- A kept storage stays from its first version on. Another run of its producer
  makes a duplicate, which is there during that run only.
- What a run writes over is not there beside the output unless it stays after the run;
  if it stays it is copied, which takes time. (Where nothing is saved for a second
  backward pass: for graphs without a loss.)
- During a run there are the resident storages, what is in memory before, all
  that the run allocates, read or not, and its workspace. What is in memory
  before and neither used by the run nor later is the first point's to drop.

Written to be believed: nothing of the code under test is used.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

from graph_capture.cost_graph import CostGraph


def least_cost(graph: CostGraph, budget_bytes: int, *, checkmate_class: bool = False) -> int | None:
    """Least cost of all schedules within the budget; ``None`` when nothing fits.

    The schedules are those whose first runs keep the base order, with any
    recomputations in any order and number between.

    Parameters
    ----------
    checkmate_class
        Count only schedules that, between two first runs, run each operator at
        most once and in base order: those that Checkmate's formulation (Jain
        et al., arXiv:1910.02653, Section 4) can express.
    """
    return _cheapest(graph, budget_bytes, checkmate_class=checkmate_class)[0]


def cheapest_order(
    graph: CostGraph, budget_bytes: int, *, checkmate_class: bool = False
) -> tuple[int, ...] | None:
    """A schedule of :func:`least_cost`, as the order of its runs."""
    return _cheapest(graph, budget_bytes, checkmate_class=checkmate_class)[1]


@lru_cache(maxsize=8)
def _cheapest(
    graph: CostGraph, budget_bytes: int, *, checkmate_class: bool
) -> tuple[int, tuple[int, ...]] | tuple[None, None]:
    """Cost and order of the cheapest schedule. Dijkstra's algorithm."""
    if graph.resident_bytes > budget_bytes:
        return None, None
    steps = _Steps(graph, checkmate_class)
    start = _State(front=0, alive=frozenset(), floor=-1)
    cost_to = {start: 0}
    came_from: dict[_State, tuple[_State, int]] = {}
    queue = [(0, 0, start)]
    pushed = 0  # breaks ties, so that states need no order
    while queue:
        cost, _, state = heapq.heappop(queue)
        if cost > cost_to[state]:
            continue
        if state.front == graph.num_operators:
            return cost, _walk_back(came_from, state)
        for v, memory_bytes, successors in steps.of(state):
            for successor in successors:
                copies = steps.copies(v, successor)
                if memory_bytes + steps.size(copies) > budget_bytes:
                    continue
                new_cost = cost + graph.operators[v].cost_ns + sum(copies.values())
                if successor not in cost_to or new_cost < cost_to[successor]:
                    cost_to[successor] = new_cost
                    came_from[successor] = (state, v)
                    pushed += 1
                    heapq.heappush(queue, (new_cost, pushed, successor))
    return None, None


@lru_cache(maxsize=8)
def least_memory_exact(graph: CostGraph) -> int:
    """The smallest budget that any schedule fits in.

    The same paths, each as long as its highest moment: Dijkstra's algorithm
    with the maximum in the place of the sum.
    """
    steps = _Steps(graph, checkmate_class=False)
    start = _State(front=0, alive=frozenset(), floor=-1)
    peak_to = {start: graph.resident_bytes}
    queue = [(graph.resident_bytes, 0, start)]
    pushed = 0
    while queue:
        peak, _, state = heapq.heappop(queue)
        if peak > peak_to[state]:
            continue
        if state.front == graph.num_operators:
            return peak
        for v, memory_bytes, successors in steps.of(state):
            for successor in successors:
                new_peak = max(peak, memory_bytes + steps.size(steps.copies(v, successor)))
                if successor not in peak_to or new_peak < peak_to[successor]:
                    peak_to[successor] = new_peak
                    pushed += 1
                    heapq.heappush(queue, (new_peak, pushed, successor))
    raise AssertionError("with enough memory the base order always ends")


@dataclass(frozen=True, slots=True)
class _State:
    """Between two runs: ``front`` runs first next, ``alive`` is in memory.

    ``floor``: in the Checkmate class, the last operator recomputed since the
    last first run (-1: none), else always -1.
    """

    front: int
    alive: frozenset[int]
    floor: int


class _Steps:
    """The runs that are possible in a state, and the states after them."""

    def __init__(self, graph: CostGraph, checkmate_class: bool) -> None:
        self.graph = graph
        self.checkmate_class = checkmate_class
        self.reads = [
            frozenset(k for k in op.inputs if graph.storages[k].producer is not None)
            for op in graph.operators
        ]
        self.of_use = [self._of_use(front) for front in range(graph.num_operators + 1)]

    def of(self, state: _State) -> Iterator[tuple[int, int, Iterator[_State]]]:
        """``(operator, memory while it runs, states after it)`` of every possible run.

        The memory is without the copies of what it would write over.
        """
        graph = self.graph
        for v in range(state.floor + 1, state.front + 1):
            op = graph.operators[v]
            again = v < state.front
            if not self.reads[v] <= state.alive or (again and op.pinned is not None):
                continue
            there = state.alive.union(op.outputs)
            duplicates = [k for k in op.outputs if again and graph.storages[k].kept]
            memory_bytes = (
                graph.resident_bytes
                + self.size(there)
                + self.size(duplicates)
                + op.workspace_bytes
                - self.size([old for old, _, _ in op.rewrites])
            )
            yield v, memory_bytes, self._after(state, v, there)

    def copies(self, v: int, after: _State) -> dict[int, int]:
        """What ``v`` may not write over, because it stays, and the time of its copy."""
        return {
            old: copy_ns
            for old, _, copy_ns in self.graph.operators[v].rewrites
            if old in after.alive
        }

    def _after(self, state: _State, v: int, there: frozenset[int]) -> Iterator[_State]:
        """Each way to let go of some of what ``v`` touched; what is of no more use goes always."""
        again = v < state.front
        front = state.front + (not again)
        floor = v if again and self.checkmate_class else -1
        storages = self.graph.storages
        touched = self.reads[v].union(self.graph.operators[v].outputs)
        free_to_go = [k for k in touched if not storages[k].kept]
        stay = there.difference(k for k in free_to_go if k not in self.of_use[front])
        over = {old for old, _, _ in self.graph.operators[v].rewrites}
        open_ks = [k for k in free_to_go if k in stay and (storages[k].size_bytes > 0 or k in over)]
        for count in range(len(open_ks) + 1):
            for dropped in combinations(open_ks, count):
                yield _State(front, stay.difference(dropped), floor)

    def _of_use(self, front: int) -> frozenset[int]:
        """What can be read when ``front`` runs first next, or once more what is made from it."""
        of_use: set[int] = set()
        for v in reversed(range(self.graph.num_operators)):
            op = self.graph.operators[v]
            if v >= front or (op.pinned is None and not of_use.isdisjoint(op.outputs)):
                of_use |= self.reads[v]
        return frozenset(of_use)

    def size(self, storages: Iterable[int]) -> int:
        return sum(self.graph.storages[k].size_bytes for k in storages)


def _walk_back(came_from: dict[_State, tuple[_State, int]], state: _State) -> tuple[int, ...]:
    order: list[int] = []
    while state in came_from:
        state, v = came_from[state]
        order.append(v)
    return tuple(reversed(order))
