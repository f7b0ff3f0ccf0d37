from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph
from solvers.arrays import graph_arrays
from solvers.fast_replay import fast_replay
from solvers.replay import InvalidScheduleError, replay
from solvers.schedule import Schedule

from .graphs import cost_graphs


@settings(max_examples=300, deadline=None)
@given(graph=cost_graphs(), data=st.data())
def test_equals_the_reference_on_any_order(graph: CostGraph, data: st.DataObject) -> None:
    """Any sequence of operators is judged the same, invalid ones included."""
    operators = st.integers(0, graph.num_operators - 1)
    _compare(graph, data.draw(st.lists(operators, max_size=12)))


@settings(max_examples=300, deadline=None)
@given(graph=cost_graphs(), data=st.data())
def test_equals_the_reference_on_valid_orders(graph: CostGraph, data: st.DataObject) -> None:
    """The base order with earlier operators run again in between is judged the same."""
    order: list[int] = []
    for v in range(graph.num_operators):
        order.extend(data.draw(st.lists(st.integers(0, v), max_size=2)) if v else [])
        order.append(v)
    _compare(graph, order)


def _compare(graph: CostGraph, order: list[int]) -> None:
    fast = fast_replay(graph_arrays(graph), np.array(order, dtype=np.int64))
    try:
        slow = replay(graph, Schedule(tuple(order)))
    except InvalidScheduleError:
        assert not fast.valid
        return
    assert fast.valid
    assert (fast.peak_bytes, fast.cost_ns) == (slow.peak_bytes, slow.cost_ns)
    assert tuple(fast.memory_bytes) == slow.memory_bytes
