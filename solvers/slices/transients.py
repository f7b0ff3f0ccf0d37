"""Memory while something runs again, the second half of the slice relaxation.

Legend as in ``slices/model.py``. Two cuts for a run of f in interval t:

*Transient*, satisfied by every schedule whose first runs keep the base order.
P[k] says that k stays in memory throughout the interval:

    (5)  P[k] ≥ L[k,t-1] + L[k,t] - 1 - R[prod(k),t]     L[k,t] counts as 1 where the
                                                         slice reads k
    (6)  Σ m_k P[k] + (m(touched by f) + w(f)) R[f,t] ≤ B         over k untouched by f

*Event*, satisfied by staged schedules: the interval holds one base operator x
and each f < x runs again at most once in it, in base order. U[k] says that k is
in memory when f has its turn:

    (7)  L[k,t-1] + R[prod(k),t] ≤ 1      what is there and will be read is not made again
    (8)  U[k] ≥ a + b - 1                 a: L[k,t-1], plus R[prod(k),t] where prod(k) < f
                                          b: each of L[k,t]; 1 where x reads k; R[g,t] of
                                          every reader g > f of k
         Σ m_k U[k] + (m(touched by f) + m(kept outputs of f) + w(f)) R[f,t] ≤ B

With a slice at every operator and (8) for every f and x the model is exact for
staged schedules: it is the memory constraint of Checkmate (Jain et al., MLSys
2020, eqs. 2–7), written where it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import GraphArrays
from ..sparse_rows import ABSENT, ALWAYS, ColumnArray, Rows
from .slicing import Interval

TINY = 1e-6
"""What is less in a row of memory is left out, which bounds all the same.

