"""Runs that write over what they read: in place, unless its value is read again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph, Operator, Storage
from solvers.any_order.memory import least_memory_in_any_order, needs_in_any_order
from solvers.any_order.order_free_bound import order_free_bound
from solvers.arrays import graph_arrays
from solvers.backward_search import least_memory_bound
from solvers.fast_replay import fast_replay
from solvers.gap_cover import gap_cover
from solvers.instances import keep_all_peak_bytes
from solvers.least_memory import least_memory
from solvers.portfolio import SOLVERS, solve
from solvers.replay import InvalidScheduleError, replay
from solvers.result import SolveStatus
from solvers.schedule import Schedule
from solvers.slices.model import build_slice_model
from solvers.slices.schedule import solution_of
from solvers.slices.slicing import Slicing

from .graphs import exhaustive_optimum, least_memory_exact, overwriting_graphs
from .test_order_free_bound import best_of_all_orders
from .test_slice_schedule import draw_schedule, satisfies


def add_in_place(*, phases: bool = False) -> CostGraph:
    """``h = a()``, ``y = b(h)``, ``h += y`` (a copy takes 3), and ``d`` reads ``y`` and the sum.

    With ``phases`` the write and ``d`` come after the loss.
    """
    storages = tuple(
        Storage(name=name, size_bytes=size, producer=v)
        for v, (name, size) in enumerate([("h", 10), ("y", 4), ("sum", 10), ("end", 1)])
    )
    operators = [
        Operator(name="a", outputs=(0,), cost_ns=20),
        Operator(name="b", inputs=(0,), outputs=(1,), cost_ns=5),
        Operator(name="add_", inputs=(0, 1), outputs=(2,), cost_ns=2, rewrites=((0, 2, 3),)),
        Operator(name="d", inputs=(1, 2), outputs=(3,), cost_ns=7),
    ]
    if phases:
        operators[1] = replace(operators[1], phase="loss")
        operators[2] = replace(operators[2], phase="backward")
        operators[3] = replace(operators[3], phase="backward")
    return CostGraph(tuple(operators), storages)


def test_nothing_repeated_is_in_place() -> None:
    """The sum has the memory of ``h``, and no copy is paid for."""
    graph = add_in_place()
    outcome = replay(graph, Schedule.keep_all(graph))
    assert outcome.memory_bytes == (10, 14, 14, 15)
    assert outcome.cost_ns == graph.base_cost_ns == 34
    assert outcome.in_place == {(2, 0, 2)}
    assert outcome.live_at(2) == (1, 2)


def test_what_is_read_again_is_copied() -> None:
    """``b`` runs once more from ``h``, which therefore stays beside the sum."""
    outcome = replay(add_in_place(), Schedule((0, 1, 2, 1, 3)))
    assert outcome.memory_bytes == (10, 14, 24, 24, 15)
    assert outcome.cost_ns == 34 + 5 + 3
    assert outcome.in_place == frozenset()


def test_what_is_made_again_is_written_over_again() -> None:
    """``a`` runs again before ``b``: neither write needs a copy."""
    outcome = replay(add_in_place(), Schedule((0, 1, 2, 0, 1, 2, 3)))
    assert outcome.cost_ns == 34 + 20 + 5 + 2
    assert outcome.in_place == {(2, 0, 2), (5, 0, 2)}


def test_backward_does_not_write_over_what_forward_saved() -> None:
    """The backward pass may come a second time and finds the saved value then."""
    graph = add_in_place(phases=True)
    outcome = replay(graph, Schedule.keep_all(graph))
    assert outcome.in_place == frozenset()
    assert outcome.cost_ns == graph.base_cost_ns + 3
    again = replay(graph, Schedule((0, 1, 0, 2, 3)))
    assert again.in_place == {(3, 0, 2)}


def test_the_peak_of_writing_in_place_fits() -> None:
    """At 15 bytes, which a copy would exceed, nothing is repeated and that is optimal."""
    graph = add_in_place()
    result = solve(graph, 15)
    assert result.status is SolveStatus.OPTIMAL
    assert result.schedule == Schedule.keep_all(graph)
    assert result.cost_ns == result.lower_bound_ns == 34


@pytest.mark.parametrize(
    "rewrites",
    [((1, 2, 0),), ((0, 3, 0),), ((0, 2, -1),), ((0, 2, 0), (0, 2, 0))],
)
def test_what_cannot_be_written_over_is_refused(rewrites: tuple) -> None:
    """Another size, an output of another operator, a negative time, twice the same."""
    graph = add_in_place()
    operators = list(graph.operators)
    operators[2] = replace(operators[2], rewrites=rewrites)
    with pytest.raises(ValueError, match="add_"):
        CostGraph(tuple(operators), graph.storages)


def test_a_graph_comes_back_from_json() -> None:
    """With what is written over; graphs without are written as they always were."""
    graph = add_in_place()
    assert CostGraph.from_json(graph.to_json()) == graph
    assert graph.to_json().count("rewrites") == 1


@st.composite
def steps(draw: st.DrawFn) -> CostGraph:
    """A graph with a loss somewhere."""
    graph = draw(overwriting_graphs())
    v = draw(st.integers(0, graph.num_operators - 1))
    operators = list(graph.operators)
    operators[v] = replace(operators[v], phase="loss")
    return CostGraph(tuple(operators), graph.storages)


@settings(max_examples=400, deadline=None)
@given(graph=st.one_of(overwriting_graphs(), steps()), data=st.data())
def test_the_compiled_replay_agrees(graph: CostGraph, data: st.DataObject) -> None:
    """On the base order with earlier operators run again in between, moment by moment."""
    order: list[int] = []
    for v in range(graph.num_operators):
        order.extend(data.draw(st.lists(st.integers(0, v), max_size=3)) if v else [])
        order.append(v)
    fast = fast_replay(graph_arrays(graph), np.array(order, dtype=np.int64))
    try:
        slow = replay(graph, Schedule(tuple(order)))
    except InvalidScheduleError:
        assert not fast.valid
        return
    assert (fast.peak_bytes, fast.cost_ns) == (slow.peak_bytes, slow.cost_ns)
    assert tuple(fast.memory_bytes) == slow.memory_bytes


@settings(max_examples=100, deadline=None)
@given(graph=overwriting_graphs())
def test_the_least_memory_is_found(graph: CostGraph) -> None:
    """The backward search ends with it, and what every schedule needs is no more."""
    bound = least_memory_bound(graph)
    assert bound.proven
    assert bound.lower_bound_bytes == max(least_memory_exact(graph), graph.resident_bytes)
    least = least_memory(graph, time_limit_s=0.2)
    assert least.lower_bound_bytes <= least_memory_exact(graph) <= least.peak_bytes


@settings(max_examples=100, deadline=None)
@given(graph=steps())
def test_no_bound_is_above_a_schedule_of_a_step(graph: CostGraph) -> None:
    """Where something is saved for backward the least memory is bounded from below at least."""
    bound = least_memory_bound(graph)
    assert bound.lower_bound_bytes <= keep_all_peak_bytes(graph)
    if bound.schedule is not None:
        assert replay(graph, bound.schedule).peak_bytes == bound.lower_bound_bytes


@settings(max_examples=100, deadline=None)
@given(graph=overwriting_graphs(), share=st.integers(0, 100))
def test_gap_cover_stays_below(graph: CostGraph, share: int) -> None:
    """The linear bound is no higher than the exhaustive optimum."""
    budget_bytes = keep_all_peak_bytes(graph) * share // 100
    bound = gap_cover(graph, budget_bytes)
    optimum = exhaustive_optimum(graph, budget_bytes)
    if bound.infeasible:
        assert optimum is None
    if optimum is not None:
        assert bound.lower_bound_ns <= optimum


@settings(max_examples=100, deadline=None)
@given(graph=st.one_of(overwriting_graphs(), steps()), data=st.data())
def test_schedules_satisfy_every_relaxation(graph: CostGraph, data: st.DataObject) -> None:
    """A schedule written as a solution breaks no row of memory at its own peak."""
    schedule = draw_schedule(graph, data)
    if schedule is None:
        return
    operators = st.integers(0, graph.num_operators - 1)
    slicing = Slicing(
        frozenset(data.draw(st.sets(operators))),
        frozenset(data.draw(st.sets(st.tuples(operators, operators), max_size=6))),
    )
    g = graph_arrays(graph)
    model = build_slice_model(g, slicing, replay(graph, schedule).peak_bytes)
    assert not model.infeasible
    assert satisfies(model, solution_of(graph, g, model, schedule))


@settings(max_examples=20, deadline=None)
@given(
    graph=overwriting_graphs(),
    share=st.integers(30, 100),
    solver=st.sampled_from(["auto"] * 5 + sorted(SOLVERS)),
)
def test_no_solver_claims_what_is_not_so(graph: CostGraph, share: int, solver: str) -> None:
    """Bounds lie below the exhaustive optimum and schedules fit, whichever solver runs."""
    budget_bytes = keep_all_peak_bytes(graph) * share // 100
    optimum = exhaustive_optimum(graph, budget_bytes)
    result = solve(graph, budget_bytes, solver=solver, time_limit_s=0.5)
    if optimum is None:
        assert result.schedule is None
        return
    assert result.status is not SolveStatus.INFEASIBLE
    assert result.lower_bound_ns <= optimum
    if result.schedule is not None:
        outcome = replay(graph, result.schedule)
        assert outcome.peak_bytes <= budget_bytes
        assert outcome.cost_ns == result.cost_ns >= optimum
    if result.status is SolveStatus.OPTIMAL:
        assert result.cost_ns == optimum


@settings(max_examples=20, deadline=None)
@given(graph=overwriting_graphs(max_operators=5), share=st.integers(30, 100))
def test_bounds_of_every_order_stay_below(graph: CostGraph, share: int) -> None:
    """Brute force over all orders beats neither the bound in time nor that in memory."""
    needed = max(needs_in_any_order(graph))
    assert needed <= least_memory_in_any_order(graph, time_limit_s=0.2, seed=0).peak_bytes
    if needed > 0:
        assert best_of_all_orders(graph, needed - 1) is None
    budget_bytes = keep_all_peak_bytes(graph) * share // 100
    optimum = best_of_all_orders(graph, budget_bytes)
    if optimum is not None:
        assert order_free_bound(graph, budget_bytes).lower_bound_ns <= optimum
