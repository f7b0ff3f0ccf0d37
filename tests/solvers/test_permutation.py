from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph, Operator, Storage
from solvers.any_order.permutation import first_runs, permuted, relabelled, unpermuted
from solvers.any_order.precedence import predecessors
from solvers.replay import replay
from solvers.schedule import Schedule

from .graphs import cost_graphs, training_chain


def random_order(graph: CostGraph, seed: int) -> tuple[int, ...]:
    """Any order that the predecessors allow."""
    draw = random.Random(seed)
    before = predecessors(graph)
    waits = [len(us) for us in before]
    after: list[list[int]] = [[] for _ in before]
    for v, us in enumerate(before):
        for u in us:
            after[u].append(v)
    ready = [v for v, count in enumerate(waits) if count == 0]
    order: list[int] = []
    while ready:
        v = ready.pop(draw.randrange(len(ready)))
        order.append(v)
        for w in after[v]:
            waits[w] -= 1
            if waits[w] == 0:
                ready.append(w)
    return tuple(order)


@settings(max_examples=40, deadline=None)
@given(graph=cost_graphs(), seed=st.integers(0, 1000), data=st.data())
def test_a_schedule_is_worth_the_same_in_both_graphs(graph, seed, data):
    """There and back gives the same runs, and the replay says the same of them on the way."""
    order = random_order(graph, seed)
    again = [v for v in order if graph.operators[v].pinned is None]
    more = data.draw(st.lists(st.sampled_from(again), max_size=4)) if again else []
    schedule = Schedule((*order, *more))
    inner = relabelled(schedule, order)
    assert unpermuted(inner, order) == schedule
    assert first_runs(inner) == tuple(range(graph.num_operators))
    here, there = replay(graph, schedule), replay(permuted(graph, order), inner)
    assert (here.memory_bytes, here.cost_ns) == (there.memory_bytes, there.cost_ns)


@settings(max_examples=25, deadline=None)
@given(graph=cost_graphs(), seed=st.integers(0, 1000))
def test_permuting_back_gives_the_graph_itself(graph, seed):
    """The inverse permutation undoes what a permutation does."""
    order = random_order(graph, seed)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    unordered = CostGraph(
        tuple(replace(op, ordered=False) for op in graph.operators), graph.storages
    )
    assert permuted(permuted(unordered, order), inverse) == unordered


@pytest.mark.parametrize("order", [(0, 1), (0, 1, 2, 3, 3, 5), (1, 0, 2, 3, 4, 5)])
def test_what_breaks_the_step_is_refused(order):
    """A missing operator and a broken data flow are errors."""
    with pytest.raises(ValueError, match=r"permutation|before it is produced"):
        permuted(training_chain(3), order)


def test_ordered_operators_may_not_change_places():
    """Two draws in the other order would be other numbers."""
    graph = CostGraph(
        tuple(Operator(name=f"draw{v}", outputs=(v,), ordered=True) for v in range(2)),
        tuple(Storage(name=f"x{v}", size_bytes=1, producer=v) for v in range(2)),
    )
    with pytest.raises(ValueError, match="ordered"):
        permuted(graph, (1, 0))
