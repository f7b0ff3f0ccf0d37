"""Uniform segmentation: the sqrt(L) strategy on an operator graph.

Algorithm of Chen et al., *Training Deep Nets with Sublinear Memory Cost*
(arXiv:1604.06174), Section 4: cut the forward pass into segments, keep what
crosses a cut, and recompute each segment when the backward pass reaches it;
with L layers of equal size, sqrt(L) segments need O(sqrt(L)) memory for one
more forward pass. The last segment is needed at once and is kept.

A cut is placed near its even share of the activations' bytes, where the fewest bytes
cross. Guarantee: none beyond what the replay says; on graphs that are not chains, more
than the cut's own storages may have to stay.
"""

from __future__ import annotations

import math

import numpy as np

from graph_capture.cost_graph import CostGraph

from .arrays import GraphArrays, IntArray, graph_arrays
from .checked import checked_budget
from .fast_replay import fast_replay
from .replay import replay
from .retention_plan import (
    Gaps,
    RetentionPlan,
    find_gaps,
    keep_all_plan,
    schedule_from_plan,
)
from .schedule import Schedule


def uniform(graph: CostGraph, num_segments: int | None = None) -> Schedule | None:
    """Return the schedule of the uniform strategy; ``None`` when recomputation explodes.

    Parameters
    ----------
    num_segments
        By default the square root of the number of forward operators.
    """
    g = graph_arrays(graph)
    gaps = find_gaps(g)
    turn = turning_point(graph)
    if num_segments is None:
        num_segments = max(1, round(math.sqrt(turn)))
    return schedule_from_plan(g, gaps, segment_plan(g, gaps, turn, num_segments))


def uniform_under_budget(graph: CostGraph, budget_bytes: int) -> Schedule | None:
    """Return the cheapest uniform schedule that fits, over all numbers of segments."""
    budget_bytes = checked_budget(budget_bytes)
    g = graph_arrays(graph)
    gaps = find_gaps(g)
    turn = turning_point(graph)
    best: Schedule | None = None
    best_cost = 0
    for num_segments in segment_counts(turn):
        schedule = schedule_from_plan(g, gaps, segment_plan(g, gaps, turn, num_segments))
        if schedule is None:
            continue
        outcome = fast_replay(g, np.array(schedule.order, dtype=np.int64))
        fits = outcome.valid and outcome.peak_bytes <= budget_bytes
        if fits and (best is None or outcome.cost_ns < best_cost):
            best, best_cost = schedule, outcome.cost_ns
    return best


def segment_counts(turn: int) -> tuple[int, ...]:
    """Return the numbers of segments worth trying: 1, 2, 3, … and then some 20 % apart."""
    counts = [1]
    while counts[-1] < turn // 2:
        counts.append(max(counts[-1] + 1, round(1.2 * counts[-1])))
    return tuple(counts)


def turning_point(graph: CostGraph) -> int:
    """Return the index of the first operator after the forward pass.

    Where phases do not tell (all forward), the moment with the most memory when
    everything is kept.
    """
    forward = [v for v, op in enumerate(graph.operators) if op.phase in ("forward", "loss")]
    if len(forward) < graph.num_operators:
        return forward[-1] + 1 if forward else 0
    memory = replay(graph, Schedule.keep_all(graph)).memory_bytes
    return memory.index(max(memory)) if memory else 0


def segment_plan(g: GraphArrays, gaps: Gaps, turn: int, num_segments: int) -> RetentionPlan:
    """Keep what crosses a cut, and the last segment; retain the rest once it is recomputed."""
    cuts = cut_positions(g, turn, num_segments)
    plan = keep_all_plan(gaps)
    begins = np.flatnonzero(gaps.begin < turn)
    if len(cuts) == 0 or len(begins) == 0:
        return plan
    # For each storage that has one, the last gap that begins in the forward pass.
    last = begins[np.append(gaps.storage[begins][1:] != gaps.storage[begins][:-1], True)]
    made = g.producer[gaps.storage[last]]
    before = np.searchsorted(cuts, made, side="right")
    crosses = np.searchsorted(cuts, gaps.begin[last], side="right") > before
    dropped = last[~crosses & (made < cuts[-1])]
    plan.until[dropped] = gaps.begin[dropped]
    plan.since[dropped] = gaps.begin[dropped] + 1
    return plan


def cut_positions(g: GraphArrays, turn: int, num_segments: int) -> IntArray:
    """Return the first operators of all segments but the first.

    Each cut lies within a third of a segment of its even share of the bytes,
    where the fewest bytes are both made before it and read in the forward
    pass at or after it.
    """
    if turn < 2 or num_segments < 2:
        return np.zeros(0, dtype=np.int64)
    crossing = np.zeros(turn + 1, dtype=np.int64)
    made = np.zeros(turn, dtype=np.int64)
    storage_of_use = np.repeat(np.arange(g.num_storages), np.diff(g.pos_ptr))
    forward = g.pos_idx < turn
    first = np.full(g.num_storages, turn, dtype=np.int64)
    last = np.full(g.num_storages, -1, dtype=np.int64)
    np.minimum.at(first, storage_of_use[forward], g.pos_idx[forward])
    np.maximum.at(last, storage_of_use[forward], g.pos_idx[forward])
    ks = np.flatnonzero(last >= 0)
    later = np.zeros(g.num_storages, dtype=bool)
    later[storage_of_use[~forward]] = True
    np.add.at(made, first[ks[later[ks]]], g.size[ks[later[ks]]])
    np.add.at(crossing, first[ks] + 1, g.size[ks])
    np.add.at(crossing, last[ks] + 1, -g.size[ks])
    crossing = np.cumsum(crossing)  # crossing[x]: made before x and read at x or later
    filled = np.cumsum(made)
    cuts: list[int] = []
    for i in range(1, num_segments):
        share = filled[-1] * i / num_segments
        slack = filled[-1] / (3 * num_segments)
        low = int(np.searchsorted(filled, share - slack)) + 1
        high = max(int(np.searchsorted(filled, share + slack)) + 1, low + 1)
        low, high = min(low, turn - 1), min(high, turn)
        window = np.arange(low, high)
        fewest = window[crossing[window] == crossing[window].min()]
        off = np.abs(filled[fewest - 1] - share)  # among ties, the nearest to its share
        cuts.append(int(fewest[np.argmin(off)]))
    return np.unique(np.array(cuts, dtype=np.int64))
