from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph
from solvers.instances import keep_all_peak_bytes, load_instance
from solvers.least_memory import least_memory
from solvers.replay import replay

from .brute_force import least_memory_exact
from .graphs import (
    INSTANCES,
    cost_graphs,
    exhaustive_optimum,
    random_dag,
    random_step,
    training_chain,
)


@settings(max_examples=30, deadline=None)
@given(graph=cost_graphs(max_operators=5))
def test_nothing_fits_below_the_bound(graph: CostGraph) -> None:
    """The schedule has the peak that is claimed, and no schedule goes below the bound."""
    least = least_memory(graph, time_limit_s=0.3)
    assert replay(graph, least.schedule).peak_bytes == least.peak_bytes
    assert least.lower_bound_bytes <= least.peak_bytes <= keep_all_peak_bytes(graph)
    if least.lower_bound_bytes > 0:
        assert exhaustive_optimum(graph, least.lower_bound_bytes - 1) is None
    assert exhaustive_optimum(graph, least.peak_bytes) is not None


@settings(max_examples=20, deadline=None)
@given(family=st.sampled_from([random_dag, random_step]), seed=st.integers(0, 10**6))
def test_small_graphs_are_proven(family: Callable[[int], CostGraph], seed: int) -> None:
    """With time enough, bound and peak are the exact least memory."""
    graph = family(seed)
    least = least_memory(graph, time_limit_s=20)
    assert least.lower_bound_bytes == least.peak_bytes == least_memory_exact(graph)


def test_a_bound_above_every_need_is_proven() -> None:
    """G1: no operator needs as much as the whole step; what holds it up runs at its peak."""
    graph = load_instance(INSTANCES / "G1.json")
    least = least_memory(graph, time_limit_s=60)
    assert least.lower_bound_bytes == least.peak_bytes == 25_050
    outcome = replay(graph, least.schedule)
    assert least.schedule.order[outcome.peak_step] in least.holding


def test_a_chain_needs_three_activations() -> None:
    """In a chain, b0 reads x0 and the gradient and makes another: three blocks, and no fewer."""
    graph = training_chain(6)
    least = least_memory(graph, time_limit_s=5)
    assert least.lower_bound_bytes == least.peak_bytes == 30


def test_a_start_is_descended_from() -> None:
    """Without time to search, a start that is lower than every segmentation is the answer."""
    graph = load_instance(INSTANCES / "chain64h.json")
    lowest = least_memory(graph, time_limit_s=10)
    without = least_memory(graph, time_limit_s=0)
    again = least_memory(graph, time_limit_s=0, start=lowest.schedule)
    assert lowest.peak_bytes == again.peak_bytes < without.peak_bytes
