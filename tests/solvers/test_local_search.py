from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph
from solvers.instances import budget_of, keep_all_peak_bytes, load_instance
from solvers.local_search import local_search
from solvers.replay import replay

from .graphs import INSTANCES, cost_graphs, exhaustive_optimum


@settings(max_examples=60, deadline=None)
@given(graph=cost_graphs(), share=st.integers(40, 100))
def test_fits_and_is_never_below_the_optimum(graph: CostGraph, share: int) -> None:
    """What it returns passes the replay within the budget at the cost that it claims."""
    budget_bytes = keep_all_peak_bytes(graph) * share // 100
    outcome = local_search(graph, budget_bytes, num_moves=1000)
    if outcome.schedule is None:
        return
    replayed = replay(graph, outcome.schedule)
    assert replayed.peak_bytes <= budget_bytes
    assert replayed.cost_ns == outcome.cost_ns
    optimum = exhaustive_optimum(graph, budget_bytes)
    assert optimum is not None
    assert replayed.cost_ns >= optimum


def test_finds_a_known_optimum() -> None:
    """On G1 at 90 % it finds 0.789 %, which slice refinement proves."""
    graph = load_instance(INSTANCES / "G1.json")
    outcome = local_search(graph, budget_of(graph, 0.9), num_moves=200_000, time_limit_s=20)
    assert outcome.cost_ns is not None
    assert outcome.cost_ns <= 1.0079 * graph.base_cost_ns


def test_same_seed_same_schedule() -> None:
    """Two searches with one seed, cut by moves and not by time, agree run by run."""
    graph = load_instance(INSTANCES / "chain32h.json")
    budget_bytes = budget_of(graph, 0.5)
    first = local_search(graph, budget_bytes, num_moves=5000, time_limit_s=60, seed=3)
    second = local_search(graph, budget_bytes, num_moves=5000, time_limit_s=60, seed=3)
    assert first.schedule is not None
    assert first.schedule == second.schedule
