"""The relaxation: memory enforced at a few moments of the base order only.

Legend. Operators f, g; storages k, u; prod(k) the producer of k. Intervals
t = 0 … T - 1 cut the base order: interval t holds the base positions
begin_t ≤ x < end_t and ends with the *slice* x = end_t - 1. A *virtual*
interval holds no base operator (begin_t = end_t): recomputations only, with a
slice after them. c costs, m sizes, w workspaces, B the budget less what is
resident.

    L[k,t] ∈ {0, 1}   k is in memory after slice t and will be read again
    R[f,t] ∈ {0, 1}   f, with f < begin_t, runs again in interval t
    P[k,t] ∈ [0, 1]   k stays in memory throughout interval t

    minimize Σ c_f R[f,t]
    (1) availability     L[k,t-1] + R[prod(k),t] ≥ 1      k read by a base operator of t
    (2) recomputation    L[u,t-1] + R[prod(u),t] ≥ R[f,t] every input u of f
    (3) residency        L[k,t] ≤ L[k,t-1] + R[prod(k),t] k made before interval t
    (4) memory           Σ m_k L[k,t] ≤ B - m(touched) - w(p)   over k untouched by p, the
                         operator of slice t; touched are its inputs and outputs
    (5) transients       P[k,t] ≥ L[k,t-1] + L[k,t] - 1 - R[prod(k),t]
                         Σ m_k P[k,t] + (m(touched by f) + w(f)) R[f,t] ≤ B
                         over k untouched by f; L[k,t] counts as 1 where slice t reads k
    (6) one at a time    Σ_f R[f,t] ≤ 1                   virtual intervals but the first of a row,
                         and a single base operator after a virtual interval

With R whole, the least L that satisfies (1)–(3) is whole too, so L need not be
declared so; but branching and cuts on L are what makes HiGHS fast (gpt2_L12 at
80 %: 0.3 s against 16 s). Outputs of pinned operators have no R: their L is forced from
production to the last use that needs them. Kept storages have L = 1.

Every schedule whose first runs keep the base order satisfies (1)–(6), whatever
the slices are: set R[f,t] = 1 where f runs again in interval t and L[k,t] = 1
where a version is alive after slice t. For (6): the last recomputations before
a base operator get an interval each, the earlier ones share the first virtual one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import highspy
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array

from .arrays import ByteArray, GraphArrays, IntArray
from .highs import OBJECTIVE_SCALE, build_lp

ABSENT = -1  # no column: the value is 0
ALWAYS = -2  # no column: the value is 1


@dataclass(frozen=True, slots=True)
class Interval:
    """Base positions ``begin … end - 1``; virtual when there are none."""

    begin: int
    end: int

    @property
    def virtual(self) -> bool:
        return self.begin == self.end


@dataclass(frozen=True)
class Slicing:
    """Where memory is enforced.

    Parameters
    ----------
    slices
        Base positions.
    num_virtual
        Number of virtual intervals right before a base position.
    transients
        ``(f, x)``: the transient of ``f`` is cut in the interval of ``x``, and
        in the virtual intervals before it.
    """

    slices: frozenset[int]
    num_virtual: tuple[tuple[int, int], ...] = ()
    transients: frozenset[tuple[int, int]] = frozenset()

    def intervals(self, num_operators: int) -> list[Interval]:
        """Intervals in order; the last one reaches the end."""
        virtual = dict(self.num_virtual)
        cuts = {x + 1 for x in self.slices} | set(virtual) | {num_operators}
        ends = sorted(c for c in cuts if c > 0)
        result: list[Interval] = []
        begin = 0
        for end in ends:
            result.extend([Interval(begin, begin)] * virtual.get(begin, 0))
            result.append(Interval(begin, end))
            begin = end
        return result


@dataclass(frozen=True)
class SliceModel:
    """A built relaxation and the meaning of its columns.

    ``l_col[t, k]`` and ``r_col[t, f]`` are columns, :data:`ABSENT` or
    :data:`ALWAYS`.
    """

    lp: highspy.HighsLp
    intervals: list[Interval]
    l_col: NDArray[np.int32]
    r_col: NDArray[np.int32]
    p_col: NDArray[np.int32]
    num_cols: int
    infeasible: bool


class _Rows:
    """Rows of a sparse matrix, collected in batches."""

    def __init__(self) -> None:
        self.rows: list[IntArray] = []
        self.cols: list[IntArray] = []
        self.values: list[NDArray[np.float64]] = []
        self.lower: list[NDArray[np.float64]] = []
        self.upper: list[NDArray[np.float64]] = []
        self.num = 0

    def add(
        self,
        terms: Iterable[tuple[NDArray[np.int32], float]],
        lower: NDArray[np.float64],
        upper: NDArray[np.float64],
    ) -> None:
        """One row for each place of the columns; constants move to the other side."""
        shift = np.zeros(len(lower))
        index = np.arange(self.num, self.num + len(lower))
        for cols, factor in terms:
            shift += np.where(cols == ALWAYS, factor, 0.0)
            real = cols >= 0
            self.rows.append(index[real])
            self.cols.append(cols[real].astype(np.int64))
            self.values.append(np.full(int(real.sum()), factor))
        self.lower.append(lower - shift)
        self.upper.append(upper - shift)
        self.num += len(lower)

    def add_one(self, cols: NDArray[np.int32], factors: NDArray[np.float64], upper: float) -> None:
        """A single row ``Σ factors cols ≤ upper``."""
        shift = float(factors[cols == ALWAYS].sum())
        real = cols >= 0
        self.rows.append(np.full(int(real.sum()), self.num, dtype=np.int64))
        self.cols.append(cols[real].astype(np.int64))
        self.values.append(factors[real])
        self.lower.append(np.array([-highspy.kHighsInf]))
        self.upper.append(np.array([upper - shift]))
        self.num += 1


@dataclass(frozen=True)
class Usefulness:
    """Up to when things can matter, by base position.

    ``storage[k]``: last base operator that reads k, or that needs, directly or
    not, something which is recomputed from k; ``operator[f]``: the same for a
    new run of f, -1 for pinned operators.
    """

    storage: IntArray
    operator: IntArray


def usefulness(g: GraphArrays) -> Usefulness:
    """One pass from the back."""
    storage = np.full(g.num_storages, -1, dtype=np.int64)
    operator = np.full(g.num_operators, -1, dtype=np.int64)
    for v in range(g.num_operators - 1, -1, -1):
        outputs = g.outputs(v)
        if len(outputs) and not g.pinned[v]:
            again = outputs[g.kept[outputs] == 0]
            operator[v] = storage[again].max(initial=-1)
        reach = max(v, int(operator[v]))
        inputs = g.inputs(v)
        storage[inputs] = np.maximum(storage[inputs], reach)
    return Usefulness(storage, operator)


def build_slice_model(
    g: GraphArrays,
    slicing: Slicing,
    budget_bytes: int,
    *,
    allowed: ByteArray | None = None,
    integer: bool = True,
) -> SliceModel:
    """Build the relaxation.

    Parameters
    ----------
    allowed
        ``allowed[f, x]``: whether f may run again just before base position x
        (by default always).
    """
    intervals = slicing.intervals(g.num_operators)
    useful = usefulness(g)
    columns = _Columns(g, intervals, useful, allowed)
    rows = _Rows()
    room = budget_bytes - g.resident_bytes
    scale = 1.0 / max(1, budget_bytes)
    made_once = _made_once(g)
    infeasible = False
    for t, interval in enumerate(intervals):
        _add_flow(g, columns, rows, t, interval, made_once)
        if not interval.virtual:
            infeasible |= _add_memory(g, columns, rows, t, interval, room, scale)
        else:
            _add_virtual_memory(g, columns, rows, t, room, scale)
        if t > 0 and intervals[t - 1].virtual and interval.end - interval.begin <= 1:
            candidates = columns.r_col[t][columns.r_col[t] >= 0]
            rows.add_one(candidates, np.ones(len(candidates)), 1.0)
    for f, x in sorted(slicing.transients):
        for t, interval in enumerate(intervals):
            if interval.begin <= x < interval.end or (interval.virtual and interval.begin == x):
                _add_transient(g, columns, rows, t, interval, f, room, scale)
    num_cols = columns.num
    cost = np.zeros(num_cols)
    is_integer = np.zeros(num_cols, dtype=bool)
    t_of, f_of = np.nonzero(columns.r_col >= 0)
    cost[columns.r_col[t_of, f_of]] = g.cost[f_of] * (OBJECTIVE_SCALE / max(1, int(g.cost.sum())))
    is_integer[columns.r_col[t_of, f_of]] = integer
    is_integer[columns.l_col[columns.l_col >= 0]] = integer
    matrix = coo_array(
        (
            np.concatenate(rows.values),
            (np.concatenate(rows.rows), np.concatenate(rows.cols)),
        ),
        shape=(rows.num, num_cols),
    )
    lp = build_lp(
        cost=cost,
        upper=np.ones(num_cols),
        matrix=matrix,
        row_lower=np.concatenate(rows.lower),
        row_upper=np.concatenate(rows.upper),
        integer=is_integer,
    )
    return SliceModel(
        lp, intervals, columns.l_col, columns.r_col, columns.p_col, num_cols, infeasible
    )


def _made_once(g: GraphArrays) -> NDArray[np.bool_]:
    """Storages that are made by a pinned operator."""
    return (g.producer >= 0) & (g.pinned[g.producer] > 0)


class _Columns:
    """Numbers the columns; see :class:`SliceModel`."""

    def __init__(
        self,
        g: GraphArrays,
        intervals: list[Interval],
        useful: Usefulness,
        allowed: ByteArray | None,
    ) -> None:
        num_intervals = len(intervals)
        self.l_col = np.full((num_intervals, g.num_storages), ABSENT, dtype=np.int32)
        self.r_col = np.full((num_intervals, g.num_operators), ABSENT, dtype=np.int32)
        self.p_col = np.full((num_intervals, g.num_storages), ABSENT, dtype=np.int32)
        self.num = 0
        operators = np.arange(g.num_operators)
        forced_until = np.full(g.num_storages, -1, dtype=np.int64)
        for k in np.flatnonzero(_made_once(g)):
            uses = g.positions(int(k))
            if len(uses) > 1:
                forced_until[k] = uses[-1]
        for t, interval in enumerate(intervals):
            here = (operators < interval.begin) & (useful.operator >= interval.begin)
            if allowed is not None:
                stop = interval.begin + 1 if interval.virtual else interval.end
                here &= allowed[:, interval.begin : stop].any(axis=1)
            self._number(self.r_col[t], here)
            made = (g.producer >= 0) & (g.producer < interval.end)
            always = made & ((g.kept > 0) | (forced_until >= interval.end))
            self._number(self.l_col[t], made & ~always & (useful.storage >= interval.end))
            self.l_col[t][always] = ALWAYS

    def _number(self, cols: NDArray[np.int32], mask: NDArray[np.bool_]) -> None:
        count = int(mask.sum())
        cols[mask] = np.arange(self.num, self.num + count)
        self.num += count

    def before(self, t: int) -> NDArray[np.int32]:
        """L[·, t - 1]."""
        if t == 0:
            return np.full(self.l_col.shape[1], ABSENT, dtype=np.int32)
        return self.l_col[t - 1]


def _again(g: GraphArrays, columns: _Columns, t: int, ks: IntArray) -> NDArray[np.int32]:
    """R[prod(k), t] for storages ``ks``."""
    return columns.r_col[t][g.producer[ks]]


def _add_flow(
    g: GraphArrays,
    columns: _Columns,
    rows: _Rows,
    t: int,
    interval: Interval,
    made_once: NDArray[np.bool_],
) -> None:
    """Equations (1), (2) and (3) of interval ``t``."""
    before = columns.before(t)
    infinite = highspy.kHighsInf
    if not interval.virtual:
        read = np.unique(g.in_idx[g.in_ptr[interval.begin] : g.in_ptr[interval.end]])
        read = read[(g.producer[read] < interval.begin) & (before[read] != ALWAYS)]
        ones = np.ones(len(read))
        rows.add(
            [(before[read], 1.0), (_again(g, columns, t, read), 1.0)],
            ones,
            np.full(len(read), infinite),
        )
    candidates = np.flatnonzero(columns.r_col[t] >= 0)
    counts = g.in_ptr[candidates + 1] - g.in_ptr[candidates]
    f = np.repeat(candidates, counts)
    u = (
        np.concatenate([g.inputs(int(v)) for v in candidates])
        if len(candidates)
        else np.zeros(0, dtype=np.int64)
    )
    needed = before[u] != ALWAYS
    f, u = f[needed], u[needed]
    rows.add(
        [
            (before[u], 1.0),
            (_again(g, columns, t, u), 1.0),
            (columns.r_col[t][f], -1.0),
        ],
        np.zeros(len(f)),
        np.full(len(f), infinite),
    )
    stay = np.flatnonzero((columns.l_col[t] >= 0) & (g.producer < interval.begin))
    rows.add(
        [
            (before[stay], 1.0),
            (_again(g, columns, t, stay), 1.0),
            (columns.l_col[t][stay], -1.0),
        ],
        np.zeros(len(stay)),
        np.full(len(stay), infinite),
    )


def _touched(g: GraphArrays, v: int) -> IntArray:
    return np.union1d(g.inputs(v), g.outputs(v))


def _add_memory(
    g: GraphArrays,
    columns: _Columns,
    rows: _Rows,
    t: int,
    interval: Interval,
    room: int,
    scale: float,
) -> bool:
    """Equation (4) at the slice of interval ``t``; whether it cannot hold."""
    p = interval.end - 1
    touched = _touched(g, p)
    left = room - int(g.size[touched].sum()) - int(g.workspace[p])
    cols = columns.l_col[t].copy()
    cols[touched] = ABSENT
    left -= int(g.size[cols == ALWAYS].sum())
    ks = np.flatnonzero((cols >= 0) & (g.size > 0))
    rows.add_one(cols[ks], (g.size[ks] * scale).astype(np.float64), left * scale)
    return left < 0


def _add_virtual_memory(
    g: GraphArrays, columns: _Columns, rows: _Rows, t: int, room: int, scale: float
) -> None:
    """Equation (4) after a virtual interval, where no operator runs."""
    cols = columns.l_col[t]
    left = room - int(g.size[cols == ALWAYS].sum())
    ks = np.flatnonzero((cols >= 0) & (g.size > 0))
    rows.add_one(cols[ks], (g.size[ks] * scale).astype(np.float64), left * scale)


def _add_transient(
    g: GraphArrays,
    columns: _Columns,
    rows: _Rows,
    t: int,
    interval: Interval,
    f: int,
    room: int,
    scale: float,
) -> None:
    """Equation (5) for ``f`` in interval ``t``."""
    if columns.r_col[t, f] < 0:
        return
    before = columns.before(t)
    after = columns.l_col[t].copy()
    if not interval.virtual:
        inputs = g.inputs(interval.end - 1)
        after[inputs[g.producer[inputs] < interval.begin]] = ALWAYS
    throughout = np.flatnonzero((before != ABSENT) & (after != ABSENT) & (g.size > 0))
    certain = throughout[(before[throughout] == ALWAYS) & (after[throughout] == ALWAYS)]
    certain = certain[columns.r_col[t][g.producer[certain]] == ABSENT]
    open_ks = np.setdiff1d(throughout, certain)
    new = open_ks[columns.p_col[t][open_ks] < 0]
    columns.p_col[t][new] = np.arange(columns.num, columns.num + len(new))
    columns.num += len(new)
    rows.add(
        [
            (columns.p_col[t][new], 1.0),
            (before[new], -1.0),
            (after[new], -1.0),
            (_again(g, columns, t, new), 1.0),
        ],
        -np.ones(len(new)),
        np.full(len(new), highspy.kHighsInf),
    )
    touched = _touched(g, f)
    certain = np.setdiff1d(certain, touched)
    ks = np.setdiff1d(open_ks, touched)
    own = int(g.size[touched].sum()) + int(g.workspace[f])
    cols = np.concatenate([columns.p_col[t][ks], columns.r_col[t][[f]]])
    factors = np.concatenate([g.size[ks], [own]]) * scale
    rows.add_one(cols, factors, (room - int(g.size[certain].sum())) * scale)
