"""Strategies that recompute whole segments, with every run counted by hand."""

from __future__ import annotations

import pytest

from solvers.replay import replay
from solvers.schedule import Schedule
from solvers.strategies import STRATEGIES, StrategyError, apply_strategy, schedule_for_segments
from solvers.strategies.uniform_segments import (
    megatron_block,
    megatron_uniform,
    per_layer,
    uniform_every,
    uniform_segments,
    uniform_sqrt,
)

from .strategy_graphs import layered, unit_chain


def test_uniform_sqrt_on_nine_layers() -> None:
    """Three segments: x2 and x5 are saved, f3, f4 and f0, f1 run again, the last segment stays."""
    graph = unit_chain(9)
    schedule = uniform_sqrt(graph)
    forward = (0, 1, 2, 3, 4, 5, 6, 7, 8)
    assert schedule.order == (*forward, 9, 10, 11, 12, 3, 4, 13, 14, 15, 0, 1, 16, 17)
    outcome = replay(graph, schedule)
    assert outcome.cost_ns == 18 + 4
    assert outcome.peak_bytes == 6  # under b8: x2, x5, x6, x7, x8 and its gradient
    assert replay(graph, Schedule.keep_all(graph)).peak_bytes == 10


def test_the_last_of_uneven_segments_takes_what_is_left() -> None:
    """Ten layers in three segments: 3, 3 and 4, as checkpoint_sequential cuts them."""
    graph = unit_chain(10)
    assert uniform_segments(graph, 3).recomputed() == {0: 1, 1: 1, 3: 1, 4: 1}


def test_uniform_every_k() -> None:
    """One block a segment saves every boundary, all blocks in one segment save everything."""
    graph = unit_chain(9)
    assert uniform_every(graph, 3) == uniform_sqrt(graph)
    assert uniform_every(graph, 1) == Schedule.keep_all(graph)
    assert uniform_every(graph, 9) == Schedule.keep_all(graph)
    assert uniform_every(graph, 4).recomputed() == dict.fromkeys((0, 1, 2, 4, 5, 6), 1)


def test_per_layer_recomputes_every_layer_and_stops_early() -> None:
    """Inputs h0, h1 are saved; a_i runs again for u_i, c_i does not: its output is not read."""
    graph = layered(3)
    schedule = per_layer(graph)
    assert schedule.order == (0, 1, 2, 3, 4, 5, 6, 4, 7, 8, 2, 9, 10, 0, 11, 12)
    outcome = replay(graph, schedule)
    assert outcome.cost_ns == 13 + 3
    assert outcome.peak_bytes == 5  # under bc2: h0, h1, u2, the loss's gradient and bc2's
    assert replay(graph, Schedule.keep_all(graph)).peak_bytes == 7


def test_per_layer_without_early_stop_runs_whole_layers() -> None:
    """c_i runs again, too, and its output dies at once."""
    graph = layered(3)
    schedule = per_layer(graph, early_stop=False)
    assert schedule.order == (0, 1, 2, 3, 4, 5, 6, 4, 5, 7, 8, 2, 3, 9, 10, 0, 1, 11, 12)
    outcome = replay(graph, schedule)
    assert outcome.cost_ns == 13 + 6
    assert outcome.memory_bytes[8] == 5  # h0, h1, the gradient, u2 and the second h2


def test_megatron_uniform_groups_layers() -> None:
    """Groups of two: only h1 is saved; layers 0 and 1 run again together, to their end."""
    graph = layered(3)
    schedule = megatron_uniform(graph, 2)
    assert schedule.order == (0, 1, 2, 3, 4, 5, 6, 4, 5, 7, 8, 0, 1, 2, 3, 9, 10, 11, 12)
    outcome = replay(graph, schedule)
    assert outcome.cost_ns == 13 + 6
    assert outcome.peak_bytes == 5  # under bc1: u0, h0, u1, two gradients


def test_megatron_block_recomputes_the_first_layers() -> None:
    """With n = 1 layer 0 runs again, layers 1 and 2 stay."""
    graph = layered(3)
    schedule = megatron_block(graph, 1)
    assert schedule.order == (*range(11), 0, 1, 11, 12)
    outcome = replay(graph, schedule)
    assert outcome.cost_ns == 13 + 2
    assert outcome.peak_bytes == 6  # at the loss: h0, u1, h1, u2, h2 and the gradient
    assert megatron_block(graph, 0) == Schedule.keep_all(graph)
    assert megatron_block(graph, 3) == per_layer(graph, early_stop=False)


def test_the_cheapest_setting_that_fits_is_taken() -> None:
    """At 6 bytes one recomputed layer suffices; at 5 all three are needed; 3 is out of reach."""
    block = STRATEGIES["megatron_full_block"]
    graph = layered(3)
    assert apply_strategy(block, graph, budget_bytes=6).setting == "n=1"
    outcome = apply_strategy(block, graph, budget_bytes=5)
    assert (outcome.setting, outcome.peak_bytes, outcome.fits) == ("n=2", 5, True)
    assert not apply_strategy(block, graph, budget_bytes=3).fits
    assert apply_strategy(block, graph).setting == "n=3"


def test_saved_storages_inside_a_segment_are_not_made_again() -> None:
    """With u0 saved (selective checkpointing) the segment of layer 0 has nothing to recompute."""
    graph = layered(3)
    segments = [range(2), range(2, 4), range(4, 6)]
    schedule = schedule_for_segments(graph, segments, saved=[0])
    assert schedule.recomputed() == {4: 1, 2: 1}


def test_segments_must_be_forward_and_apart() -> None:
    """Overlaps and backward operators are refused with their numbers."""
    graph = layered(3)
    with pytest.raises(StrategyError, match="operator 1 is in segments 0 and 1"):
        schedule_for_segments(graph, [range(2), range(1, 4)])
    with pytest.raises(StrategyError, match="operator 7; forward ones end at 7"):
        schedule_for_segments(graph, [[7]])
    with pytest.raises(StrategyError, match="5 layers of 3"):
        megatron_block(graph, 5)
