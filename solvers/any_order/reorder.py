"""Run the same operators in another order, so that less memory is used where it is tight.

A schedule's runs are moved one at a time, first runs and recomputations alike,
each between the runs that make what it reads and those that read what it makes;
nothing moves across the loss or the optimizer (``any_order/precedence.py``). The
runs stay the same, so the cost does. Annealing minimizes

    Σ max(0, memory - r)² / r²    over all moments, with r = 90 % of the budget,

and accepts nothing with a higher peak than at the start. The next solve can use the
freed memory to recompute less.

Lifetimes and reordering: Steiner et al., *OLLA: Optimizing the Lifetime and
Location of Arrays to Reduce the Memory Usage of Neural Networks* (2022,
arXiv:2210.12924), who solve it as an integer program. Annealing: Kirkpatrick
et al., *Optimization by Simulated Annealing* (Science, 1983).

Guarantee: the result passes the replay with the same cost and no higher peak.
Imperfections: runs move one at a time, so two that gain only together stay where they
are; runs that do not matter may end up anywhere.
"""

from __future__ import annotations

import time

import numpy as np
from numba import njit

from graph_capture.cost_graph import CostGraph

from ..arrays import graph_arrays
from ..fast_replay import VALID, replay_order
from ..replay import replay
from ..schedule import Schedule
from .permutation import first_runs
from .precedence import BARRIERS

TIGHT = 0.9
"""Share of the budget from which a moment's memory counts."""

MOVES_PER_CHUNK = 1000
HEAT = 1e-2
COLD = 1e-4
"""Temperatures at the beginning and at the end, as shares of the energy at the beginning."""


def reorder(
    graph: CostGraph,
    *,
    budget_bytes: int | None = None,
    num_moves: int = 60_000,
    time_limit_s: float = 2.0,
    seed: int = 0,
) -> tuple[int, ...]:
    """Find a base order in which keeping everything needs less memory where it is tight.

    Parameters
    ----------
    budget_bytes
        Memory above 90 % of it counts; by default the peak, as it falls.
    num_moves
        For each time that the peak falls.
    time_limit_s
        Altogether.

    Returns
    -------
    tuple of int
        The operators in their new order; see ``any_order/permutation.py``.
    """
    schedule = Schedule.keep_all(graph)
    reorder_runs(graph, schedule, num_moves=0)  # compiles, off the clock
    deadline_s = time.monotonic() + time_limit_s
    while (left_s := deadline_s - time.monotonic()) > 0:
        moved = reorder_runs(
            graph,
            schedule,
            budget_bytes=budget_bytes,
            num_moves=num_moves,
            time_limit_s=left_s,
            seed=seed,
        )
        if replay(graph, moved).peak_bytes >= replay(graph, schedule).peak_bytes:
            return first_runs(moved)
        schedule = moved  # what counts as tight follows the peak down
    return first_runs(schedule)


def reorder_runs(
    graph: CostGraph,
    schedule: Schedule,
    *,
    budget_bytes: int | None = None,
    num_moves: int = 60_000,
    time_limit_s: float = 2.0,
    seed: int = 0,
) -> Schedule:
    """Reorder the runs of ``schedule`` for less memory above 90 % of the budget.

    Parameters
    ----------
    schedule
        A valid one.
    budget_bytes
        By default the peak of ``schedule``.
    num_moves, time_limit_s
        Whichever is spent first; a search cut by time is not reproducible. Compiling,
        once after an installation, does not count as time.

    Returns
    -------
    Schedule
        ``schedule`` itself where nothing better is found.
    """
    g = graph_arrays(graph)
    order = np.array(schedule.order, dtype=np.int64)
    barrier = np.array([op.phase in BARRIERS for op in graph.operators], dtype=np.uint8)
    peak = replay(graph, schedule).peak_bytes
    tight = max(1.0, TIGHT * (peak if budget_bytes is None else min(peak, budget_bytes)))
    best = order.copy()
    least = start = float(_energy(g, order, tight)[0])
    _anneal(g, barrier, order, best, least, tight, peak, 0, 1.0, seed)  # compiles, off the clock
    deadline_s = time.monotonic() + time_limit_s
    made = 0
    while made < num_moves and least > 0.0 and time.monotonic() < deadline_s:
        heat = HEAT * start * (COLD / HEAT) ** (made / num_moves)
        chunk = min(MOVES_PER_CHUNK, num_moves - made)
        least = float(
            _anneal(g, barrier, order, best, least, tight, peak, chunk, heat, seed + made)
        )
        made += chunk
    return Schedule(tuple(int(v) for v in best)) if least < start else schedule


@njit(cache=True, nogil=True)
def _energy(g, order, tight):  # type: ignore[no-untyped-def]
    """``(energy, peak)`` of an order; the energy is infinite where it is not valid."""
    memory = np.empty(order.size + 1, np.int64)
    status, peak, _ = replay_order(g, order, order.size, memory)
    if status != VALID:
        return np.inf, peak
    energy = 0.0
    for i in range(order.size):
        if memory[i] > tight:
            energy += ((memory[i] - tight) / tight) ** 2
    return energy, peak


@njit(cache=True, nogil=True)
def _anneal(  # type: ignore[no-untyped-def]
    g, barrier, order, best, least, tight, highest, num_moves, heat, seed
):
    """``num_moves`` at one temperature; the least energy. ``order`` and ``best`` change."""
    np.random.seed(seed)
    energy, _ = _energy(g, order, tight)
    for _ in range(num_moves):
        p = np.random.randint(order.size)
        if barrier[order[p]]:
            continue
        step = -1 if np.random.random() < 0.5 else 1
        room = _room(g, barrier, order, p, step)
        if room == 0:
            continue
        far = np.random.random()
        if far < 0.4:
            distance = room
        elif far < 0.7:
            distance = 1 + np.random.randint(room)
        else:
            distance = 1 + np.random.randint(min(room, 4))
        q = p + step * distance
        _move(order, p, q)
        moved, peak = _energy(g, order, tight)
        if moved <= energy or np.random.random() < np.exp((energy - moved) / heat):
            energy = moved
            if energy < least and peak <= highest:
                least = energy
                best[:] = order
        else:
            _move(order, q, p)
    return least


@njit(cache=True, nogil=True)
def _room(g, barrier, order, p, step):  # type: ignore[no-untyped-def]
    """Return how far run ``p`` can move in the direction of ``step``."""
    v = order[p]
    room = 0
    i = p + step
    while 0 <= i < order.size:
        u = order[i]
        if u == v or barrier[u] or (g.ordered[u] and g.ordered[v]):
            break
        producer, reader = (u, v) if step < 0 else (v, u)
        if _feeds(g, producer, reader):
            break
        room += 1
        i += step
    return room


@njit(cache=True, nogil=True)
def _feeds(g, producer, reader):  # type: ignore[no-untyped-def]
    """Whether ``reader`` reads what ``producer`` makes."""
    for j in range(g.in_ptr[reader], g.in_ptr[reader + 1]):
        if g.producer[g.in_idx[j]] == producer:
            return True
    return False


@njit(cache=True, nogil=True)
def _move(order, p, q):  # type: ignore[no-untyped-def]
    """Move run ``p`` to place ``q``."""
    v = order[p]
    step = 1 if q > p else -1
    for i in range(p, q, step):
        order[i] = order[i + step]
    order[q] = v
