from __future__ import annotations

from itertools import pairwise

import pytest

from solvers.portfolio import solve
from solvers.replay import replay
from solvers.result import SolveStatus
from solvers.slices.slicing import Slicing
from solvers.slices.trace import trace_slice_refinement

from .graphs import exhaustive_optimum, training_chain

BUDGET_BYTES = 34


def test_rounds_tell_how_the_optimum_is_proven():
    """Bounds rise to the optimum, and the last relaxation's schedule is one that fits."""
    graph = training_chain(6)
    optimum = exhaustive_optimum(graph, BUDGET_BYTES)
    peak = Slicing(frozenset({6}))
    result, rounds = trace_slice_refinement(graph, BUDGET_BYTES, time_limit_s=20, slicing=peak)
    assert result.status is SolveStatus.OPTIMAL
    assert result.cost_ns == optimum
    assert optimum is not None
    assert rounds[0].slicing == peak
    assert len(rounds) > 1
    bounds = [r.best_bound_ns for r in rounds]
    assert bounds == sorted(bounds)
    assert all(r.bound_ns <= optimum for r in rounds)
    assert rounds[-1].peak_bytes <= BUDGET_BYTES
    assert rounds[-1].cost_ns == optimum
    assert rounds[-1].incumbent_ns == optimum


def test_each_round_goes_on_where_the_one_before_exceeds_the_budget():
    """The next round's slices are those that were refined, as long as something exceeds."""
    graph = training_chain(6)
    _, rounds = trace_slice_refinement(
        graph, BUDGET_BYTES, time_limit_s=20, slicing=Slicing(frozenset({6}))
    )
    for before, after in pairwise(rounds):
        assert before.refined == after.slicing
        assert set(before.new_slices) == after.slicing.slices - before.slicing.slices
        if before.peak_bytes > BUDGET_BYTES:
            assert before.refined != before.slicing
    for r in rounds:
        outcome = replay(graph, r.schedule)
        assert (r.cost_ns, r.peak_bytes) == (outcome.cost_ns, outcome.peak_bytes)


def test_being_watched_changes_nothing():
    """The result is that of the solver by name."""
    graph = training_chain(6)
    watched, _ = trace_slice_refinement(graph, BUDGET_BYTES, time_limit_s=20)
    alone = solve(graph, BUDGET_BYTES, solver="slice_refinement", time_limit_s=20)
    assert watched.schedule == alone.schedule
    assert watched.lower_bound_ns == alone.lower_bound_ns


def test_a_budget_below_every_schedule_has_no_rounds():
    """Nothing fits: the first relaxation has no solution, and the result says so."""
    result, rounds = trace_slice_refinement(training_chain(6), 1, time_limit_s=5)
    assert result.status is SolveStatus.INFEASIBLE
    assert rounds == ()


def test_a_negative_budget_is_refused():
    """As by ``solve``."""
    with pytest.raises(ValueError, match="not negative, got -1"):
        trace_slice_refinement(training_chain(2), -1)
