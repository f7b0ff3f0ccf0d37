"""The relaxation: memory enforced at a few moments of the base order only.

Legend. Operators f, g; storages k, u; prod(k) the producer of k. Intervals
t = 0 … T - 1 cut the base order: interval t holds the base positions
begin_t ≤ x < end_t and ends with the *slice* x = end_t - 1. c costs, m sizes,
w workspaces, B the budget less what is resident.

    L[k,t] ∈ {0, 1}   k is in memory after slice t and will be read again
    R[f,t] ∈ {0, 1}   f, with f < begin_t, runs again in interval t

    minimize Σ c_f R[f,t]
    (1) availability     L[k,t-1] + R[prod(k),t] ≥ 1      k read by a base operator of t
    (2) recomputation    L[u,t-1] + R[prod(u),t] ≥ R[f,t] every input u of f
    (3) residency        L[k,t] ≤ L[k,t-1] + R[prod(k),t] k made before interval t
    (4) memory           Σ m_k L[k,t] ≤ B - m(touched) - w(p)   over k untouched by p, the
                         operator of slice t; touched are its inputs and outputs, but what
                         it writes over only where that stays
    and memory while something runs again, (5)–(8) in ``slices/transients.py``.

With R whole, the least L that satisfies (1)–(3) is whole too, so L need not be
declared so; but branching and cuts on L are what makes HiGHS fast (gpt2_L12 at
80 %: 0.3 s against 16 s). Outputs of pinned operators have no R: their L is forced from
production to the last use that needs them. Kept storages have L = 1.

Every schedule whose first runs keep the base order satisfies (1)–(6), whatever
the slices are: set R[f,t] = 1 where f runs again in interval t and L[k,t] = 1
where a version is alive after slice t. Staged schedules (``stages.py``) satisfy
(7) and (8) too.
"""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np
from numpy.typing import NDArray

from ..arrays import GraphArrays
from ..highs import OBJECTIVE_SCALE, build_lp
from ..last_use import (
    LastUse,
    find_last_use,
)
from ..sparse_rows import ABSENT, ALWAYS, ColumnArray, Rows
from .slicing import Interval, Slicing
from .transients import TINY, Crossing, Stage, TransientRows

BUDGET = 1e3
"""The budget in rows of memory: HiGHS' tolerance (1e-6) is a billionth of it then, some bytes."""


@dataclass(frozen=True)
class SliceModel:
    """A built relaxation and the meaning of its columns.

    ``l_col[t, k]`` and ``r_col[t, f]`` are columns, ``ABSENT`` or ``ALWAYS``;
    the others are those of ``crossings``.
    """

    lp: highspy.HighsLp
    intervals: list[Interval]
    l_col: ColumnArray
    r_col: ColumnArray
    crossings: list[Crossing]
    num_cols: int
    infeasible: bool


def build_slice_model(
    g: GraphArrays,
    slicing: Slicing,
    budget_bytes: int,
    *,
    candidates: NDArray[np.bool_] | None = None,
) -> SliceModel:
    """Build the relaxation.

    Parameters
    ----------
    candidates
        The operators that may run again; by default all. With fewer, the model
        bounds only schedules that run none but these again.
    """
    intervals = slicing.intervals(g.num_operators)
    columns = _Columns(g, intervals, find_last_use(g), candidates)
    rows = Rows()
    room = budget_bytes - g.resident_bytes
    scale = BUDGET / max(1, budget_bytes)
    infeasible = False
    interval_of = {x: t for t, i in enumerate(intervals) for x in range(i.begin, i.end)}
    for t, interval in enumerate(intervals):
        _add_flow(g, columns, rows, t, interval)
        infeasible |= _add_memory(g, columns, rows, t, interval, room, scale)

    def stage(x: int) -> Stage:
        t = interval_of[x]
        return Stage(intervals[t], columns.before(t), columns.l_col[t], columns.r_col[t])

    transients = TransientRows(g, rows, columns.num, room, scale)
    for f, t in sorted({(f, interval_of[x]) for f, x in slicing.transients}):
        transients.add_transient(stage(intervals[t].begin), f)
    for interval in intervals:
        if slicing.staged and interval.single:
            transients.add_exclusion(stage(interval.begin))
    for f, x in sorted(slicing.events):
        transients.add_event(stage(x), f)

    num_cols = transients.num_cols
    cost = np.zeros(num_cols)
    is_integer = np.zeros(num_cols, dtype=bool)
    t_of, f_of = np.nonzero(columns.r_col >= 0)
    cost[columns.r_col[t_of, f_of]] = g.cost[f_of] * (OBJECTIVE_SCALE / max(1, int(g.cost.sum())))
    is_integer[columns.r_col[t_of, f_of]] = True
    is_integer[columns.l_col[columns.l_col >= 0]] = True
    lp = build_lp(
        cost=cost,
        upper=np.ones(num_cols),
        matrix=rows.matrix(num_cols),
        row_lower=np.concatenate(rows.lower),
        row_upper=np.concatenate(rows.upper),
        integer=is_integer,
    )
    return SliceModel(
        lp,
        intervals,
        columns.l_col,
        columns.r_col,
        transients.crossings,
        num_cols,
        infeasible,
    )


