"""Strategies that are asked once for all budgets."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from graph_capture.cost_graph import CostGraph, Operator, Storage
from planner.comparing.cached_strategy import CachedStrategy
from solvers.schedule import Schedule
from solvers.strategies import Candidate, Strategy, StrategyOptions, apply_strategy

GRAPH = CostGraph(
    (Operator(name="a", outputs=(0,), cost_ns=5),),
    (Storage(name="x", size_bytes=9, producer=0),),
)


class Slow:
    """Two candidates, each after a moment; raises in the place of the second if asked to."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.num_asked = 0

    def propose(self, graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
        """Counts how often it is asked for candidates."""
        self.num_asked += 1
        time.sleep(0.05)
        yield Candidate(schedule=Schedule.keep_all(graph), setting="first")
        if self.fails:
            raise RuntimeError("the second one")
        time.sleep(0.05)
        yield Candidate(schedule=Schedule.keep_all(graph), setting="second")

    def cached(self) -> CachedStrategy:
        """Itself, asked once."""
        return CachedStrategy(Strategy(name="slow", summary="", source="", propose=self.propose))


def test_it_is_asked_once() -> None:
    """At the second budget nothing is proposed again, and the time counts as if it was."""
    slow = Slow()
    cached = slow.cached()
    for budget_bytes, least_s in ((None, 0.05), (9, 0.1), (8, 0.1), (None, 0.05)):
        outcome = cached.with_full_time(
            apply_strategy(cached.strategy, GRAPH, budget_bytes=budget_bytes)
        )
        assert outcome.setting == "first"
        assert outcome.num_candidates == (1 if budget_bytes is None else 2)
        assert outcome.solve_s >= least_s
    assert slow.num_asked == 1


def test_an_error_is_raised_each_time() -> None:
    """What failed is asked again: memory hides no error."""
    slow = Slow(fails=True)
    cached = slow.cached()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the second one"):
            apply_strategy(cached.strategy, GRAPH, budget_bytes=9)
    assert slow.num_asked == 2
