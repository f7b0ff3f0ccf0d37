"""Carry a schedule over to the same step at other sizes, without solving.

A training loop whose batches change length runs the same operators at other sizes. The
schedule that was solved for the largest of them is a schedule of each; at a smaller
size it recomputes more than the budget asks for, so it then retains again what fits.

Where the operators differ a little (another attention kernel, a mask that is left out),
the two steps are aligned by phase, module and operator, and what the schedule drops is
dropped between the operators that correspond.
"""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np

from graph_capture.cost_graph import CostGraph

from .arrays import GraphArrays, IntArray, graph_arrays
from .fast_replay import fast_replay
from .replay import InvalidScheduleError, replay
from .retention_plan import (
    Gaps,
    RetentionPlan,
    fill_order,
    find_gaps,
    plan_from_schedule,
)
from .schedule import Schedule

TRANSFER = "transfer"
KEEP_ALL = "keep_all"
NAMES = (KEEP_ALL, TRANSFER)
"""What a plan names as its solver when its schedule was not searched for."""

MOST_RUNS = 2 * 10**7
"""Runs written down while storages are retained again, about a second's worth: a training
loop waits for it."""


class _Step(NamedTuple):
    """A graph, and what its retention plans are made of."""

    graph: CostGraph
    arrays: GraphArrays
    gaps: Gaps

    @classmethod
    def of(cls, graph: CostGraph) -> _Step:
        arrays = graph_arrays(graph)
        return cls(graph, arrays, find_gaps(arrays))


def transfer(
    planned: CostGraph, schedule: Schedule, graph: CostGraph, budget_bytes: int
) -> Schedule | None:
    """Make a schedule of ``graph`` from one of a similar step.

    Parameters
    ----------
    planned, schedule
        The step that was solved, and its schedule.
    graph
        The step at other sizes.
    budget_bytes
        No schedule that peaks higher is returned.

    Returns
    -------
    Schedule or None
        The one that repeats nothing where that fits; ``None`` where the transferred one
        does not fit.
    """
    keep_all = Schedule.keep_all(graph)
    if replay(graph, keep_all).peak_bytes <= budget_bytes:
        return keep_all
    in_base_order = list(dict.fromkeys(schedule.order)) == list(range(planned.num_operators))
    candidates = [schedule] if has_same_wiring(planned, graph) else []
    if in_base_order:
        old, new = _Step.of(planned), _Step.of(graph)
        dropped = plan_from_schedule(planned, old.gaps, schedule)
        if not candidates:
            dropped = _aligned(old, dropped, new)
        found = _retained_where_it_fits(new, dropped, budget_bytes)
        if found is not None:
            candidates.append(found)
    fitting: list[tuple[int, int, Schedule]] = []
    for candidate in candidates:
        try:
            outcome = replay(graph, candidate)
        except InvalidScheduleError:
            continue
        if outcome.peak_bytes <= budget_bytes:
            fitting.append((outcome.cost_ns, len(fitting), candidate))
    return min(fitting)[2] if fitting else None


def has_same_wiring(one: CostGraph, other: CostGraph) -> bool:
    """Whether two graphs differ at most in sizes, costs and names."""
    return _wiring(one) == _wiring(other)


def _wiring(graph: CostGraph) -> tuple[object, object]:
    return (
        [
            (
                op.target,
                op.inputs,
                op.outputs,
                op.phase,
                op.pinned,
                op.ordered,
                tuple((old, new) for old, new, _ in op.rewrites),
            )
            for op in graph.operators
        ],
        [(s.producer, s.kept) for s in graph.storages],
    )


# -- other operators ------------------------------------------------------------------


def _aligned(old: _Step, dropped: RetentionPlan, new: _Step) -> RetentionPlan:
    """Drop in one step what is dropped between the corresponding operators of another."""
    there, here = _corresponding(old.graph, new.graph)
    plan = RetentionPlan(new.gaps.end.copy(), new.gaps.end.copy())
    for k, storage in enumerate(new.graph.storages):
        if storage.producer is None or storage.producer not in there:
            continue
        operator = old.graph.operators[there[storage.producer]]
        place = new.graph.operators[storage.producer].outputs.index(k)
        if place >= len(operator.outputs):
            continue
        before = _longest_gaps(old, operator.outputs[place])
        after = _longest_gaps(new, k)
        for was, now in zip(before, after, strict=False):
            if dropped.until[was] >= old.gaps.end[was]:
                continue
            begin, end = int(new.gaps.begin[now]), int(new.gaps.end[now])
            until = here.get(int(dropped.until[was]), begin)
            plan.until[now] = min(max(until, begin), end)
            plan.since[now] = max(here.get(int(dropped.since[was]), end), begin + 1)
    return plan


def _corresponding(old: CostGraph, new: CostGraph) -> tuple[dict[int, int], dict[int, int]]:
    """Operators that are the same in both, from new to old and from old to new."""

    def keys(graph: CostGraph) -> list[tuple[str, str, str]]:
        return [(op.phase, op.module_path, op.target) for op in graph.operators]

    blocks = SequenceMatcher(None, keys(old), keys(new), autojunk=False).get_matching_blocks()
    pairs = [(block.a + i, block.b + i) for block in blocks for i in range(block.size)]
    return {b: a for a, b in pairs}, dict(pairs)


def _longest_gaps(step: _Step, k: int) -> list[int]:
    """The gaps of a storage, those over the most operators first."""
    gaps = step.gaps
    mine = range(int(gaps.ptr[k]), int(gaps.ptr[k + 1]))
    return sorted(mine, key=lambda h: int(gaps.begin[h] - gaps.end[h]))


# -- smaller sizes --------------------------------------------------------------------


def _retained_where_it_fits(step: _Step, plan: RetentionPlan, budget_bytes: int) -> Schedule | None:
    """Retain again what fits, the costliest to recompute by its bytes first."""
    plan = plan.copy()
    best = _expanded(step, plan)
    if best is None or best[1] > budget_bytes:
        return None
    order, _, cost_ns = best
    num_runs = 0
    for h in _by_cost_per_byte(step, plan):
        if num_runs > MOST_RUNS:
            break
        num_runs += len(order)
        before = plan.until[h], plan.since[h]
        plan.until[h] = plan.since[h] = step.gaps.end[h]
        found = _expanded(step, plan)
        if found is not None and found[1] <= budget_bytes and found[2] <= cost_ns:
            order, _, cost_ns = found
        else:
            plan.until[h], plan.since[h] = before
    return Schedule(tuple(map(int, order)))


def _by_cost_per_byte(step: _Step, plan: RetentionPlan) -> list[int]:
    g, gaps = step.arrays, step.gaps
    dropped = np.flatnonzero((plan.until < gaps.end) & (gaps.fixed == 0))
    storage = gaps.storage[dropped]
    worth = g.cost[g.producer[storage]] / np.maximum(g.size[storage], 1)
    return [int(h) for h in dropped[np.argsort(-worth, kind="stable")]]


def _expanded(step: _Step, plan: RetentionPlan) -> tuple[IntArray, int, int] | None:
    """Runs, peak in bytes and time in nanoseconds; ``None`` where it runs far too often."""
    g = step.arrays
    order = np.empty(16 * g.num_operators + 16, dtype=np.int64)
    length = fill_order(g, step.gaps, plan.until, plan.since, order)
    if length < 0:
        return None
    outcome = fast_replay(g, order[:length])
    return (order[:length], outcome.peak_bytes, outcome.cost_ns) if outcome.valid else None


__all__ = ["KEEP_ALL", "NAMES", "TRANSFER", "has_same_wiring", "transfer"]
