"""DTR, simulated: evictions by hand, then its promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph, Operator, Storage
from solvers.instances import keep_all_peak_bytes
from solvers.replay import replay
from solvers.schedule import Schedule
from solvers.strategies import STRATEGIES, StrategyError, apply_strategy
from solvers.strategies.dtr import dtr

from .graphs import random_dag, random_step
from .strategy_graphs import transformer, unit_chain


def test_evicts_the_stalest_of_equals() -> None:
    """Three layers, 3 bytes: before b2 x0 is evicted (1/2 against 1/1 for x1), then made again."""
    graph = unit_chain(3)
    schedule = dtr(graph, 3)
    assert schedule.order == (0, 1, 2, 3, 4, 0, 5)
    assert replay(graph, schedule).memory_bytes == (1, 2, 2, 3, 3, 2, 3)


def test_evicts_what_is_cheap_to_make() -> None:
    """As before, but f0 costs 9: 9/2 against 1/1, so x1 goes; x0 does when b1 needs room."""
    chain = unit_chain(3)
    dear = replace(chain.operators[0], cost_ns=9)
    graph = CostGraph((dear, *chain.operators[1:]), chain.storages)
    assert dtr(graph, 3).order == (0, 1, 2, 3, 1, 4, 0, 5)


def test_evicts_what_is_large() -> None:
    """x1 of 4 bytes: 1/4 against 1/2 for x0, so it goes; x0 follows when b1 needs room."""
    chain = unit_chain(3)
    large = replace(chain.storages[1], size_bytes=4)
    graph = CostGraph(chain.operators, (chain.storages[0], large, *chain.storages[2:]))
    assert dtr(graph, 6).order == (0, 1, 2, 3, 1, 4, 0, 5)


def test_an_evicted_neighbourhood_makes_its_neighbours_dear() -> None:
    """Four layers, 3 bytes: x0 goes before f3, and then x1 would cost two runs.

    Before f3: x0 (stale by 2: 1/2), x1 (1/1), x2 locked: x0 goes. Before b3:
    x1 costs f1 and, its evicted neighbour, f0 (2 over a staleness of 2),
    x2 costs 1 over 1: a tie, and the earlier one goes.
    """
    graph = unit_chain(4)
    schedule = dtr(graph, 3)
    assert schedule.order[:5] == (0, 1, 2, 3, 4)
    assert schedule.order[5:] == (5, 0, 1, 6, 0, 7)
    assert replay(graph, schedule).peak_bytes == 3


def test_with_room_for_everything_it_evicts_nothing() -> None:
    """At the peak of keep-all the schedule is keep-all."""
    for graph in (unit_chain(8), transformer(2), random_step(3), random_dag(5)):
        assert dtr(graph, keep_all_peak_bytes(graph)) == Schedule.keep_all(graph)


def test_square_root_of_memory_for_about_one_more_forward_pass() -> None:
    """The paper's theorem on chains: 2 sqrt(n) bytes and O(n) recomputations."""
    graph = unit_chain(256)
    outcome = replay(graph, dtr(graph, 33))
    assert outcome.peak_bytes <= 33
    assert graph.base_cost_ns < outcome.cost_ns <= graph.base_cost_ns + 2 * 256


def test_pinned_storages_stay() -> None:
    """At three quarters of a transformer's memory the random state is drawn once and kept."""
    graph = transformer(3)
    budget = keep_all_peak_bytes(graph) * 3 // 4
    schedule = dtr(graph, budget)
    assert schedule.recomputed()
    assert not any(graph.operators[v].pinned for v in schedule.recomputed())
    assert replay(graph, schedule).peak_bytes <= budget


def test_says_when_it_runs_out_of_memory() -> None:
    """The operator, what it needs, what cannot go (x0 and a gradient), the budget."""
    with pytest.raises(StrategyError, match=r"'f1' needs 1 bytes beside 2 .* budget is 2"):
        dtr(unit_chain(8), 2)
    with pytest.raises(StrategyError, match="dtr needs a budget"):
        apply_strategy(STRATEGIES["dtr"], unit_chain(8))


def test_says_when_it_thrashes() -> None:
    """Two bytes for a long chain beside a gradient: quadratically many runs."""
    with pytest.raises(StrategyError, match="thrashes"):
        dtr(unit_chain(60), 3)


