"""The reference itself, against every order of runs that is short enough to be listed."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph, Operator, Storage
from solvers.instances import keep_all_peak_bytes
from solvers.replay import InvalidScheduleError, replay
from solvers.schedule import Schedule

from .brute_force import cheapest_order, least_cost, least_memory_exact
from .graphs import cost_graphs, overwriting_graphs, random_dag, training_chain

MOST_RECOMPUTATIONS = 5


def orders(num_operators: int) -> Iterator[tuple[int, ...]]:
    """Every order whose first runs keep the base order, up to ``MOST_RECOMPUTATIONS``."""
    stack: list[tuple[int, tuple[int, ...]]] = [(0, ())]
    while stack:
        front, order = stack.pop()
        if front == num_operators:
            yield order
            continue
        stack.append((front + 1, (*order, front)))
        if len(order) - front < MOST_RECOMPUTATIONS:
            stack.extend((front, (*order, v)) for v in range(front))


def in_checkmate_class(order: tuple[int, ...]) -> bool:
    """Whether, between two first runs, operators run in base order and at most once."""
    front, floor = 0, -1
    for v in order:
        if v == front:
            front, floor = front + 1, -1
        elif v > floor:
            floor = v
        else:
            return False
    return True


def outcomes(graph: CostGraph) -> list[tuple[int, int, bool]]:
    """``(peak, cost, in the Checkmate class)`` of every listed order that is valid."""
    found = []
    for order in orders(graph.num_operators):
        try:
            outcome = replay(graph, Schedule(order))
        except InvalidScheduleError:
            continue
        found.append((outcome.peak_bytes, outcome.cost_ns, in_checkmate_class(order)))
    return found


@settings(max_examples=60, deadline=None)
@given(
    graph=st.one_of(
        cost_graphs(max_operators=4),
        overwriting_graphs(max_operators=4),
        st.integers(0, 10**6).map(lambda seed: random_dag(seed, max_operators=4)),
    )
)
def test_no_listed_order_is_better(graph: CostGraph) -> None:
    """At no budget is an order of at most five recomputations cheaper, in or out of the class."""
    listed = outcomes(graph)
    peaks = sorted({peak for peak, _, _ in listed})
    assert least_memory_exact(graph) <= peaks[0]
    for budget_bytes in peaks:
        for checkmate_class in (False, True):
            fitting = [
                cost
                for peak, cost, in_class in listed
                if peak <= budget_bytes and (in_class or not checkmate_class)
            ]
            if fitting:
                least = least_cost(graph, budget_bytes, checkmate_class=checkmate_class)
                assert least is not None
                assert least <= min(fitting)


@settings(max_examples=200, deadline=None)
@given(graph=cost_graphs(), share=st.integers(0, 100), checkmate_class=st.booleans())
def test_its_order_is_a_schedule_of_that_cost(
    graph: CostGraph, share: int, checkmate_class: bool
) -> None:
    """What it calls possible is: its order passes the replay, fits and lies in the class."""
    lowest = least_memory_exact(graph)
    budget_bytes = lowest + (keep_all_peak_bytes(graph) - lowest) * share // 100
    order = cheapest_order(graph, budget_bytes, checkmate_class=checkmate_class)
    if order is None:
        assert checkmate_class
        return
    assert list(dict.fromkeys(order)) == list(range(graph.num_operators))
    assert in_checkmate_class(order) or not checkmate_class
    outcome = replay(graph, Schedule(order))
    assert outcome.peak_bytes <= budget_bytes
    assert outcome.cost_ns == least_cost(graph, budget_bytes, checkmate_class=checkmate_class)


@settings(max_examples=100, deadline=None)
@given(graph=cost_graphs(max_operators=5))
def test_the_least_memory_is_where_schedules_begin(graph: CostGraph) -> None:
    """At the least budget something fits, one byte below nothing does."""
    lowest = least_memory_exact(graph)
    assert lowest <= keep_all_peak_bytes(graph)
    assert least_cost(graph, lowest) is not None
    assert least_cost(graph, lowest - 1) is None


def test_a_chain_by_hand() -> None:
    """Four equal layers: with four blocks f0 runs again, with three f0, f1 and f0 once more."""
    graph = training_chain(4)
    assert keep_all_peak_bytes(graph) == 50
    assert least_cost(graph, 50) == 80
    assert least_cost(graph, 49) == 90
    assert least_cost(graph, 39) == 110
    assert least_memory_exact(graph) == 30
    assert least_cost(graph, 29) is None


def test_the_class_of_checkmate_is_smaller() -> None:
    """``d`` reads ``a`` and ``b``, neither of which fits beside ``c``.

    In seven bytes ``b``, which takes six while it runs, has to be made again
    before ``a``, which takes five from then on: out of base order.
    """
    storages = tuple(
        Storage(name=name, size_bytes=size, producer=v)
        for v, (name, size) in enumerate([("a", 5), ("b", 1), ("c", 7), ("d", 1)])
    )
    operators = tuple(
        Operator(name=name, inputs=inputs, outputs=(v,), cost_ns=1, workspace_bytes=scratch)
        for v, (name, inputs, scratch) in enumerate(
            [("a", (), 0), ("b", (), 5), ("c", (), 0), ("d", (0, 1), 0)]
        )
    )
    graph = CostGraph(operators, storages)
    assert cheapest_order(graph, 7) == (0, 1, 2, 1, 0, 3)
    assert least_cost(graph, 7, checkmate_class=True) is None
    assert least_cost(graph, 11, checkmate_class=True) == 5


def test_a_kept_storage_is_doubled_while_it_is_made_again() -> None:
    """``a`` makes a kept result of five bytes beside what ``c`` reads after ``b``."""
    storages = (
        Storage(name="kept", size_bytes=5, producer=0, kept=True),
        Storage(name="read", size_bytes=2, producer=0),
        Storage(name="large", size_bytes=6, producer=1),
    )
    operators = (
        Operator(name="a", outputs=(0, 1), cost_ns=1),
        Operator(name="b", outputs=(2,), cost_ns=1),
        Operator(name="c", inputs=(1,), cost_ns=1),
    )
    graph = CostGraph(operators, storages)
    assert least_cost(graph, 13) == 3
    assert least_cost(graph, 12) == 4  # 5 + 5 + 2 while a runs again
    assert least_cost(graph, 11) is None
    assert least_memory_exact(graph) == 12


def test_a_small_input_is_held_for_what_is_made_from_it() -> None:
    """Only ``b`` reads ``a``, and runs again from it: cheaper than making both again."""
    storages = tuple(
        Storage(name=name, size_bytes=size, producer=v)
        for v, (name, size) in enumerate([("a", 1), ("b", 5), ("c", 6), ("d", 1)])
    )
    operators = tuple(
        Operator(name=name, inputs=inputs, outputs=(v,), cost_ns=1)
        for v, (name, inputs) in enumerate([("a", ()), ("b", (0,)), ("c", ()), ("d", (1,))])
    )
    assert cheapest_order(CostGraph(operators, storages), 7) == (0, 1, 2, 1, 3)
