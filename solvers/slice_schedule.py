"""Between schedules and solutions of the slice relaxation, both ways.

:func:`schedule_of` runs inside each interval just in time what the solution
recomputes there, and makes what the slice after it asks for; a recomputation
that nobody reads is left out. The schedule costs no more than the solution.
:func:`solution_of` writes a schedule as values of the columns: a warm start.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from graph_capture.cost_graph import CostGraph

from .arrays import GraphArrays
from .replay import replay
from .schedule import Schedule
from .slice_model import ALWAYS, SliceModel

WHOLE = 0.999
"""A residency below this is none: with whole R nothing needs a part of a storage."""


def schedule_of(g: GraphArrays, model: SliceModel, values: NDArray[np.float64]) -> Schedule | None:
    """The schedule that ``values`` stand for; ``None`` when they miss an input."""
    order: list[int] = []
    at_hand: set[int] = set()

    def make(k: int) -> bool:
        """Recompute ``k`` and, first, what it misses."""
        v = int(g.producer[k])
        if g.pinned[v]:
            return False
        for u in g.inputs(v):
            if int(u) not in at_hand and not make(int(u)):
                return False
        order.append(v)
        at_hand.update(int(u) for u in g.outputs(v))
        return True

    for t, interval in enumerate(model.intervals):
        cols = model.l_col[t]
        stays = {int(k) for k in np.flatnonzero(cols == ALWAYS)}
        open_ks = np.flatnonzero(cols >= 0)
        stays.update(int(k) for k in open_ks[values[cols[open_ks]] > WHOLE])
        asked = sorted(k for k in stays if g.producer[k] < interval.begin and k not in at_hand)
        for x in range(interval.begin, interval.end):
            if not all(int(k) in at_hand or make(int(k)) for k in g.inputs(x)):
                return None
            if x == interval.end - 1 and not all(k in at_hand or make(k) for k in asked):
                return None
            order.append(x)
            at_hand.update(int(k) for k in g.outputs(x))
        if interval.virtual and not all(k in at_hand or make(k) for k in asked):
            return None
        at_hand &= stays
    return trim(g, order)


def trim(g: GraphArrays, order: list[int]) -> Schedule:
    """Leave out recomputations that nobody reads."""
    first = np.full(g.num_operators, -1, dtype=np.int64)
    for i in range(len(order) - 1, -1, -1):
        first[order[i]] = i
    wanted: set[int] = set()
    result: list[int] = []
    for i in range(len(order) - 1, -1, -1):
        v = order[i]
        outputs = {int(k) for k in g.outputs(v)}
        if first[v] != i and not any(k in wanted and not g.kept[k] for k in outputs):
            continue
        wanted -= {k for k in outputs if not g.kept[k]}
        wanted.update(int(k) for k in g.inputs(v))
        result.append(v)
    return Schedule(tuple(reversed(result)))


def solution_of(
    graph: CostGraph, g: GraphArrays, model: SliceModel, schedule: Schedule
) -> NDArray[np.float64]:
    """Values of all columns under ``schedule``, whose first runs keep the base order."""
    num_intervals = len(model.intervals)
    runs: list[list[int]] = [[] for _ in range(num_intervals)]
    slice_step = [-1] * num_intervals
    base_interval = {
        x: t
        for t, interval in enumerate(model.intervals)
        for x in range(interval.begin, interval.end)
    }
    front = 0
    chain: list[int] = []
    for i, v in enumerate(schedule.order):
        if v != front:
            chain.append(i)
            continue
        t = base_interval[front]
        interval = model.intervals[t]
        runs[t].extend(chain)
        if interval.begin == front:
            rest = chain
            virtual = t
            if t > 0 and model.intervals[t - 1].virtual and interval.end == front + 1:
                runs[t] = rest[-1:]
                rest = rest[:-1]
            elif t > 0 and model.intervals[t - 1].virtual:
                runs[t] = []
            while virtual > 0 and model.intervals[virtual - 1].virtual:
                virtual -= 1
                first = virtual == 0 or not model.intervals[virtual - 1].virtual
                runs[virtual] = rest if first else rest[-1:]
                slice_step[virtual] = rest[-1] if rest else i - 1 - len(chain)
                rest = [] if first else rest[:-1]
        if interval.end == front + 1:
            slice_step[t] = i
        chain = []
        front += 1

    values = np.zeros(model.num_cols)
    alive = np.zeros(model.l_col.shape)
    for k, born, last in replay(graph, schedule).live:
        for t in range(num_intervals):
            if born <= slice_step[t] < last:
                alive[t, k] = 1.0
    alive[model.l_col == ALWAYS] = 1.0
    again = np.zeros(model.r_col.shape)
    for t in range(num_intervals):
        for i in runs[t]:
            again[t, schedule.order[i]] = 1.0
    real = model.l_col >= 0
    values[model.l_col[real]] = alive[real]
    real = model.r_col >= 0
    values[model.r_col[real]] = again[real]
    for t in range(1, num_intervals):
        ks = np.flatnonzero(model.p_col[t] >= 0)
        after = alive[t].copy()
        interval = model.intervals[t]
        if not interval.virtual:
            inputs = g.inputs(interval.end - 1)
            after[inputs[g.producer[inputs] < interval.begin]] = 1.0
        through = alive[t - 1, ks] + after[ks] - 1.0 - again[t, g.producer[ks]]
        values[model.p_col[t][ks]] = np.maximum(0.0, through)
    return values
