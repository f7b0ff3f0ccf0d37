from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph, Operator, Storage
from solvers.arrays import graph_arrays

from .graphs import cost_graphs, random_dag, random_step


def by_hand() -> CostGraph:
    """``a`` makes x and y, ``b`` reads both and the weights, ``c`` reads x alone."""
    storages = (
        Storage(name="weights", size_bytes=100, producer=None),
        Storage(name="x", size_bytes=5, producer=0),
        Storage(name="y", size_bytes=7, producer=0, kept=True),
        Storage(name="buffer", size_bytes=11, producer=None),
        Storage(name="z", size_bytes=9, producer=1),
    )
    operators = (
        Operator(name="a", inputs=(0,), outputs=(1, 2), cost_ns=3, ordered=True),
        Operator(name="b", inputs=(2, 0, 1, 2), outputs=(4,), cost_ns=4, workspace_bytes=6),
        Operator(name="c", inputs=(1,), cost_ns=5, pinned="test"),
    )
    return CostGraph(operators, storages)


def test_inputs_are_distinct_and_not_resident() -> None:
    """``b`` names y twice and the weights once; what is left is x and y."""
    g = graph_arrays(by_hand())
    assert [g.inputs(v).tolist() for v in range(3)] == [[], [1, 2], [1]]
    assert [g.outputs(v).tolist() for v in range(3)] == [[1, 2], [4], []]


def test_positions_are_production_and_reads() -> None:
    """x is made by a and read by b and c; z is never read; the weights have no position."""
    g = graph_arrays(by_hand())
    assert [g.positions(k).tolist() for k in range(5)] == [[], [0, 1, 2], [0, 1], [], [1]]


def test_figures_are_the_graphs() -> None:
    """Sizes, costs and flags come over one to one, and resident storages have no producer."""
    g = graph_arrays(by_hand())
    assert (g.num_operators, g.num_storages, g.resident_bytes) == (3, 5, 111)
    assert g.size.tolist() == [100, 5, 7, 11, 9]
    assert g.producer.tolist() == [-1, 0, 0, -1, 1]
    assert g.kept.tolist() == [0, 0, 1, 0, 0]
    assert g.cost.tolist() == [3, 4, 5]
    assert g.workspace.tolist() == [0, 6, 0]
    assert g.pinned.tolist() == [0, 0, 1]
    assert g.ordered.tolist() == [1, 0, 0]


@settings(max_examples=100, deadline=None)
@given(
    graph=st.one_of(
        cost_graphs(),
        st.integers(0, 10**6).map(random_dag),
        st.integers(0, 10**6).map(random_step),
    )
)
def test_positions_follow_from_inputs_and_outputs(graph: CostGraph) -> None:
    """Each use stands at its place once, ascending, the production first."""
    g = graph_arrays(graph)
    for k, storage in enumerate(graph.storages):
        uses = g.positions(k).tolist()
        assert uses == sorted(set(uses))
        if storage.producer is None:
            assert uses == []
            continue
        assert uses[0] == storage.producer
        assert uses[1:] == sorted(set(graph.consumers[k]))


def test_a_graph_without_operators() -> None:
    """Nothing to run, but what is resident is there."""
    g = graph_arrays(CostGraph((), (Storage(name="weights", size_bytes=3, producer=None),)))
    assert (g.num_operators, g.num_storages, g.resident_bytes) == (0, 1, 3)
    assert g.in_ptr.tolist() == [0]
    assert g.pos_idx.dtype == np.int64
