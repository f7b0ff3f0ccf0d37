from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph
from solvers.gap_cover import gap_cover
from solvers.instances import budget_of, keep_all_peak_bytes, load_instance

from .graphs import INSTANCES, cost_graphs, exhaustive_optimum, training_chain


@settings(max_examples=200, deadline=None)
@given(graph=cost_graphs(), share=st.integers(0, 100))
def test_never_above_the_optimum(graph: CostGraph, share: int) -> None:
    """The bound is no higher than the exhaustive optimum, and excludes only what cannot fit."""
    budget_bytes = keep_all_peak_bytes(graph) * share // 100
    bound = gap_cover(graph, budget_bytes)
    optimum = exhaustive_optimum(graph, budget_bytes)
    if bound.infeasible:
        assert optimum is None
    if optimum is not None:
        assert bound.lower_bound_ns <= optimum


def test_counts_the_bytes_that_must_go() -> None:
    """Four layers at one activation below the peak: one operator runs again."""
    graph = training_chain(4)
    peak = keep_all_peak_bytes(graph)
    assert gap_cover(graph, peak).lower_bound_ns == graph.base_cost_ns
    assert gap_cover(graph, peak - 10).lower_bound_ns == graph.base_cost_ns + 10


def test_near_the_optimum_of_a_chain() -> None:
    """On chain32h at 50 % it proves 7.0 of the optimum's 7.435 %."""
    graph = load_instance(INSTANCES / "chain32h.json")
    bound = gap_cover(graph, budget_of(graph, 0.5))
    assert 1.070 <= bound.lower_bound_ns / graph.base_cost_ns <= 1.0744
