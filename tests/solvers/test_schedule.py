from __future__ import annotations

from hypothesis import given, settings

from graph_capture.cost_graph import CostGraph
from solvers.replay import replay
from solvers.schedule import Schedule

from .brute_force import least_cost
from .graphs import cost_graphs, training_chain


@settings(max_examples=50, deadline=None)
@given(graph=cost_graphs())
def test_it_is_the_fastest_where_it_fits(graph: CostGraph) -> None:
    """At its own peak no schedule costs less, and it recomputes nothing."""
    schedule = Schedule.keep_all(graph)
    outcome = replay(graph, schedule)
    assert schedule.recomputed() == {}
    assert outcome.cost_ns == graph.base_cost_ns
    assert least_cost(graph, outcome.peak_bytes) == outcome.cost_ns


def test_it_holds_every_activation() -> None:
    """Six layers of ten bytes: six activations and a gradient."""
    graph = training_chain(6)
    assert Schedule.keep_all(graph).order == tuple(range(12))
    assert replay(graph, Schedule.keep_all(graph)).peak_bytes == 70
