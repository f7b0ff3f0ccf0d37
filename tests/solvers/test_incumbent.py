from __future__ import annotations

import pytest

from solvers.incumbent import Incumbent
from solvers.result import SolveStatus
from solvers.schedule import Schedule

from .graphs import training_chain


def test_refuses_what_is_invalid_or_too_big() -> None:
    """A schedule that misses an operator, or that exceeds the budget, is not taken."""
    graph = training_chain(3)
    state = Incumbent(graph, 50, 1.0)
    assert not state.offer(Schedule((0, 1)), "test")
    assert state.offer(Schedule.keep_all(graph), "test")
    assert not Incumbent(graph, 30, 1.0).offer(Schedule.keep_all(graph), "test")


def test_contradictions_are_loud() -> None:
    """A bound above a schedule, or a schedule in an excluded budget, raises."""
    graph = training_chain(3)
    state = Incumbent(graph, 1000, 1.0)
    state.offer(Schedule.keep_all(graph), "test")
    with pytest.raises(RuntimeError, match="above a schedule"):
        state.raise_bound(graph.base_cost_ns + 1, "test")
    with pytest.raises(RuntimeError, match="excludes a budget"):
        state.exclude("test", "because")


def test_a_gap_that_suffices_ends_the_solve_and_proves_nothing() -> None:
    """Within the gap that was asked for nothing is left to do, and the status stays feasible."""
    graph = training_chain(4)
    state = Incumbent(graph, 1000, 1.0, enough_gap=0.5)
    state.offer(Schedule.keep_all(graph), "test")
    assert state.cost_ns is not None
    state.cost_ns = round(1.3 * graph.base_cost_ns)
    assert state.done
    assert not state.solved
    assert state.result().status is SolveStatus.FEASIBLE
    assert not state.suffices(graph.base_cost_ns // 2)
