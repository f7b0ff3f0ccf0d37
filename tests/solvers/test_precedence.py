from __future__ import annotations

from itertools import permutations

from hypothesis import given, settings

from graph_capture.cost_graph import CostGraph, Operator, Storage
from solvers.any_order.precedence import closure, fixed_operators, predecessors

from .graphs import cost_graphs, training_chain


def allowed_orders(graph: CostGraph) -> list[tuple[int, ...]]:
    """Every order that the predecessors allow, by brute force."""
    before = predecessors(graph)
    return [
        order
        for order in permutations(range(graph.num_operators))
        if all(order.index(u) < order.index(v) for v, us in enumerate(before) for u in us)
    ]


@settings(max_examples=25, deadline=None)
@given(graph=cost_graphs(max_operators=5))
def test_fixed_operators_have_one_place(graph):
    """They are those that stand in the same place in each order that is allowed."""
    orders = allowed_orders(graph)
    one_place = [
        v for v in range(graph.num_operators) if len({order.index(v) for order in orders}) == 1
    ]
    assert list(fixed_operators(graph)) == one_place


def test_nothing_crosses_the_loss_and_the_optimizer_is_last():
    """Forward stays before the loss, backward after it, and the optimizer after all."""
    phases = ("forward", "forward", "loss", "backward", "backward", "optimizer")
    graph = CostGraph(
        tuple(Operator(name=str(v), outputs=(v,), phase=p) for v, p in enumerate(phases)),
        tuple(Storage(name=str(v), size_bytes=1, producer=v) for v in range(6)),
    )
    reach = closure(predecessors(graph))
    assert reach[2] == 0b11
    assert reach[3] == reach[4] == 0b111
    assert reach[5] == 0b11111
    assert fixed_operators(graph) == (2, 5)


def test_a_chain_has_one_order():
    """Each of its operators is fixed."""
    graph = training_chain(5)
    assert fixed_operators(graph) == tuple(range(10))
