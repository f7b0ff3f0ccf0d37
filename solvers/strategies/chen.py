"""Chen's greedy plan: a segment ends where what it holds exceeds a budget of its own.

Chen et al., *Training Deep Nets with Sublinear Memory Cost* (arXiv:1604.06174),
Algorithm 3: walk the forward pass, add up the sizes of outputs, and at the first
candidate where the sum exceeds ``b`` save that candidate's output and begin anew.
Candidates are the last operators of the blocks. The search over ``b`` is that of
Appendix A: a first plan with ``b = 0``, then a grid of six around ``sqrt(x y)``
from ``sqrt(x y) / sqrt(2)`` to ``sqrt(2) sqrt(x y)``, where ``x`` is the first
plan's sum of saved sizes and ``y`` its largest segment.

What is not saved is recomputed lazily (``saved.py``), which is the paper's
Algorithm 2 with a mirror count of one: so is the last segment.

For a budget all plans that Algorithm 3 can give are tried, where they are few enough.
The memonger that came with the paper searches differently: ``b`` is estimated anew
three times from the previous plan, and six values follow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

from graph_capture.cost_graph import CostGraph

from ..replay import replay
from ..schedule import Schedule
from ..uniform import turning_point
from .blocks import find_blocks
from .saved import schedule_for_saved
from .strategy import Candidate, Strategy, StrategyOptions

GRID = 6
MOST_PLANS, LEAST_PLANS = 300, 40
"""How many plans are tried for a budget, beside the paper's, on small and on large graphs."""

EFFORT_RUNS = 300_000
"""Operators times plans beyond which fewer plans are tried: some seconds of replays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyPlan:
    """The result of Algorithm 3.

    Parameters
    ----------
    saved
        Operators whose outputs are saved: the last of each segment.
    saved_bytes
        x: the sizes of these outputs.
    segment_bytes
        y: the largest sum of output sizes in a segment that ended.
    least_segment_bytes
        The smallest such sum, and so the least ``b`` that gives another plan.
    """

    saved: tuple[int, ...]
    saved_bytes: int
    segment_bytes: int
    least_segment_bytes: int


def greedy_plan(graph: CostGraph, candidates: Iterable[int], b_bytes: float) -> GreedyPlan:
    """Run Algorithm 3 with the budget ``b_bytes`` per segment."""
    return _plan(_sums(graph, candidates), b_bytes)


def _sums(graph: CostGraph, candidates: Iterable[int]) -> list[tuple[int, int, int]]:
    """Each forward candidate, the bytes of its outputs, and those of all up to it."""
    may_end = set(candidates)
    sizes = [_output_bytes(graph, v) for v in range(turning_point(graph))]
    return [
        (v, sizes[v], total_bytes)
        for v, total_bytes in enumerate(accumulate(sizes))
        if v in may_end
    ]


def _plan(sums: Sequence[tuple[int, int, int]], b_bytes: float) -> GreedyPlan:
    saved: list[int] = []
    segments: list[int] = []
    begin_bytes = saved_bytes = 0
    for v, size_bytes, total_bytes in sums:
        held_bytes = total_bytes - begin_bytes
        if held_bytes > b_bytes:
            saved.append(v)
            saved_bytes += size_bytes
            segments.append(held_bytes)
            begin_bytes = total_bytes
    return GreedyPlan(
        saved=tuple(saved),
        saved_bytes=saved_bytes,
        segment_bytes=max(segments, default=0),
        least_segment_bytes=min(segments, default=0),
    )


def paper_grid(graph: CostGraph, candidates: Iterable[int]) -> list[float]:
    """Return the values of ``b`` of Appendix A, from small to large."""
    first = greedy_plan(graph, candidates, 0.0)
    middle = math.sqrt(first.saved_bytes * first.segment_bytes)
    low, high = middle / math.sqrt(2.0), middle * math.sqrt(2.0)
    return [low + (high - low) * i / (GRID - 1) for i in range(GRID)]


def chen_greedy(graph: CostGraph, b_bytes: float) -> Schedule:
    """Return the plan of Algorithm 3 over the model's blocks for one ``b``, in bytes."""
    plan = greedy_plan(graph, block_ends(graph), b_bytes)
    return schedule_for_saved(graph, operators=plan.saved)


