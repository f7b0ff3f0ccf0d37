"""Schedules carried over to other sizes and to steps with a few other operators."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph, Operator
from solvers.instances import keep_all_peak_bytes
from solvers.portfolio import solve
from solvers.replay import replay
from solvers.schedule import Schedule
from solvers.transfer import has_same_wiring, transfer

from .graphs import cost_graphs, overwriting_graphs, training_chain


def at_sizes(graph: CostGraph, factor: float) -> CostGraph:
    """The same operators on tensors of another size."""
    storages = tuple(replace(s, size_bytes=int(s.size_bytes * factor)) for s in graph.storages)
    return CostGraph(graph.operators, storages)


def solved(graph: CostGraph, budget_bytes: int) -> Schedule | None:
    return solve(graph, budget_bytes, time_limit_s=2.0).schedule


CHAIN = at_sizes(training_chain(12), 1000)
TIGHT = keep_all_peak_bytes(CHAIN) // 2


def test_what_fits_repeats_nothing() -> None:
    """At a small size the whole step fits, and nothing is recomputed."""
    schedule = solved(CHAIN, TIGHT)
    assert schedule is not None
    small = at_sizes(CHAIN, 0.4)
    assert transfer(CHAIN, schedule, small, TIGHT) == Schedule.keep_all(small)


@pytest.mark.parametrize("factor", [0.95, 0.8, 0.6])
def test_a_smaller_size_recomputes_less(factor: float) -> None:
    """What the budget has room for again is retained again."""
    schedule = solved(CHAIN, TIGHT)
    assert schedule is not None
    smaller = at_sizes(CHAIN, factor)
    found = transfer(CHAIN, schedule, smaller, TIGHT)
    assert found is not None
    outcome, carried = replay(smaller, found), replay(smaller, schedule)
    assert outcome.peak_bytes <= TIGHT
    assert outcome.cost_ns <= carried.cost_ns
    if factor < 0.9:
        assert outcome.cost_ns < carried.cost_ns


def test_a_larger_size_is_not_forced() -> None:
    """A schedule that peaks above the budget is not returned."""
    schedule = solved(CHAIN, TIGHT)
    assert schedule is not None
    assert transfer(CHAIN, schedule, at_sizes(CHAIN, 4), TIGHT) is None


@settings(max_examples=150, deadline=None)
@given(graph=st.one_of(cost_graphs(max_operators=9), overwriting_graphs()), data=st.data())
def test_every_transfer_is_valid_and_fits(graph: CostGraph, data: st.DataObject) -> None:
    """Whatever the sizes, the result computes the step within the budget."""
    budget_bytes = data.draw(st.integers(0, keep_all_peak_bytes(graph)))
    schedule = solve(graph, budget_bytes, solver="uniform").schedule or Schedule.keep_all(graph)
    other = at_sizes(graph, data.draw(st.sampled_from([0.5, 1.0, 2.0])))
    assert has_same_wiring(graph, other)
    found = transfer(graph, schedule, other, budget_bytes)
    if found is None:
        assert replay(other, schedule).peak_bytes > budget_bytes
        return
    outcome = replay(other, found)
    assert outcome.peak_bytes <= budget_bytes
    if replay(other, schedule).peak_bytes <= budget_bytes:
        assert outcome.cost_ns <= replay(other, schedule).cost_ns


def with_one_more(graph: CostGraph, at: int) -> CostGraph:
    """The same step with an operator without results before operator ``at``."""
    extra = Operator(name="extra", target="test.check", phase=graph.operators[at].phase)
    operators = (*graph.operators[:at], extra, *graph.operators[at:])
    storages = tuple(
        s if s.producer is None or s.producer < at else replace(s, producer=s.producer + 1)
        for s in graph.storages
    )
    return CostGraph(operators, storages)


@pytest.mark.parametrize("at", [0, 5, 17])
def test_another_operator_more_is_no_obstacle(at: int) -> None:
    """Steps are aligned by their operators, and the rest of the schedule carries over."""
    schedule = solved(CHAIN, TIGHT)
    assert schedule is not None
    other = with_one_more(CHAIN, at)
    assert not has_same_wiring(CHAIN, other)
    found = transfer(CHAIN, schedule, other, TIGHT)
    assert found is not None
    outcome = replay(other, found)
    assert outcome.peak_bytes <= TIGHT
    assert outcome.cost_ns <= 1.2 * replay(CHAIN, schedule).cost_ns


@settings(max_examples=100, deadline=None)
@given(one=cost_graphs(max_operators=8), other=cost_graphs(max_operators=8), data=st.data())
def test_steps_without_likeness_give_nothing_wrong(
    one: CostGraph, other: CostGraph, data: st.DataObject
) -> None:
    """Between two arbitrary steps the result is still a schedule that fits, or none."""
    budget_bytes = data.draw(st.integers(0, keep_all_peak_bytes(other)))
    found = transfer(one, Schedule.keep_all(one), other, budget_bytes)
    if found is not None:
        assert replay(other, found).peak_bytes <= budget_bytes
