from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers.any_order.memory import least_memory_in_any_order, needs_in_any_order
from solvers.any_order.permutation import first_runs
from solvers.any_order.reorder import reorder
from solvers.any_order.solve import solve_in_any_order
from solvers.instances import budget_of, keep_all_peak_bytes, load_instance
from solvers.least_memory import least_memory
from solvers.portfolio import solve
from solvers.replay import replay
from solvers.result import SolveStatus
from solvers.schedule import Schedule
from solvers.scopes import BoundScope

from .graphs import INSTANCES, cost_graphs, training_chain
from .test_order_free_bound import best_of_all_orders
from .test_reorder import piled_up


@settings(max_examples=10, deadline=None)
@given(graph=cost_graphs(max_operators=5), share=st.integers(40, 100))
def test_between_the_best_of_all_orders_and_eagers_own(graph, share):
    """Never below the optimum of all orders, never above the solve that keeps eager's."""
    budget_bytes = keep_all_peak_bytes(graph) * share // 100
    found = solve_in_any_order(graph, budget_bytes, time_limit_s=5)
    optimum = best_of_all_orders(graph, budget_bytes)
    base = solve(graph, budget_bytes, time_limit_s=5)
    if found.status is SolveStatus.INFEASIBLE:
        assert optimum is None
    if found.cost_ns is None:
        assert base.cost_ns is None
        return
    assert optimum is not None
    assert found.cost_ns >= optimum
    assert base.cost_ns is None or found.cost_ns <= base.cost_ns
    outcome = replay(graph, found.schedule)
    assert (outcome.cost_ns, outcome.peak_bytes) == (found.cost_ns, found.peak_bytes)
    assert outcome.peak_bytes <= budget_bytes
    assert found.lower_bound_ns <= found.cost_ns
    if found.bound_scope is BoundScope.ANY_ORDER:
        assert found.lower_bound_ns <= optimum


def test_piled_up_gradients_cost_nothing_in_another_order():
    """What eager's order can only pay for by recomputing fits for free, proven for every order."""
    graph = piled_up(8)
    found = solve_in_any_order(graph, 110, time_limit_s=10)
    base = solve(graph, 110, time_limit_s=10)
    assert base.cost_ns is None or base.cost_ns > graph.base_cost_ns
    assert found.cost_ns == found.lower_bound_ns == graph.base_cost_ns
    assert found.bound_scope is BoundScope.ANY_ORDER
    assert first_runs(found.schedule) != tuple(range(graph.num_operators))


def test_a_bound_for_one_order_says_so():
    """A schedule in eager's order has eager's bound unless all orders are excluded."""
    chain = solve_in_any_order(training_chain(6), 50, time_limit_s=10)
    assert first_runs(chain.schedule) == tuple(range(12))
    assert chain.bound_scope in (
        BoundScope.BASE_ORDER,
        BoundScope.STAGED,
        BoundScope.ANY_ORDER,
    )


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_random_graph_beats_the_optimum_of_its_given_order():
    """G1 at 80 %: 2.296 % is proven optimal in the given order, another needs less."""
    graph = load_instance(INSTANCES / "G1.json")
    found = solve_in_any_order(graph, budget_of(graph, 0.8), time_limit_s=30)
    assert found.cost_ns is not None
    assert found.cost_ns / graph.base_cost_ns - 1 < 0.015
    assert found.bound_scope in (
        BoundScope.OWN_ORDER,
        BoundScope.OWN_ORDER_STAGED,
        BoundScope.ANY_ORDER,
    )


def test_less_memory_than_eagers_order_can_do_with():
    """The least memory in any order is below what is proven for eager's."""
    graph = piled_up(8)
    base = least_memory(graph, time_limit_s=1)
    least = least_memory_in_any_order(graph, start=base, time_limit_s=1)
    assert least.lower_bound_bytes <= least.peak_bytes <= base.peak_bytes
    assert replay(graph, least.schedule).peak_bytes == least.peak_bytes


def test_a_hint_in_another_order_is_used_in_its_own():
    """Without any time, where the hint is all that is at hand."""
    graph = piled_up(8)
    hint = Schedule(reorder(graph))
    found = solve_in_any_order(graph, 101, time_limit_s=0, hint=hint)
    assert found.schedule == hint
    assert found.cost_ns == graph.base_cost_ns


def test_a_hint_in_another_order_does_not_replace_eagers():
    """Where keeping everything fits in eager's order, a hint that recomputes is not taken."""
    graph = piled_up(8)
    order = reorder(graph)
    found = solve_in_any_order(graph, 161, time_limit_s=0, hint=Schedule((order[0], *order)))
    assert found.cost_ns == graph.base_cost_ns


@settings(max_examples=30, deadline=None)
@given(graph=cost_graphs(max_operators=5))
def test_what_every_order_needs(graph):
    """No order needs less than the bound, by brute force over all of them."""
    bound = max(needs_in_any_order(graph))
    if bound > 0:
        assert best_of_all_orders(graph, bound - 1) is None