def block_ends(graph: CostGraph) -> list[int]:
    """Return, for each block, the last operator that makes something."""
    ends = []
    for block in find_blocks(graph).blocks:
        makes = [v for v in range(block.begin, block.end) if graph.operators[v].outputs]
        ends += makes[-1:]
    return ends


def all_budgets(graph: CostGraph, may_end: Iterable[int]) -> Iterator[int]:
    """Return the least ``b`` of each plan that Algorithm 3 can give; the last plan saves
    nothing."""
    sums = _sums(graph, may_end)
    b_bytes = 0
    while (plan := _plan(sums, b_bytes)).saved:
        yield b_bytes
        b_bytes = plan.least_segment_bytes
    yield b_bytes


def schedule_for_ends(graph: CostGraph, ends: Sequence[int], *, keep_tail: bool) -> Schedule:
    """Save what ``ends``, in base order, make; with ``keep_tail`` also what follows the last.

    With ``keep_tail`` and no ends nothing is recomputed.
    """
    begin = ends[-1] + 1 if ends else 0
    tail = range(begin, turning_point(graph)) if keep_tail else ()
    return schedule_for_saved(graph, operators=(*ends, *tail))


def greedy_candidates(
    graph: CostGraph, may_end: Sequence[int], options: StrategyOptions, *, keep_tail: bool
) -> Iterator[Candidate]:
    """Yield the plan of the paper's grid with the lowest peak; with a budget, all others or
    many."""
    grid = paper_grid(graph, may_end)
    plans = {b: greedy_plan(graph, may_end, b).saved for b in grid}
    schedules = {
        saved: schedule_for_ends(graph, saved, keep_tail=keep_tail)
        for saved in dict.fromkeys(plans.values())
    }
    peaks = {saved: replay(graph, s).peak_bytes for saved, s in schedules.items()}
    best = min(grid, key=lambda b: peaks[plans[b]])
    yield Candidate(schedule=schedules[plans[best]], setting=f"b={best:.0f}")
    if options.budget_bytes is None:
        return
    tried = {plans[best]}
    sums = _sums(graph, may_end)
    wider = _wider(graph, may_end)
    # Coarsely first, for a caller that does not wait for all.
    for b in (*grid, *wider[::8], *wider):
        saved = _plan(sums, b).saved
        if saved not in tried:
            tried.add(saved)
            schedule = schedule_for_ends(graph, saved, keep_tail=keep_tail)
            yield Candidate(schedule=schedule, setting=f"b={b:.0f}")


def _wider(graph: CostGraph, may_end: Sequence[int]) -> Sequence[float]:
    """A ``b`` for each plan there is; where these are too many, values denser towards zero."""
    most = max(LEAST_PLANS, min(MOST_PLANS, EFFORT_RUNS // max(1, graph.num_operators)))
    found = list(islice(all_budgets(graph, may_end), most + 1))
    if len(found) <= most:
        return found
    total = sum(_output_bytes(graph, v) for v in range(turning_point(graph)))
    return [total * (i / most) ** 2 for i in range(most + 1)]


def _output_bytes(graph: CostGraph, v: int) -> int:
    return sum(graph.storages[k].size_bytes for k in graph.operators[v].outputs)


def _propose(graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
    yield from greedy_candidates(graph, block_ends(graph), options, keep_tail=False)


CHEN_GREEDY = Strategy(
    name="chen_greedy",
    summary="outputs of blocks saved where a segment exceeds b; the rest recomputed lazily",
    source="Chen et al., arXiv:1604.06174, Algorithm 3 and Appendix A",
    propose=_propose,
)
