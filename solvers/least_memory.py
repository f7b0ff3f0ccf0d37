"""Find the least memory that any schedule needs, and so the lowest budget.

Search: the plan of the lowest uniform segmentation is annealed repeatedly, each time
against a budget a little below its own peak. Where that gets stuck, annealing tries
every other start, and then smaller steps. Cost does not matter. Bound: while operator v
first runs, its inputs, outputs and workspace are there, and so is everything that
cannot be made again and is still needed: kept storages, and outputs of pinned operators
that a later operator reads. Where the search stays above that, ``backward_search.py``
raises the bound, and may find the least memory itself, in a slow schedule. Both figures
hold for schedules whose first runs keep the base order; the least memory lies between
them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from graph_capture.cost_graph import CostGraph

from .arrays import GraphArrays, IntArray, graph_arrays
from .backward_search import compile_backward_search, least_memory_bound
from .local_search import NOTHING, Walk, compile_annealing, local_search
from .replay import replay
from .retention_plan import (
    Gaps,
    RetentionPlan,
    find_gaps,
    keep_all_plan,
    plan_from_schedule,
    schedule_from_plan,
)
from .schedule import Schedule
from .uniform import segment_counts, segment_plan, turning_point

MOVES_PER_TRY = 15_000
SMALLEST_STEP = 0.002
SEARCH_SHARE = 0.7
"""Of the time, what annealing may take; the rest is the proof's, but no more than this:"""

PROOF_S = 2.0

MOST_RUNS = 16
"""Times the operators: a schedule of more runs is of no use, as in ``schedule_from_plan``."""


@dataclass(frozen=True, slots=True)
class LeastMemory:
    """The lowest peak found, and a proven lower bound on every peak.

    Parameters
    ----------
    schedule
        Its replay has the peak ``peak_bytes``.
    lower_bound_bytes
        No schedule whose first runs keep the base order has a lower peak.
    holding
        The operators that determine it: those whose own need is the bound, when the
        search reached the bound; otherwise those that run at the schedule's peak.
    """

    schedule: Schedule
    peak_bytes: int
    lower_bound_bytes: int
    holding: tuple[int, ...]


def least_memory(
    graph: CostGraph,
    *,
    time_limit_s: float = 10.0,
    seed: int = 0,
    start: Schedule | None = None,
) -> LeastMemory:
    """Search for the schedule with the lowest peak.

    Parameters
    ----------
    start
        A schedule to start from where it is lower than every uniform segmentation; its
        first runs keep the base order.

    Raises
    ------
    ValueError
        When the graph has no operators.
    """
    if graph.num_operators == 0:
        raise ValueError("a graph without operators needs no schedule")
    g = graph_arrays(graph)
    gaps = find_gaps(g)
    compile_annealing(g, gaps)
    compile_backward_search(g)
    begin_s = time.monotonic()
    need = needs_bytes(g)
    most_needed = bound = int(need.max())
    plan, peak = _lowest_segmentation(graph, g, gaps)
    if start is not None:
        from_start = plan_from_schedule(graph, gaps, start)
        again = schedule_from_plan(g, gaps, from_start)
        if again is not None and replay(graph, again).peak_bytes < peak:
            plan, peak = from_start, replay(graph, again).peak_bytes
    search_until_s = begin_s + SEARCH_SHARE * time_limit_s
    plan, peak = _descend(graph, g, gaps, plan, peak, bound, search_until_s, seed)
    schedule = schedule_from_plan(g, gaps, plan)
    if schedule is None:
        raise RuntimeError("the best plan cannot be expanded")
    if peak > bound:
        proof = least_memory_bound(
            graph,
            peak_bytes=peak,
            lower_bound_bytes=bound,
            time_limit_s=min(PROOF_S, begin_s + time_limit_s - time.monotonic()),
        )
        bound = proof.lower_bound_bytes
        found = proof.schedule
        if found is not None and len(found.order) <= MOST_RUNS * graph.num_operators:
            schedule = found
    outcome = replay(graph, schedule)
    if outcome.peak_bytes <= most_needed:
        holding = np.flatnonzero(need == most_needed)
    else:
        at_peak = np.flatnonzero(np.array(outcome.memory_bytes) == outcome.peak_bytes)
        holding = np.unique(np.array(schedule.order)[at_peak])
    return LeastMemory(schedule, outcome.peak_bytes, bound, tuple(int(v) for v in holding))


def needs_bytes(g: GraphArrays) -> IntArray:
    """Return, for each operator, the bytes that every schedule holds while it first runs."""
    n = g.num_operators
    forced = np.zeros(n + 1, dtype=np.int64)
    need = np.full(n, g.resident_bytes, dtype=np.int64) + g.workspace
    for k in range(g.num_storages):
        uses = g.positions(k)
        if len(uses) == 0:
            continue
        if g.kept[k]:
            forced[uses[0]] += g.size[k]
        elif g.pinned[uses[0]]:
            forced[uses[0]] += g.size[k]
            forced[uses[-1] + 1] -= g.size[k]
        else:
            need[uses] += g.size[k]
    return need + np.cumsum(forced)[:n]


def _lowest_segmentation(graph: CostGraph, g: GraphArrays, gaps: Gaps) -> tuple[RetentionPlan, int]:
    turn = turning_point(graph)
    plans = [keep_all_plan(gaps)]
    plans += [segment_plan(g, gaps, turn, count) for count in segment_counts(turn)[1:]]
    scored = []
    for i, plan in enumerate(plans):
        schedule = schedule_from_plan(g, gaps, plan)
        if schedule is not None and len(schedule.order) <= 6 * g.num_operators:
            scored.append((replay(graph, schedule).peak_bytes, i))
    peak, i = min(scored)
    return plans[i], peak


def _descend(
    graph: CostGraph,
    g: GraphArrays,
    gaps: Gaps,
    plan: RetentionPlan,
    peak: int,
    bound: int,
    deadline_s: float,
    seed: int,
) -> tuple[RetentionPlan, int]:
    """Lower the budget below the peak as long as annealing can follow."""
    step = 0.08
    tries = 0
    while step >= SMALLEST_STEP and peak > bound and time.monotonic() < deadline_s:
        budget = max(bound, int(peak * (1 - step)))
        walk = Walk(g, gaps, budget, plan, seed + 104_729 * tries)
        tries += 1
        walk.run(MOVES_PER_TRY, deadline_s, first_fit=True)
        if walk.best_cost < NOTHING:
            plan = RetentionPlan(walk.best_until.copy(), walk.best_since.copy())
            peak = walk.best_peak()
            continue
        elsewhere = local_search(  # try every start where the walk from here is stuck
            graph,
            budget,
            time_limit_s=max(0.0, deadline_s - time.monotonic()),
            num_moves=4 * MOVES_PER_TRY,
            seed=seed + 104_729 * tries,
        )
        if elsewhere.schedule is not None:
            plan = plan_from_schedule(graph, gaps, elsewhere.schedule)
            peak = replay(graph, elsewhere.schedule).peak_bytes
        else:
            step /= 2
    return plan, peak
