"""From a saved set to a schedule, with every run counted by hand."""

from __future__ import annotations

import pytest

from graph_capture.cost_graph import CostGraph, Operator, Storage
from solvers.replay import replay
from solvers.schedule import Schedule
from solvers.strategies import (
    StrategyError,
    apply_strategy,
    saved_set_strategy,
    schedule_for_saved,
)

from .strategy_graphs import transformer, unit_chain


def test_recomputes_just_in_time_and_keeps_what_it_recomputed() -> None:
    """Of four layers only x1 is saved: f2, f3 run again before b3, f0 before b0."""
    graph = unit_chain(4)
    schedule = schedule_for_saved(graph, saved=[1])
    assert schedule.order == (0, 1, 2, 3, 2, 3, 4, 5, 6, 0, 7)
    outcome = replay(graph, schedule)
    assert outcome.memory_bytes == (1, 2, 2, 3, 2, 3, 4, 4, 3, 2, 3)
    assert outcome.cost_ns == 8 + 3


def test_nothing_saved_runs_the_forward_pass_twice_and_no_more() -> None:
    """All of x0 … x3 are made again before b3 and stay until their gradients."""
    graph = unit_chain(4)
    schedule = schedule_for_saved(graph)
    assert schedule.order == (0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7)
    assert replay(graph, schedule).peak_bytes == 5  # x0 … x3 and b3's gradient


def test_everything_saved_is_keep_all() -> None:
    """By storages or by operators."""
    graph = unit_chain(5)
    assert schedule_for_saved(graph, saved=range(5)) == Schedule.keep_all(graph)
    assert schedule_for_saved(graph, operators=range(5)) == Schedule.keep_all(graph)


def test_pinned_and_kept_storages_need_not_be_named() -> None:
    """A pinned draw runs once, the kept output is read as it is."""
    storages = (
        Storage(name="draw", size_bytes=1, producer=0),
        Storage(name="noise", size_bytes=1, producer=1),
        Storage(name="out", size_bytes=1, producer=2, kept=True),
        Storage(name="g", size_bytes=1, producer=3),
    )
    graph = CostGraph(
        (
            Operator(name="draw", outputs=(0,), pinned="once"),
            Operator(name="scale", inputs=(0,), outputs=(1,)),
            Operator(name="out", inputs=(1,), outputs=(2,)),
            Operator(name="b", inputs=(1, 2), outputs=(3,), phase="backward"),
        ),
        storages,
    )
    assert schedule_for_saved(graph).order == (0, 1, 2, 1, 3)


def test_a_given_set_becomes_a_strategy() -> None:
    """The candidate of a saved set is its schedule, judged against the budget."""
    graph = unit_chain(4)
    strategy = saved_set_strategy("min_cut", [1], source="a partitioner")
    outcome = apply_strategy(strategy, graph, budget_bytes=3)
    assert outcome.strategy == "min_cut"
    assert (outcome.peak_bytes, outcome.cost_ns, outcome.fits) == (4, 11, False)
    assert apply_strategy(strategy, graph, budget_bytes=4).fits


def test_names_that_do_not_exist() -> None:
    """The error says which, and how many there are."""
    graph = unit_chain(3)
    with pytest.raises(StrategyError, match="storage 6; the graph has 6"):
        schedule_for_saved(graph, saved=[6])
    with pytest.raises(StrategyError, match="operators names -1"):
        schedule_for_saved(graph, operators=[-1])


def test_a_dropped_chain_is_followed_back_to_what_is_saved() -> None:
    """Saving the products of a transformer's layer leaves softmax, mask, dropout and input."""
    graph = transformer(1)
    products = [1, 2, 7, 8]  # qkv, scores, context, proj
    schedule = schedule_for_saved(graph, operators=products)
    again = (3, 5, 6)  # softmax, mask (from the pinned state), dropout
    assert schedule.order == (*range(13), *again, 13, 14, 15, 16, 0, 17, 18, 19)