def test_a_dead_pinned_gradient_is_freed() -> None:
    """Backward operators that are pinned, as batch norm's: their outputs die with their use."""
    chain = unit_chain(4)
    operators = tuple(
        replace(op, pinned="once") if op.phase == "backward" else op for op in chain.operators
    )
    graph = CostGraph(operators, chain.storages)
    assert replay(graph, dtr(graph, 3)).peak_bytes == 3


def _graph(*operators: tuple[str, tuple[int, ...], int]) -> CostGraph:
    """Operators of unit cost by name, what they read, and the size of the one thing they make."""
    return CostGraph(
        tuple(
            Operator(
                name=name,
                inputs=inputs,
                outputs=(v,),
                cost_ns=1,
                phase="backward" if name.startswith("b") else "forward",
                pinned="once" if "pinned" in name else None,
            )
            for v, (name, inputs, _) in enumerate(operators)
        ),
        tuple(
            Storage(name=name, size_bytes=size, producer=v)
            for v, (name, _, size) in enumerate(operators)
        ),
    )


def test_what_is_dead_and_rematerialized_waits_to_be_chosen() -> None:
    """Only the release of the last reference evicts at once; p is made again once for r and q.

    p dies with r's first run. q is evicted for s (4 bytes: r and s), r for b_s. For
    b_r p and r are made again (with two gradients 4 bytes), and p is still there for q.
    """
    graph = _graph(
        ("p", (), 1),
        ("q", (0,), 1),
        ("r", (0,), 1),
        ("s", (), 3),
        ("b_s", (3,), 1),
        ("b_r", (2, 4), 1),
        ("b_q", (1, 5), 1),
    )
    assert dtr(graph, 4).order == (0, 1, 2, 3, 4, 0, 2, 5, 1, 6)


def test_what_is_dead_and_cannot_be_made_again_is_banished_in_turn() -> None:
    """j is made again for m after its last use, then k dies, from which it came.

    m is evicted for b_s (x, k and s: 4 bytes) and made again for b_w with j, from k,
    which is pinned. After b_y k is banished: j can be made no more. Before b_z
    nothing is evictable; with j gone w and z are 4 bytes.
    """
    graph = _graph(
        ("x", (), 1),
        ("b_k_pinned", (0,), 1),
        ("b_j", (1,), 1),
        ("b_m", (2,), 1),
        ("b_s", (0,), 2),
        ("b_w", (3,), 1),
        ("b_y", (1,), 1),
        ("b_z", (5,), 3),
    )
    assert dtr(graph, 4).order == (0, 1, 2, 3, 4, 2, 3, 5, 6, 7)


def test_a_sibling_at_hand_is_not_counted_twice() -> None:
    """One operator makes two storages; one is evicted and made again while the other is there."""
    storages = tuple(
        Storage(name=name, size_bytes=size, producer=producer)
        for name, size, producer in (
            ("p", 1, 0),
            ("q", 3, 0),
            ("r", 3, 1),
            ("s", 1, 2),
            ("t", 1, 3),
        )
    )
    graph = CostGraph(
        (
            Operator(name="two", outputs=(0, 1), cost_ns=1),
            Operator(name="big", inputs=(0,), outputs=(2,), cost_ns=1),
            Operator(name="reads", inputs=(2, 0), outputs=(3,), cost_ns=1),
            Operator(name="b", inputs=(1, 3), outputs=(4,), cost_ns=1, phase="backward"),
        ),
        storages,
    )
    schedule = dtr(graph, 5)
    assert schedule.order == (0, 1, 2, 0, 3)
    assert replay(graph, schedule).peak_bytes == 5


@given(st.integers(0, 10**6), st.integers(5, 10), st.sampled_from([random_step, random_dag]))
def test_never_above_its_budget(seed: int, tenths: int, family: object) -> None:
    """What it returns is valid, in base order and within the budget."""
    graph = family(seed)  # type: ignore[operator]
    budget = keep_all_peak_bytes(graph) * tenths // 10
    try:
        schedule = dtr(graph, budget)
    except StrategyError:
        return
    assert replay(graph, schedule).peak_bytes <= budget
    assert list(dict.fromkeys(schedule.order)) == sorted(set(schedule.order))


def test_is_asked_before_each_run_whether_to_go_on() -> None:
    """Recomputations of one operator may be many: the question is not put once for all."""
    asked = 0

    def give_up() -> bool:
        nonlocal asked
        asked += 1
        return False

    schedule = dtr(unit_chain(64), 12, give_up=give_up)
    assert asked == len(schedule.order) > 2 * 64