class _Columns:
    """Numbers the columns; see :class:`SliceModel`."""

    def __init__(
        self,
        g: GraphArrays,
        intervals: list[Interval],
        last_use: LastUse,
        candidates: NDArray[np.bool_] | None,
    ) -> None:
        num_intervals = len(intervals)
        self.l_col = np.full((num_intervals, g.num_storages), ABSENT, dtype=np.int32)
        self.r_col = np.full((num_intervals, g.num_operators), ABSENT, dtype=np.int32)
        self.num = 0
        operators = np.arange(g.num_operators)
        forced_until = np.full(g.num_storages, -1, dtype=np.int64)
        for k in np.flatnonzero((g.producer >= 0) & (g.pinned[g.producer] > 0)):
            uses = g.positions(int(k))
            if len(uses) > 1:
                forced_until[k] = uses[-1]
        for t, interval in enumerate(intervals):
            again = (operators < interval.begin) & (last_use.operator >= interval.begin)
            self._number(self.r_col[t], again if candidates is None else again & candidates)
            made = (g.producer >= 0) & (g.producer < interval.end)
            always = made & ((g.kept > 0) | (forced_until >= interval.end))
            self._number(self.l_col[t], made & ~always & (last_use.storage >= interval.end))
            self.l_col[t][always] = ALWAYS

    def _number(self, cols: ColumnArray, mask: NDArray[np.bool_]) -> None:
        count = int(mask.sum())
        cols[mask] = np.arange(self.num, self.num + count)
        self.num += count

    def before(self, t: int) -> ColumnArray:
        """L[·, t - 1]."""
        if t == 0:
            return np.full(self.l_col.shape[1], ABSENT, dtype=np.int32)
        return self.l_col[t - 1]


def _add_flow(g: GraphArrays, columns: _Columns, rows: Rows, t: int, interval: Interval) -> None:
    """Equations (1), (2) and (3) of interval ``t``."""
    before, after, again = columns.before(t), columns.l_col[t], columns.r_col[t]
    read = np.unique(g.in_idx[g.in_ptr[interval.begin] : g.in_ptr[interval.end]])
    read = read[(g.producer[read] < interval.begin) & (before[read] != ALWAYS)]
    rows.add([(before[read], 1.0), (again[g.producer[read]], 1.0)], np.ones(len(read)))

    candidates = np.flatnonzero(again >= 0)
    counts = g.in_ptr[candidates + 1] - g.in_ptr[candidates]
    f = np.repeat(candidates, counts)
    u = np.concatenate([g.inputs(int(v)) for v in candidates]) if len(f) else f
    needed = before[u] != ALWAYS
    f, u = f[needed], u[needed]
    rows.add([(before[u], 1.0), (again[g.producer[u]], 1.0), (again[f], -1.0)], np.zeros(len(f)))

    stay = np.flatnonzero((after >= 0) & (g.producer < interval.begin))
    rows.add(
        [(before[stay], 1.0), (again[g.producer[stay]], 1.0), (after[stay], -1.0)],
        np.zeros(len(stay)),
    )


def _add_memory(
    g: GraphArrays,
    columns: _Columns,
    rows: Rows,
    t: int,
    interval: Interval,
    room: int,
    scale: float,
) -> bool:
    """Equation (4) at the slice of interval ``t``; whether it cannot hold."""
    p = interval.end - 1
    touched = np.union1d(g.inputs(p), g.outputs(p))
    left = room - int(g.size[touched].sum()) - int(g.workspace[p])
    cols = columns.l_col[t].copy()
    cols[np.setdiff1d(touched, g.written_over(p))] = ABSENT
    left -= int(g.size[cols == ALWAYS].sum())
    ks = np.flatnonzero((cols >= 0) & (g.size * scale > TINY))
    rows.add_one(cols[ks], (g.size[ks] * scale).astype(np.float64), left * scale)
    return left < 0
