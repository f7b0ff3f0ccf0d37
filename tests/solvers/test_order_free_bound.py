from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph
from solvers.any_order.order_free_bound import order_free_bound
from solvers.any_order.permutation import permuted
from solvers.instances import budget_of, keep_all_peak_bytes, load_instance
from solvers.portfolio import solve
from solvers.result import OPTIMAL_GAP

from .graphs import INSTANCES, cost_graphs, exhaustive_optimum, training_chain
from .test_precedence import allowed_orders


def best_of_all_orders(graph: CostGraph, budget_bytes: int) -> int | None:
    """Least cost of all schedules in all orders that are allowed; ``None``: nothing fits."""
    found = [
        cost
        for order in allowed_orders(graph)
        if (cost := exhaustive_optimum(permuted(graph, order), budget_bytes)) is not None
    ]
    return min(found, default=None)


@settings(max_examples=30, deadline=None)
@given(graph=cost_graphs(max_operators=5), share=st.integers(30, 100))
def test_no_order_is_below_it(graph, share):
    """Brute force over all orders and all recomputations never beats the bound."""
    budget_bytes = keep_all_peak_bytes(graph) * share // 100
    bound = order_free_bound(graph, budget_bytes)
    optimum = best_of_all_orders(graph, budget_bytes)
    if bound.infeasible:
        assert optimum is None
    if optimum is not None:
        assert bound.lower_bound_ns <= optimum


def test_where_one_order_is_possible_it_is_near_the_optimum():
    """On a chain every operator is fixed: the bound is what slices prove."""
    graph = training_chain(6, with_phases=False)
    budget_bytes = 50
    optimum = exhaustive_optimum(graph, budget_bytes)
    bound = order_free_bound(graph, budget_bytes).lower_bound_ns
    assert optimum is not None
    assert graph.base_cost_ns < bound <= optimum


def test_a_transformer_gains_nothing_by_reordering():
    """GPT-2 at 90 % of its memory: the optimum of the given order is the bound of all orders."""
    graph = load_instance(INSTANCES / "gpt2_L2.json")
    budget_bytes = budget_of(graph, 0.9)
    found = solve(graph, budget_bytes, time_limit_s=10)
    bound = order_free_bound(graph, budget_bytes)
    assert found.cost_ns is not None
    assert found.cost_ns > graph.base_cost_ns
    assert bound.lower_bound_ns <= found.cost_ns <= (1 + OPTIMAL_GAP) * bound.lower_bound_ns
