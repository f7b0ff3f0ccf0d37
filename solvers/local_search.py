"""Anneal retention plans on the compiled replay: incumbents within a second.

The state says how long each storage stays in each of its gaps (see
``retention_plan.py``); a move changes one gap, mostly one that covers a moment with too
much memory; the schedule and its memory follow by compiled expansion and replay. The
energy is the cost plus a price on the bytes above the budget, summed over all moments;
the price rises while the walk stays infeasible and falls while it does not, so that the
walk follows the border.

Annealing begins from the keep-all plan and from uniform segmentations, the
latter because at low budgets a plan that recomputes from recomputed values is
many moves away from keeping everything.

Kirkpatrick et al., *Optimization by Simulated Annealing* (Science, 1983).
Guarantee: none; every schedule that is returned passes the replay.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np
from numba import njit

from graph_capture.cost_graph import CostGraph

from .arrays import GraphArrays, graph_arrays
from .fast_replay import VALID, replay_order
from .retention_plan import (
    Gaps,
    RetentionPlan,
    fill_order,
    find_gaps,
    keep_all_plan,
    plan_from_schedule,
    schedule_from_plan,
)
from .schedule import Schedule
from .uniform import segment_counts, segment_plan, turning_point

MOVES_PER_CHUNK = 500
HEAT = 3e-3
COLD = 2e-6
"""Temperatures at the beginning and at the end, as shares of the step's cost."""

LATE = 0.05
"""How far the clock may run ahead of the moves before it sets the temperature.

Below that the clock has no say, and a search that it does not cut is reproducible.
"""

COOL = 2e-4
"""Temperature to begin with when the start is nearly good."""


@dataclass(frozen=True)
class SearchOutcome:
    """The best plan found within the budget; every field is ``None`` when none fits."""

    schedule: Schedule | None
    plan: RetentionPlan | None
    cost_ns: int | None
    num_moves: int