HiGHS takes a coefficient below its tolerance off the room as if the column were one: of a
budget of 4,128,798 bytes 2 are left over by the best schedule, and a scalar cost it 15 %.
"""


@dataclass(frozen=True)
class Stage:
    """The columns of one interval: L before it, L after it, R in it."""

    interval: Interval
    before: ColumnArray
    after: ColumnArray
    again: ColumnArray


@dataclass(frozen=True, slots=True)
class Crossing:
    """A column that is one when ``there`` adds up to one and one of ``needed`` is one.

    Parameters
    ----------
    less
        Columns that are taken off again.
    """

    col: int
    there: tuple[int, ...]
    needed: tuple[int, ...]
    less: tuple[int, ...] = ()


def _value(values: np.ndarray, col: int) -> float:
    return 1.0 if col == ALWAYS else 0.0 if col == ABSENT else float(values[col])


def crossing_value(values: np.ndarray, c: Crossing) -> float:
    """The least value that satisfies (5) or (8)."""
    there = sum(_value(values, col) for col in c.there) - sum(_value(values, col) for col in c.less)
    return max(0.0, there + max(_value(values, col) for col in c.needed) - 1.0)


class TransientRows:
    """Adds the cuts to ``rows``; numbers their columns from ``num_cols`` on."""

    def __init__(
        self, g: GraphArrays, rows: Rows, num_cols: int, room_bytes: int, scale: float
    ) -> None:
        self.g, self.rows, self.num_cols = g, rows, num_cols
        self.room_bytes, self.scale = room_bytes, scale
        self.crossings: list[Crossing] = []
        self._throughout: dict[tuple[int, int], int] = {}

    def add_transient(self, stage: Stage, f: int) -> None:
        """Equations (5) and (6)."""
        if stage.again[f] < 0:
            return
        g = self.g
        after = stage.after.copy()
        inputs = g.inputs(stage.interval.end - 1)
        after[inputs[g.producer[inputs] < stage.interval.begin]] = ALWAYS
        touched = np.union1d(g.inputs(f), g.outputs(f))
        own = int(g.size[touched].sum()) + int(g.workspace[f])
        touched = np.setdiff1d(touched, g.written_over(f))  # it is there beside what is written
        throughout = (stage.before != ABSENT) & (after != ABSENT) & (g.size > 0)
        throughout[touched] = False
        parts: list[tuple[int, int]] = []
        for k in np.flatnonzero(throughout):
            remade = int(stage.again[g.producer[k]])
            before = int(stage.before[k])
            if before == ALWAYS and after[k] == ALWAYS and remade == ABSENT:
                col = ALWAYS
            else:
                place = (stage.interval.begin, int(k))
                if place not in self._throughout:
                    less = (remade,) if remade >= 0 else ()
                    self._throughout[place] = self._cross((before,), (int(after[k]),), less)
                col = self._throughout[place]
            parts.append((col, int(g.size[k])))
        self._limit([*parts, (int(stage.again[f]), own)])

    def add_exclusion(self, stage: Stage) -> None:
        """Equation (7)."""
        again = np.where(self.g.producer >= 0, stage.again[self.g.producer], ABSENT)
        ks = np.flatnonzero((stage.before >= 0) & (again >= 0))
        self.rows.add([(stage.before[ks], -1.0), (again[ks], -1.0)], -np.ones(len(ks)))

    def add_event(self, stage: Stage, f: int) -> None:
        """Equation (8).

        Raises
        ------
        ValueError
            When the interval holds more than one base operator.
        """
        if not stage.interval.single:
            raise ValueError(f"{stage.interval} holds more than one base operator")
        if stage.again[f] < 0:
            return
        g = self.g
        x = stage.interval.begin
        readers: dict[int, list[int]] = {}
        for reader in np.flatnonzero(stage.again[f + 1 :] >= 0) + f + 1:
            for k in g.inputs(int(reader)):
                readers.setdefault(int(k), []).append(int(stage.again[reader]))
        x_reads = set(g.inputs(x).tolist())
        outputs = g.outputs(f)
        touched = {*g.inputs(f).tolist(), *outputs.tolist()}
        own = int(g.size[list(touched)].sum()) + int(g.size[outputs[g.kept[outputs] > 0]].sum())
        touched -= set(g.written_over(f).tolist())
        parts: list[tuple[int, int]] = []
        for k in np.flatnonzero((g.size > 0) & (g.producer >= 0) & (g.producer < x)).tolist():
            if k in touched:
                continue
            size = int(g.size[k])
            before, after = int(stage.before[k]), int(stage.after[k])
            made = int(stage.again[g.producer[k]]) if g.producer[k] < f else ABSENT
            there = tuple(col for col in (before, made) if col != ABSENT)
            if ALWAYS in there:
                there = (ALWAYS,)
            needed = tuple(col for col in (after, *readers.get(k, ())) if col != ABSENT)
            if k in x_reads or ALWAYS in needed:
                needed = (ALWAYS,)
            if not there or not needed:
                continue
            if needed == (ALWAYS,):
                parts += [(col, size) for col in there]
            elif there == (ALWAYS,) and len(needed) == 1:
                parts.append((needed[0], size))
            else:
                parts.append((self._cross(there, needed), size))
        self._limit([*parts, (int(stage.again[f]), own + int(g.workspace[f]))])

    def _cross(
        self, there: tuple[int, ...], needed: tuple[int, ...], less: tuple[int, ...] = ()
    ) -> int:
        """A new column, bound from below as :class:`Crossing` says."""
        col = self.num_cols
        self.num_cols += 1
        self.crossings.append(Crossing(col, there, needed, less))
        for one in needed:
            terms = [(col, 1.0), (one, -1.0)]
            terms += [(other, -1.0) for other in there] + [(other, 1.0) for other in less]
            self.rows.add(
                [(np.array([c], dtype=np.int32), factor) for c, factor in terms], -np.ones(1)
            )
        return col

    def _limit(self, parts: list[tuple[int, int]]) -> None:
        """``Σ size column ≤ room``."""
        parts = [(col, size) for col, size in parts if col == ALWAYS or size * self.scale > TINY]
        cols = np.array([col for col, _ in parts], dtype=np.int32)
        factors = np.array([size for _, size in parts]) * self.scale
        self.rows.add_one(cols, factors, self.room_bytes * self.scale)
