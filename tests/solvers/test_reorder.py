from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph, Operator, Storage
from solvers.any_order.permutation import first_runs, permuted
from solvers.any_order.precedence import predecessors
from solvers.any_order.reorder import reorder, reorder_runs
from solvers.instances import keep_all_peak_bytes
from solvers.replay import replay
from solvers.schedule import Schedule

from .graphs import cost_graphs, training_chain


def piled_up(num_layers: int) -> CostGraph:
    """A backward pass that computes all weight gradients, of 1 byte each, at its end.

    Until then each layer's activation and output gradient, of 10 bytes, stay.
    """
    storages: list[Storage] = []
    operators: list[Operator] = []

    def add(name: str, inputs: list[int], size_bytes: int, phase: str, kept: bool = False) -> int:
        v = len(operators)
        storages.append(Storage(name=name, size_bytes=size_bytes, producer=v, kept=kept))
        operators.append(
            Operator(name=name, inputs=tuple(inputs), outputs=(v,), cost_ns=1, phase=phase)
        )
        return v

    x = [add("x0", [], 10, "forward")]
    for i in range(num_layers):
        x.append(add(f"x{i + 1}", [x[-1]], 10, "forward"))
    gradient = [add("loss", [x[-1]], 10, "loss")]
    for i in reversed(range(1, num_layers)):
        gradient.append(add(f"dx{i}", [gradient[-1]], 10, "backward"))
    for i, g in zip(reversed(range(num_layers)), gradient):
        add(f"dw{i}", [x[i], g], 1, "backward", kept=True)
    return CostGraph(tuple(operators), tuple(storages))


def test_weight_gradients_run_as_soon_as_they_can():
    """Piled up they need 161 bytes; one by one, with what they read freed, 101."""
    graph = piled_up(8)
    assert keep_all_peak_bytes(graph) == 161
    order = reorder(graph)
    assert keep_all_peak_bytes(permuted(graph, order)) <= 101


def test_where_one_order_is_possible_nothing_moves():
    """A chain stays what it is."""
    assert reorder(training_chain(6)) == tuple(range(12))


@settings(max_examples=30, deadline=None)
@given(graph=cost_graphs(max_operators=8), share=st.integers(30, 100))
def test_the_order_is_allowed_and_never_peaks_higher(graph, share):
    """Every operator once, after its predecessors, with no higher peak."""
    peak = keep_all_peak_bytes(graph)
    order = reorder(graph, budget_bytes=peak * share // 100, num_moves=2000)
    before = predecessors(graph)
    place = {v: i for i, v in enumerate(order)}
    assert sorted(order) == list(range(graph.num_operators))
    assert all(place[u] < place[v] for v, us in enumerate(before) for u in us)
    assert keep_all_peak_bytes(permuted(graph, order)) <= peak


@settings(max_examples=30, deadline=None)
@given(graph=cost_graphs(), data=st.data())
def test_the_same_runs_with_no_higher_peak(graph, data):
    """A schedule with recomputations keeps its runs, its cost, and the order of ordered ones."""
    runs: list[int] = []
    for v in range(graph.num_operators):
        free = [u for u in range(v) if graph.operators[u].pinned is None]
        runs += data.draw(st.lists(st.sampled_from(free), max_size=2)) if free else []
        runs.append(v)
    schedule = Schedule(tuple(runs))
    moved = reorder_runs(graph, schedule, num_moves=2000)
    assert sorted(moved.order) == sorted(schedule.order)
    here, there = replay(graph, schedule), replay(graph, moved)
    assert there.peak_bytes <= here.peak_bytes
    assert there.cost_ns == here.cost_ns
    ordered = [v for v in first_runs(moved) if graph.operators[v].ordered]
    assert ordered == sorted(ordered)


def test_the_same_seed_gives_the_same_order():
    """What the clock does not cut is reproducible."""
    graph = piled_up(6)
    assert reorder(graph, seed=3, time_limit_s=60) == reorder(graph, seed=3, time_limit_s=60)
