"""Nested strategies: revolve against its recurrence, log n by hand."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest

from solvers.replay import replay
from solvers.strategies import STRATEGIES, StrategyError, apply_strategy
from solvers.strategies.nested import (
    recursive,
    recursive_places,
    repeated_steps,
    revolve,
    revolve_places,
)

from .strategy_graphs import layered, transformer, unit_chain


@cache
def least_steps(length: int, slots: int) -> int:
    """P(l, s) by its recurrence."""
    if length == 1:
        return 0
    if slots == 1:
        return length * (length - 1) // 2
    return min(
        m + least_steps(length - m, slots - 1) + least_steps(m, slots) for m in range(1, length)
    )


def test_closed_form_is_the_recurrence() -> None:
    """For all stretches up to forty steps and seven slots."""
    for slots in range(1, 8):
        for length in range(1, 41):
            assert repeated_steps(length, slots) == least_steps(length, slots)


def test_no_place_outside_of_the_stretch() -> None:
    """Snapshots ascend, are as many as there are slots at most, and end within."""
    for length in range(1, 20):
        for free in range(4):
            places = revolve_places(length, free)
            assert places == sorted(set(places))
            assert len(places) <= free
            assert all(1 <= place < length for place in places)


def test_revolve_on_four_layers_in_two_slots() -> None:
    """The slot beside the input holds x0; x2 is there since f3 ran from it; x1 is made again."""
    graph = unit_chain(4)
    schedule = revolve(graph, 2)
    assert schedule.order == (0, 1, 2, 3, 4, 5, 1, 6, 7)
    outcome = replay(graph, schedule)
    assert outcome.cost_ns == 8 + 1
    assert outcome.peak_bytes == 4  # under b3: x0, x2, x3 and its gradient


def test_one_slot_starts_from_the_input_each_time() -> None:
    """Five layers: x2 takes three steps from the input, x1 two, x0 one."""
    graph = unit_chain(5)
    schedule = revolve(graph, 1)
    assert schedule.order == (0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 7, 0, 1, 8, 0, 9)
    assert replay(graph, schedule).peak_bytes == 3  # never more than two x and one gradient


@pytest.mark.parametrize("num_layers", [3, 7, 12, 20])
@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_revolve_advances_as_little_as_possible(num_layers: int, slots: int) -> None:
    """Second operators of layers run again P(L + 1, s) - L times: L layers and the loss.

    Those runs are the advances beyond the first sweep; a layer's own backward
    pass needs only its first operator, once.
    """
    graph = layered(num_layers)
    again = revolve(graph, slots).recomputed()
    advances = sum(again.get(2 * i + 1, 0) for i in range(num_layers))
    assert advances == least_steps(num_layers + 1, slots) - num_layers
    firsts = sum(again.get(2 * i, 0) for i in range(num_layers))
    assert firsts == advances + num_layers


def test_more_slots_cost_more_memory_and_less_time() -> None:
    """On forty layers, from one slot to all."""
    graph = layered(40)
    outcomes = [replay(graph, revolve(graph, slots)) for slots in (1, 2, 4, 8, 16, 40)]
    costs = [outcome.cost_ns for outcome in outcomes]
    peaks = [outcome.peak_bytes for outcome in outcomes]
    assert costs == sorted(costs, reverse=True)
    assert peaks == sorted(peaks)
    assert peaks[0] <= 6
    assert costs[-1] == graph.base_cost_ns + 40  # each layer's first operator once more


def test_recursive_on_four_layers() -> None:
    """Halves: x1 and x2 are saved, x0 is made again."""
    graph = unit_chain(4)
    schedule = recursive(graph)
    assert schedule.order == (0, 1, 2, 3, 4, 5, 6, 0, 7)
    assert replay(graph, schedule).peak_bytes == 4  # under b3: x1, x2, x3 and its gradient


def test_recursive_divides_evenly() -> None:
    """k snapshots make k + 1 parts that differ by one step at most, or parts of one step."""
    assert recursive_places(10, 8) == list(range(1, 10))
    assert recursive_places(11, 2) == [3, 7, 8, 9, 10]  # 3, 4 and 4 steps, these 1, 1 and 2
    for length in range(2, 60):
        for k in range(1, length):
            ends = [0, *recursive_places(length, k)[:k], length]
            parts = [end - begin for begin, end in itertools.pairwise(ends)]
            assert len(parts) == k + 1
            assert max(parts) - min(parts) <= 1


@pytest.mark.parametrize("num_layers", [4, 10, 23])
def test_with_ample_memory_recursive_costs_what_revolve_does(num_layers: int) -> None:
    """Both save every state, what lies before the first and after the last layer included."""
    graph = transformer(num_layers)
    costs = {
        apply_strategy(STRATEGIES[name], graph, budget_bytes=10**6).cost_ns
        for name in ("chen_recursive", "revolve")
    }
    assert len(costs) == 1


def test_recursive_takes_logarithmic_memory() -> None:
    """n layers: at most 2 + log2 n bytes beside two gradients, at most log2 n forward passes."""
    for power in range(3, 9):
        num_layers = 2**power
        graph = unit_chain(num_layers)
        outcome = replay(graph, recursive(graph))
        assert outcome.peak_bytes <= power + 4
        assert outcome.cost_ns - graph.base_cost_ns <= power * num_layers
        assert outcome.cost_ns - graph.base_cost_ns >= num_layers / 2


def test_recursive_with_more_snapshots_takes_less_time() -> None:
    """k = 3 divides sixty-four layers by four, in half as many levels as k = 1."""
    graph = unit_chain(64)
    two, four = (replay(graph, recursive(graph, k)) for k in (1, 3))
    assert four.cost_ns < two.cost_ns
    assert four.peak_bytes > two.peak_bytes
    assert four.peak_bytes <= 3 * math.log(64, 4) + 4


def test_the_cheapest_number_of_slots_that_fits() -> None:
    """More memory, less time; nothing of this kind fits in three bytes."""
    graph = unit_chain(16)
    revolve_strategy = STRATEGIES["revolve"]
    costs = [
        apply_strategy(revolve_strategy, graph, budget_bytes=budget).cost_ns
        for budget in (5, 7, 10, 17)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == graph.base_cost_ns
    assert not apply_strategy(revolve_strategy, graph, budget_bytes=2).fits


def test_parameters_without_sense() -> None:
    """No slot, no snapshot."""
    with pytest.raises(StrategyError, match="at least one slot"):
        revolve(unit_chain(4), 0)
    with pytest.raises(StrategyError, match="at least one snapshot"):
        recursive(unit_chain(4), 0)
    with pytest.raises(ValueError, match="no stretch"):
        repeated_steps(0, 1)