def local_search(
    graph: CostGraph,
    budget_bytes: int,
    *,
    time_limit_s: float = 2.0,
    num_moves: int = 40_000,
    seed: int = 0,
    start: Schedule | None = None,
    known: Schedule | None = None,
    heat: float = HEAT,
    stop: threading.Event | None = None,
) -> SearchOutcome:
    """Anneal until ``num_moves`` are spent or the time is up.

    Parameters
    ----------
    start
        Start only from here, instead of from the keep-all and segment plans.
    known
        Start from here instead of the best segment plan, where it is better.
    heat
        Initial temperature, as a share of the step's cost.
    stop
        Ends the search when another thread sets it.
    """
    g = graph_arrays(graph)
    gaps = find_gaps(g)
    compile_annealing(g, gaps)
    begin_s = time.monotonic()
    if start is not None:
        starts = [plan_from_schedule(graph, gaps, start)]
    else:
        starts = _starts(graph, g, gaps, budget_bytes, known)
    walks = [
        Walk(g, gaps, budget_bytes, plan, seed + 7919 * i, heat) for i, plan in enumerate(starts)
    ]
    share = max(MOVES_PER_CHUNK, num_moves // len(walks))
    spent = 0
    for i, walk in enumerate(walks):
        deadline_s = begin_s + time_limit_s * (i + 1) / len(walks)
        spent += walk.run(share, deadline_s, stop=stop)
    best = min(walks, key=lambda walk: walk.best_cost)
    if best.best_cost == NOTHING:
        return SearchOutcome(None, None, None, spent)
    plan = RetentionPlan(best.best_until, best.best_since)
    return SearchOutcome(schedule_from_plan(g, gaps, plan), plan, best.best_cost, spent)


def _starts(
    graph: CostGraph, g: GraphArrays, gaps: Gaps, budget_bytes: int, known: Schedule | None
) -> list[RetentionPlan]:
    """Keep-all, and the best of the segment plans and ``known`` at this budget."""
    turn = turning_point(graph)
    scored: list[tuple[int, int, RetentionPlan]] = []
    order = np.empty(16 * g.num_operators + 16, dtype=np.int64)
    memory = np.empty(len(order) + 1, dtype=np.int64)
    plans = [segment_plan(g, gaps, turn, count) for count in segment_counts(turn)[1:]]
    if known is not None:
        plans.append(plan_from_schedule(graph, gaps, known))
    for plan in plans:
        length = fill_order(g, gaps, plan.until, plan.since, order)
        if length < 0:
            continue
        status, peak, cost = replay_order(g, order, length, memory)
        if status == VALID:
            scored.append((max(0, peak - budget_bytes), cost, plan))
    scored.sort(key=lambda item: item[:2])
    return [keep_all_plan(gaps)] + [plan for _, _, plan in scored[:1]]


NOTHING = np.iinfo(np.int64).max


class Walk:
    """One resumable annealing walk."""

    def __init__(
        self,
        g: GraphArrays,
        gaps: Gaps,
        budget_bytes: int,
        start: RetentionPlan,
        seed: int,
        heat: float = HEAT,
    ) -> None:
        self.g, self.gaps, self.budget_bytes = g, gaps, budget_bytes
        self.until, self.since = start.until.copy(), start.since.copy()
        self.best_until, self.best_since = start.until.copy(), start.since.copy()
        self.best_cost: int = int(NOTHING)
        self.seed = seed
        self.heat = heat

    def best_peak(self) -> int:
        """The peak of the best plan, in bytes."""
        order = np.empty(6 * self.g.num_operators + 16, dtype=np.int64)
        memory = np.empty(len(order) + 1, dtype=np.int64)
        *_, peak = evaluate(
            self.g, self.gaps, self.best_until, self.best_since, self.budget_bytes, order, memory
        )
        return int(peak)

    def run(
        self,
        num_moves: int,
        deadline_s: float,
        *,
        first_fit: bool = False,
        stop: threading.Event | None = None,
    ) -> int:
        """Cool over ``num_moves`` moves or until ``deadline_s``; return the moves made.

        With ``first_fit``, stop as soon as a plan fits.
        """
        base_cost = max(1.0, float(self.g.cost.sum()))
        hot, cold = self.heat * base_cost, COLD * base_cost
        price = 0.02 * base_cost
        made = 0
        begin_s = time.monotonic()
        span_s = max(deadline_s - begin_s, 1e-3)
        while made < num_moves:
            now_s = time.monotonic()
            if now_s >= deadline_s or (stop is not None and stop.is_set()):
                break
            done, time_done = made / num_moves, (now_s - begin_s) / span_s
            if time_done > done + LATE:
                done = time_done
            heat = hot * (cold / hot) ** done
            price = self.anneal(MOVES_PER_CHUNK, heat, price, self.seed + made)
            made += MOVES_PER_CHUNK
            if first_fit and self.best_cost < NOTHING:
                break
        return made

    def anneal(self, num_moves: int, heat: float, price: float, seed: int) -> float:
        """Make moves at one temperature; return the price of a byte above the budget."""
        cost, price = _anneal(
            self.g,
            self.gaps,
            self.until,
            self.since,
            self.best_until,
            self.best_since,
            self.best_cost,
            self.budget_bytes,
            num_moves,
            heat,
            price,
            seed,
        )
        self.best_cost = int(cost)
        return float(price)


def compile_annealing(g: GraphArrays, gaps: Gaps) -> None:
    """Compile what walks run, once in a process: no clock is to count these seconds.

    Called before a clock starts. After an installation it takes some seconds, and then the tenths
    of a second in which numba reads what it kept.
    """
    if not _anneal.signatures:
        Walk(g, gaps, 0, keep_all_plan(gaps), 0).anneal(0, 1.0, 1.0, 0)


@njit(cache=True, nogil=True)
def evaluate(g, gaps, until, since, budget, order, memory):  # type: ignore[no-untyped-def]
    """``(length, cost, excess, worst)``: excess in budgets x moments; length -1 if invalid."""
    length = fill_order(g, gaps, until, since, order)
    if length < 0:
        return -1, 0, 0.0, 0
    status, peak, cost = replay_order(g, order, length, memory)
    if status != VALID:
        return -1, 0, 0.0, 0
    excess = 0.0
    for i in range(length):
        if memory[i] > budget:
            excess += memory[i] - budget
    return length, cost, excess / max(budget, 1), peak


@njit(cache=True, nogil=True)
def _anneal(  # type: ignore[no-untyped-def]
    g, gaps, until, since, best_until, best_since, best_cost, budget, num_moves, heat, price, seed
):
    """``num_moves`` at one temperature; ``(best_cost, price)``; plans change in place."""
    np.random.seed(seed)
    num_ops = g.cost.size
    num_gaps = gaps.begin.size
    if num_gaps == 0:
        num_moves = 0
    highest_price = 1e4 * g.cost.sum() + 1.0
    lowest_price = 1e-6 * g.cost.sum()
    order = np.empty(6 * num_ops + 16, np.int64)
    memory = np.empty(order.size + 1, np.int64)
    at = np.empty(order.size, np.int64)  # base position of each over-budget moment
    length, cost, excess, _ = evaluate(g, gaps, until, since, budget, order, memory)
    if length < 0:
        return best_cost, price
    num_over = _over_budget(g, order, length, memory, budget, at)
    if excess == 0.0 and cost < best_cost:
        best_cost = cost
        best_until[:] = until
        best_since[:] = since
    feasible = 0
    judged = 0
    for _ in range(num_moves):
        if judged == 100:
            if feasible < 25:
                price = min(price * 1.3, highest_price)
            elif feasible > 60:
                price = max(price / 1.3, lowest_price)
            judged = 0
            feasible = 0
        x = np.random.randint(num_ops)
        focus = num_over > 0 and np.random.random() < 0.7
        if focus:
            x = at[np.random.randint(num_over)]
        # a gap that covers x
        h = -1
        for _ in range(200):
            candidate = np.random.randint(num_gaps)
            if gaps.fixed[candidate] or g.size[gaps.storage[candidate]] == 0:
                continue
            if gaps.begin[candidate] < x and x < gaps.end[candidate]:
                h = candidate
                break
        if h < 0:
            continue
        a = gaps.begin[h]
        b = gaps.end[h]
        old_until = until[h]
        old_since = since[h]
        r = np.random.random()
        if focus:
            if old_until < x and old_since > x:
                continue  # already gone there
            if r < 0.5:
                until[h] = a
                since[h] = a + 1 if old_since > x else x + 1
            elif r < 0.8:
                until[h] = a
                since[h] = b
            else:
                until[h] = a + np.random.randint(x - a)
                since[h] = x + 1 + np.random.randint(b - x)
        elif r < 0.4:
            until[h] = b
        elif r < 0.6:
            until[h] = a
            since[h] = a + 1
        elif r < 0.75:
            until[h] = a
            since[h] = b
        elif r < 0.9:
            since[h] = a + 1 + np.random.randint(b - a)
            if until[h] >= b:
                until[h] = a
        else:
            until[h] = a + np.random.randint(b - a)
        if until[h] == old_until and since[h] == old_since:
            continue
        new_length, new_cost, new_excess, _ = evaluate(g, gaps, until, since, budget, order, memory)
        delta = (new_cost - cost) + price * (new_excess - excess)
        if new_length >= 0 and (delta <= 0 or np.random.random() < np.exp(-delta / heat)):
            length, cost, excess = new_length, new_cost, new_excess
            num_over = _over_budget(g, order, length, memory, budget, at)
            if excess == 0.0 and cost < best_cost:
                best_cost = cost
                best_until[:] = until
                best_since[:] = since
        else:
            until[h] = old_until
            since[h] = old_since
        judged += 1
        if excess == 0.0:
            feasible += 1
    return best_cost, price


@njit(cache=True, nogil=True)
def _over_budget(g, order, length, memory, budget, at):  # type: ignore[no-untyped-def]
    """Base positions of the moments over the budget, and how many there are."""
    num = 0
    front = 0
    for i in range(length):
        if memory[i] > budget:
            at[num] = front
            num += 1
        if order[i] == front:
            front += 1
    return num
