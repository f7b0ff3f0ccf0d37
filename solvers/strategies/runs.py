"""Record the runs of a strategy's schedule, and what is in memory meanwhile.

The schedule itself knows no frees (``solvers/schedule.py``): a version dies at its
last use. What a strategy *drops* is therefore no more than what it will not read
without running its producer again, and :class:`Runs` keeps that account.
"""

from __future__ import annotations

from collections.abc import Iterable

from graph_capture.cost_graph import CostGraph

from ..schedule import Schedule
from .strategy import StrategyError

LONGEST = 200
"""Runs an operator, on average, beyond which a schedule is of no use to anybody."""


class Runs:
    """A schedule under construction.

    Parameters
    ----------
    graph
        Resident storages are always there and appear nowhere here.

    Attributes
    ----------
    order
        The runs so far.
    at_hand
        Storages that may be read.
    fixed
        Storages that are never dropped: kept ones, and outputs of pinned
        operators, which run only once.
    """

    def __init__(self, graph: CostGraph) -> None:
        self.graph = graph
        self.order: list[int] = []
        self.at_hand: set[int] = set()
        self.inputs: list[tuple[int, ...]] = [
            tuple(sorted({k for k in op.inputs if graph.storages[k].producer is not None}))
            for op in graph.operators
        ]
        self.fixed = frozenset(
            k
            for k, s in enumerate(graph.storages)
            if s.producer is not None and (s.kept or graph.operators[s.producer].pinned is not None)
        )

    def producer(self, k: int) -> int:
        """The operator that makes storage ``k``, which is not resident."""
        v = self.graph.storages[k].producer
        assert v is not None
        return v

    def run(self, v: int) -> None:
        """Record one run of ``v``, whose inputs are available."""
        if len(self.order) >= LONGEST * self.graph.num_operators:
            raise StrategyError(
                f"the schedule takes more than {LONGEST} runs an operator: too few are saved"
            )
        self.order.append(v)
        self.at_hand.update(self.graph.operators[v].outputs)

    def missing(self, v: int) -> list[int]:
        """Return what ``v`` reads and is not available."""
        return [k for k in self.inputs[v] if k not in self.at_hand]

    def keep_only(self, storages: Iterable[int]) -> None:
        """Drop everything but ``storages`` and what is fixed."""
        self.at_hand &= self.fixed | set(storages)

    def needed(self, wanted: Iterable[int]) -> list[int]:
        """Return the operators that must run again to make ``wanted`` available, in base order."""
        chosen: set[int] = set()
        stack = [k for k in wanted if k not in self.at_hand]
        while stack:
            v = self.producer(stack.pop())
            if v not in chosen:
                chosen.add(v)
                stack.extend(self.missing(v))
        return sorted(chosen)

    def recompute(self, wanted: Iterable[int]) -> None:
        """Rerun what ``wanted`` needs, in base order."""
        for v in self.needed(wanted):
            self.run(v)

    def schedule(self) -> Schedule:
        """Return the recorded schedule."""
        return Schedule(tuple(self.order))


def last_uses(graph: CostGraph) -> list[int]:
    """The last base position at which each storage is made or read; -1 for never."""
    last = [-1 if s.producer is None else s.producer for s in graph.storages]
    for v, op in enumerate(graph.operators):
        for k in op.inputs:
            last[k] = v
    return last
