"""Improve the best schedule with stretches taken from others.

A solution of a relaxation is cheap and does not fit; an incumbent fits and is
expensive. The relaxation is right in most places, and only a few make it too large. So
take the gaps (``retention_plan.py``) in which the two differ, give those of one stretch
of the base order the other's values, and stay there if that is no worse. ResNet-50 near
its least peak: from an incumbent of 33.2 % and a dozen solutions that do not fit, 28.1
% in 0.2 s; annealing those solutions had found nothing, and auto needed a minute for
28.2 %.

Path relinking: Glover, *Tabu Search and Adaptive Memory Programming* (Interfaces in
Computer Science and Operations Research, 1997). Guarantee: none; every schedule that is
returned passes the replay.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
from numba import njit

from graph_capture.cost_graph import CostGraph

from .arrays import graph_arrays
from .local_search import evaluate
from .replay import replay
from .retention_plan import (
    RetentionPlan,
    find_gaps,
    plan_from_schedule,
    schedule_from_plan,
)
from .schedule import Schedule

TRIES_PER_CHUNK = 50
WIDEST = 0.25
"""Share of the base order that is the widest stretch to be taken over at once."""


class Pool:
    """Schedules whose pieces are worth combining; they may exceed the budget.

    Parameters
    ----------
    most
        Number of schedules to keep; the oldest are dropped first.
    """

    def __init__(self, graph: CostGraph, budget_bytes: int, *, most: int) -> None:
        self.graph, self.budget_bytes, self.most = graph, budget_bytes, most
        self._g = graph_arrays(graph)
        self._gaps = find_gaps(self._g)
        self._plans: dict[Schedule, RetentionPlan] = {}

    def __iter__(self) -> Iterator[Schedule]:
        """Iterate from the oldest to the newest."""
        return iter(self._plans)

    def add(self, schedule: Schedule) -> None:
        """Keep ``schedule`` as the newest one."""
        known = self._plans.pop(schedule, None)
        self._plans[schedule] = known or plan_from_schedule(self.graph, self._gaps, schedule)
        if len(self._plans) > self.most:
            del self._plans[next(iter(self._plans))]

    def relink(
        self,
        start: Schedule,
        *,
        num_tries: int,
        time_limit_s: float,
        seed: int = 0,
        stop: threading.Event | None = None,
    ) -> Schedule | None:
        """Return ``start`` with stretches of the others, or ``start`` where none helps.

        Parameters
        ----------
        start
            Where it exceeds the budget, reducing the excess comes before reducing the
            time, and ``None`` is returned if nothing fits. It is added to the pool.
        stop
            Ends the search when another thread sets it.
        """
        self.add(start)
        plan = self._plans[start].copy()
        until = np.stack([other.until for other in self._plans.values()])
        since = np.stack([other.since for other in self._plans.values()])

        def relinked(num: int, seed: int) -> float:
            g, gaps = self._g, self._gaps
            return _relink(
                g, gaps, plan.until, plan.since, until, since, self.budget_bytes, num, seed
            )

        excess = relinked(0, seed)  # compiled by now, so that the clock does not count it
        deadline_s = time.monotonic() + time_limit_s
        for made in range(0, num_tries, TRIES_PER_CHUNK):
            excess = relinked(min(TRIES_PER_CHUNK, num_tries - made), seed + made)
            if time.monotonic() >= deadline_s or (stop is not None and stop.is_set()):
                break
        linked = schedule_from_plan(self._g, self._gaps, plan) if excess == 0.0 else None
        # The search began at the plan of ``start``, which may be more expensive or larger than
        # ``start``.
        before = replay(self.graph, start)
        if before.peak_bytes > self.budget_bytes:
            return linked
        if linked is None or replay(self.graph, linked).cost_ns >= before.cost_ns:
            return start
        return linked


@njit(cache=True, nogil=True)
def _relink(  # type: ignore[no-untyped-def]
    g, gaps, until, since, other_until, other_since, budget, num_tries, seed
):
    """Excess after ``num_tries``, as ``evaluate`` has it; ``until``, ``since`` change in place."""
    np.random.seed(seed)
    num_ops = g.cost.size
    num_gaps = gaps.begin.size
    order = np.empty(6 * num_ops + 16, np.int64)
    memory = np.empty(order.size + 1, np.int64)
    length, cost, excess, _ = evaluate(g, gaps, until, since, budget, order, memory)
    if length < 0:
        return np.inf
    taken = np.empty(num_gaps, np.int64)
    old_until = np.empty(num_gaps, np.int64)
    old_since = np.empty(num_gaps, np.int64)
    widest = max(2.0, WIDEST * num_ops)
    for _ in range(num_tries):
        other = np.random.randint(other_until.shape[0])
        num = 0
        for h in range(num_gaps):
            if gaps.fixed[h] or g.size[gaps.storage[h]] == 0:
                continue
            if until[h] != other_until[other, h] or since[h] != other_since[other, h]:
                taken[num] = h
                num += 1
        if num == 0:
            continue
        # Of the gaps that differ, those that begin (or end) near one of them; all or some.
        centre = taken[np.random.randint(num)]
        width = widest ** np.random.random()
        side = gaps.begin if np.random.random() < 0.5 else gaps.end
        share = 1.0 if np.random.random() < 0.5 else np.random.random()
        num_near = 0
        for i in range(num):
            h = taken[i]
            near = abs(side[h] - side[centre]) <= width and np.random.random() < share
            if near or h == centre:
                taken[num_near] = h
                old_until[num_near] = until[h]
                old_since[num_near] = since[h]
                until[h] = other_until[other, h]
                since[h] = other_since[other, h]
                num_near += 1
        new_length, new_cost, new_excess, _ = evaluate(g, gaps, until, since, budget, order, memory)
        if new_length >= 0 and (new_excess, new_cost) <= (excess, cost):
            cost, excess = new_cost, new_excess
            continue
        for i in range(num_near):
            until[taken[i]] = old_until[i]
            since[taken[i]] = old_since[i]
    return excess
