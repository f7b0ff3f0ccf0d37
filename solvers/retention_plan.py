"""Turn "which storage is retained over which moments" into a schedule.

A retention plan says, for every gap of a storage, how long it stays. A *gap*
is the stretch between two consecutive uses of a storage in base order (its
production counts as a use); the last one is the *tail*, from the last use to
the end, where only recomputations can still read the storage. A gap that
begins at base position ``a`` and ends at ``b`` has two numbers:

- ``until[g]``: retained from ``a`` up to this position (``a``: dropped at
  once, ``b``: all along);
- ``since[g]``: a version that a recomputation makes at or after this position
  is retained up to ``b`` (``b``: never).

The schedule follows from that: walk the base order, and just before each operator
recompute what it is missing, and what that is missing, depth first. The replay frees
what is not read again, and what is not needed is never recomputed, so there are no dead
recomputations. Outputs of pinned operators and kept storages are always available.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from graph_capture.cost_graph import CostGraph

from .arrays import (
    ByteArray,
    GraphArrays,
    IntArray,
)
from .replay import replay
from .schedule import Schedule


class Gaps(NamedTuple):
    """The gaps of a graph. Those of storage ``k`` are ``ptr[k] … ptr[k + 1] - 1``."""

    ptr: IntArray
    storage: IntArray
    begin: IntArray
    end: IntArray
    fixed: ByteArray
    """Whether the storage is always at hand: kept, or made by a pinned operator."""

    @property
    def num(self) -> int:
        return len(self.begin)


class RetentionPlan(NamedTuple):
    """How long each gap's storage stays; see the module's docstring."""

    until: IntArray
    since: IntArray

    def copy(self) -> RetentionPlan:
        return RetentionPlan(self.until.copy(), self.since.copy())


def find_gaps(g: GraphArrays) -> Gaps:
    """Return all gaps, by storage and then by position. A tail ends at ``num_operators``."""
    num = g.num_operators
    ptr = np.zeros(g.num_storages + 1, dtype=np.int64)
    np.cumsum(np.diff(g.pos_ptr), out=ptr[1:])
    begin = g.pos_idx.copy()
    end = np.full(len(begin), num, dtype=np.int64)
    storage = np.repeat(np.arange(g.num_storages, dtype=np.int64), np.diff(ptr))
    inner = np.flatnonzero(storage[:-1] == storage[1:])
    end[inner] = begin[inner + 1]
    made_once = (g.kept[storage] > 0) | (g.pinned[g.producer[storage]] > 0)
    return Gaps(ptr, storage, begin, end, made_once.astype(np.uint8))


def keep_all_plan(gaps: Gaps) -> RetentionPlan:
    """Return the plan that drops nothing."""
    return RetentionPlan(gaps.end.copy(), gaps.end.copy())


def schedule_from_plan(g: GraphArrays, gaps: Gaps, plan: RetentionPlan) -> Schedule | None:
    """Return the schedule of ``plan``, or ``None`` if it has far too many runs to be useful.

    "Far too many" is 16 times the number of operators.
    """
    order = np.empty(16 * g.num_operators + 16, dtype=np.int64)
    length = fill_order(g, gaps, plan.until, plan.since, order)
    return None if length < 0 else Schedule(tuple(int(v) for v in order[:length]))


def base_fronts(schedule: Schedule) -> list[int]:
    """Return, for each run, the next base operator: itself, or the one it is recomputed for."""
    fronts: list[int] = []
    front = 0
    for v in schedule.order:
        fronts.append(front)
        front += v == front
    return fronts


def plan_from_schedule(graph: CostGraph, gaps: Gaps, schedule: Schedule) -> RetentionPlan:
    """Return the retention plan nearest to ``schedule``.

    Exact, except that versions which neither begin nor end a gap are lost: the
    expansion of the plan makes them again.
    """
    front_of = base_fronts(schedule)
    plan = RetentionPlan(gaps.begin.copy(), gaps.end.copy())
    versions: dict[int, list[tuple[int, int]]] = {}
    for k, born, last in replay(graph, schedule).live:
        versions.setdefault(k, []).append((front_of[born], front_of[last]))
    for h in range(gaps.num):
        begin, end = int(gaps.begin[h]), int(gaps.end[h])
        for born, last in versions.get(int(gaps.storage[h]), []):
            if born <= begin <= last:
                plan.until[h] = max(plan.until[h], min(last, end))
            elif begin < born < end and (
                last >= end or (end == graph.num_operators and last > born)
            ):
                plan.since[h] = min(plan.since[h], born)
    return plan


@njit(cache=True, nogil=True)
def fill_order(g, gaps, until, since, order):  # type: ignore[no-untyped-def]
    """Fill ``order`` and return the length used, or -1 when it does not suffice."""
    num_ops = g.cost.size
    num_storages = g.size.size
    gap = gaps.ptr[:-1].copy()  # current gap of each storage
    have_until = np.full(num_storages, -1, np.int64)  # last base position at which it is available
    stack_op = np.empty(num_ops + 1, np.int64)
    stack_next = np.empty(num_ops + 1, np.int64)
    length = 0
    for x in range(num_ops):
        top = 0
        stack_op[0] = x
        stack_next[0] = g.in_ptr[x]
        while top >= 0:
            v = stack_op[top]
            j = stack_next[top]
            if j < g.in_ptr[v + 1]:
                stack_next[top] = j + 1
                k = g.in_idx[j]
                if have_until[k] < x:
                    top += 1
                    stack_op[top] = g.producer[k]
                    stack_next[top] = g.in_ptr[g.producer[k]]
                continue
            top -= 1
            if length >= order.size:
                return -1
            order[length] = v
            length += 1
            if v == x:
                continue
            for j in range(g.out_ptr[v], g.out_ptr[v + 1]):
                k = g.out_idx[j]
                h = gap[k]
                have = x
                if x >= since[h]:
                    have = gaps.end[h]
                if until[h] > have:
                    have = until[h]
                if have > have_until[k]:
                    have_until[k] = have
        for j in range(g.in_ptr[x], g.in_ptr[x + 1]):
            k = g.in_idx[j]
            gap[k] += 1
            have_until[k] = gaps.end[gap[k]] if gaps.fixed[gap[k]] else until[gap[k]]
        for j in range(g.out_ptr[x], g.out_ptr[x + 1]):
            k = g.out_idx[j]
            have_until[k] = gaps.end[gap[k]] if gaps.fixed[gap[k]] else until[gap[k]]
    return length
