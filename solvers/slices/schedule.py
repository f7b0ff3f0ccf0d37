"""Between schedules and solutions of the slice relaxation, both ways.

:func:`schedule_of` runs again, just before each base operator, what it misses
there, and before the slice of an interval what the slice asks for; what nobody
reads is left out. The schedule costs no more than the solution.
:func:`solution_of` writes a schedule as values of the columns: a warm start.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from graph_capture.cost_graph import CostGraph

from ..arrays import GraphArrays
from ..replay import replay
from ..retention_plan import base_fronts
from ..schedule import Schedule
from ..sparse_rows import ALWAYS
from ..stages import order_of, stages_of
from .model import SliceModel
from .transients import crossing_value

WHOLE = 0.999
"""A residency below this is none: with whole R nothing needs a part of a storage."""


def schedule_of(
    g: GraphArrays, model: SliceModel, values: NDArray[np.float64], *, staged: bool = True
) -> Schedule | None:
    """The schedule that ``values`` stand for; ``None`` when they miss an input.

    Parameters
    ----------
    staged
        Run again in base order; otherwise depth first, which may hold less or
        more memory at the same cost.
    """
    order: list[int] = []
    at_hand: set[int] = set()

    def make(k: int, chain: list[int]) -> bool:
        """Recompute ``k`` and, first, what it misses."""
        v = int(g.producer[k])
        if g.pinned[v]:
            return False
        for u in g.inputs(v):
            if int(u) not in at_hand and not make(int(u), chain):
                return False
        chain.append(v)
        at_hand.update(int(u) for u in g.outputs(v))
        return True

    for t, interval in enumerate(model.intervals):
        cols = model.l_col[t]
        stays = {int(k) for k in np.flatnonzero(cols == ALWAYS)}
        open_ks = np.flatnonzero(cols >= 0)
        stays.update(int(k) for k in open_ks[values[cols[open_ks]] > WHOLE])
        asked = sorted(k for k in stays if g.producer[k] < interval.begin and k not in at_hand)
        for x in range(interval.begin, interval.end):
            wanted = [int(k) for k in g.inputs(x)] + (asked if x == interval.end - 1 else [])
            chain: list[int] = []
            if not all(k in at_hand or make(k, chain) for k in wanted):
                return None
            order.extend(sorted(chain) if staged else chain)
            order.append(x)
            at_hand.update(int(k) for k in g.outputs(x))
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


def nearest_staged(g: GraphArrays, schedule: Schedule) -> Schedule:
    """The same recomputations in base order; its peak may be another one."""
    return trim(g, order_of(stages_of(schedule)))


def solution_of(
    graph: CostGraph, g: GraphArrays, model: SliceModel, schedule: Schedule
) -> NDArray[np.float64]:
    """Values of all columns under ``schedule``, whose first runs keep the base order."""
    num_intervals = len(model.intervals)
    interval_of = np.repeat(
        np.arange(num_intervals), [i.end - i.begin for i in model.intervals]
    ).tolist()
    again = np.zeros(model.r_col.shape)
    slice_step = [-1] * num_intervals
    for i, (v, x) in enumerate(zip(schedule.order, base_fronts(schedule), strict=True)):
        if v != x:
            again[interval_of[x], v] = 1.0
        else:
            slice_step[interval_of[x]] = i  # the last one of the interval remains
    alive = np.zeros(model.l_col.shape)
    for k, born, last in replay(graph, schedule).live:
        for t in range(num_intervals):
            if born <= slice_step[t] < last:
                alive[t, k] = 1.0
    values = np.zeros(model.num_cols)
    real = model.l_col >= 0
    values[model.l_col[real]] = alive[real]
    real = model.r_col >= 0
    values[model.r_col[real]] = again[real]
    for crossing in model.crossings:
        values[crossing.col] = crossing_value(values, crossing)
    return values
