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
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from graph_capture.cost_graph import CostGraph

from ..replay import replay
from ..schedule import Schedule
from ..uniform import turning_point
from .blocks import find_blocks
from .saved import schedule_for_saved
from .strategy import Candidate, Strategy, StrategyOptions

GRID = 6
NUM_BUDGETS = 40
"""Values of ``b`` that are tried for a budget, beside the paper's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyPlan:
    """What Algorithm 3 gives.

    Parameters
    ----------
    saved
        Operators whose outputs are saved: the last of each segment.
    saved_bytes
        x: the sizes of these outputs.
    segment_bytes
        y: the largest sum of output sizes in a segment that ended.
    """

    saved: tuple[int, ...]
    saved_bytes: int
    segment_bytes: int


def greedy_plan(graph: CostGraph, candidates: Iterable[int], b_bytes: float) -> GreedyPlan:
    """Algorithm 3 with the budget ``b_bytes`` of a segment."""
    may_end = set(candidates)
    saved: list[int] = []
    held = saved_bytes = segment_bytes = 0
    for v in range(turning_point(graph)):
        size = _output_bytes(graph, v)
        held += size
        if v in may_end and held > b_bytes:
            saved.append(v)
            saved_bytes += size
            segment_bytes = max(segment_bytes, held)
            held = 0
    return GreedyPlan(saved=tuple(saved), saved_bytes=saved_bytes, segment_bytes=segment_bytes)


def paper_grid(graph: CostGraph, candidates: Iterable[int]) -> list[float]:
    """The values of ``b`` of Appendix A, from small to large."""
    first = greedy_plan(graph, candidates, 0.0)
    middle = math.sqrt(first.saved_bytes * first.segment_bytes)
    low, high = middle / math.sqrt(2.0), middle * math.sqrt(2.0)
    return [low + (high - low) * i / (GRID - 1) for i in range(GRID)]


def chen_greedy(graph: CostGraph, b_bytes: float) -> Schedule:
    """The plan of Algorithm 3 over the model's blocks for one ``b``, in bytes."""
    plan = greedy_plan(graph, block_ends(graph), b_bytes)
    return schedule_for_saved(graph, operators=plan.saved)


def block_ends(graph: CostGraph) -> list[int]:
    """The last operator of each block that makes something."""
    ends = []
    for block in find_blocks(graph).blocks:
        makes = [v for v in range(block.begin, block.end) if graph.operators[v].outputs]
        ends += makes[-1:]
    return ends


def greedy_candidates(
    graph: CostGraph, may_end: Sequence[int], options: StrategyOptions
) -> Iterator[Candidate]:
    """First the plan of the paper's grid with the lowest peak; for a budget many more ``b``."""
    grid = paper_grid(graph, may_end)
    plans = {b: greedy_plan(graph, may_end, b).saved for b in grid}
    schedules = {saved: schedule_for_saved(graph, operators=saved) for saved in plans.values()}
    peaks = {saved: replay(graph, s).peak_bytes for saved, s in schedules.items()}
    best = min(grid, key=lambda b: peaks[plans[b]])
    yield Candidate(schedule=schedules[plans[best]], setting=f"b={best:.0f}")
    if options.budget_bytes is None:
        return
    total = sum(_output_bytes(graph, v) for v in range(turning_point(graph)))
    tried = {plans[best]}
    wider = [total * (i / NUM_BUDGETS) ** 2 for i in range(NUM_BUDGETS + 1)]
    for b in (*grid, *wider):
        saved = greedy_plan(graph, may_end, b).saved
        if saved not in tried:
            tried.add(saved)
            schedule = schedule_for_saved(graph, operators=saved)
            yield Candidate(schedule=schedule, setting=f"b={b:.0f}")


def _output_bytes(graph: CostGraph, v: int) -> int:
    return sum(graph.storages[k].size_bytes for k in graph.operators[v].outputs)


def _propose(graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
    yield from greedy_candidates(graph, block_ends(graph), options)


CHEN_GREEDY = Strategy(
    name="chen_greedy",
    summary="outputs of blocks saved where a segment exceeds b; the rest recomputed lazily",
    source="Chen et al., arXiv:1604.06174, Algorithm 3 and Appendix A",
    propose=_propose,
)
