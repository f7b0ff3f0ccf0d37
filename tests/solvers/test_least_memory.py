from __future__ import annotations

from hypothesis import given, settings

from graph_capture.cost_graph import CostGraph
from solvers.instances import keep_all_peak_bytes
from solvers.least_memory import least_memory
from solvers.replay import replay

from .graphs import cost_graphs, exhaustive_optimum, training_chain


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


def test_a_chain_needs_three_activations() -> None:
    """In a chain, b0 reads x0 and the gradient and makes another: three blocks, and no fewer."""
    graph = training_chain(6)
    least = least_memory(graph, time_limit_s=5)
    assert least.lower_bound_bytes == 30
    assert least.peak_bytes <= 40
