"""What is handed to OR-tools: programs as plain numbers, so that no process shares its library.

:class:`MixedIntegerProgram` is a sparse matrix, :class:`ConstraintProgram` a
list of constraints in CP-SAT's terms. Both are built here and solved by the
child process of ``reference/ortools_process.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

ABSENT = -1  # no column: the value is 0
ALWAYS = -2  # no column: the value is 1

Term = tuple[int, float]
"""A column, :data:`ABSENT` or :data:`ALWAYS`, and its factor."""


@dataclass(frozen=True, kw_only=True)
class MixedIntegerProgram:
    """Minimize ``cost · x`` with ``0 ≤ x ≤ upper`` and ``row_lower ≤ A x ≤ row_upper``.

    Parameters
    ----------
    integer
        Which columns are whole numbers.
    rows, cols, values
        The matrix A in coordinates.
    hint_cols, hint_values
        Where to begin; may name only some columns, and nothing relies on it.
    """

    cost: NDArray[np.float64]
    upper: NDArray[np.float64]
    integer: NDArray[np.bool_]
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    values: NDArray[np.float64]
    row_lower: NDArray[np.float64]
    row_upper: NDArray[np.float64]
    hint_cols: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    hint_values: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """All parts by name, ready for ``np.savez``."""
        return dict(vars(self))


class LinearBuilder:
    """Columns and rows, collected one by one. Constants move to the right-hand side."""

    def __init__(self) -> None:
        self._cost: list[float] = []
        self._upper: list[float] = []
        self._integer: list[bool] = []
        self._rows: list[int] = []
        self._cols: list[int] = []
        self._values: list[float] = []
        self._lower: list[float] = []
        self._row_upper: list[float] = []

    @property
    def num_columns(self) -> int:
        return len(self._cost)

    def column(self, *, cost: float = 0.0, upper: float = 1.0, integer: bool = False) -> int:
        """A new column in ``[0, upper]``."""
        self._cost.append(cost)
        self._upper.append(upper)
        self._integer.append(integer)
        return len(self._cost) - 1

    def row(self, terms: Iterable[Term], *, lower: float = -np.inf, upper: float = np.inf) -> None:
        """``lower ≤ Σ factor · column ≤ upper``. A column may be named more than once."""
        factors: dict[int, float] = {}
        shift = 0.0
        for col, factor in terms:
            if col == ALWAYS:
                shift += factor
            elif col != ABSENT:
                factors[col] = factors.get(col, 0.0) + factor
        if not factors and lower <= shift <= upper:
            return
        self._rows.extend([len(self._lower)] * len(factors))
        self._cols.extend(factors)
        self._values.extend(factors.values())
        self._lower.append(lower - shift)
        self._row_upper.append(upper - shift)

    def build(self, hint: Mapping[int, float]) -> MixedIntegerProgram:
        return MixedIntegerProgram(
            cost=np.array(self._cost, dtype=np.float64),
            upper=np.array(self._upper, dtype=np.float64),
            integer=np.array(self._integer, dtype=bool),
            rows=np.array(self._rows, dtype=np.int64),
            cols=np.array(self._cols, dtype=np.int64),
            values=np.array(self._values, dtype=np.float64),
            row_lower=np.array(self._lower, dtype=np.float64),
            row_upper=np.array(self._row_upper, dtype=np.float64),
            hint_cols=np.array(list(hint), dtype=np.int64),
            hint_values=np.array(list(hint.values()), dtype=np.float64),
        )


Affine = tuple[int, int]
"""``(column, constant)`` is their sum; :data:`ABSENT` as column is the constant alone."""


class ConstraintProgram:
    """A CP-SAT model as lists, ready for JSON. Columns are numbered from 0.

    A *literal* is a column of domain 0, 1.
    """

    def __init__(self) -> None:
        self.domains: list[list[int]] = []
        """Of each column, flattened: first and last of each stretch of values."""
        self.linear: list[tuple[list[int], list[int], int, list[int]]] = []
        self.clauses: list[tuple[list[int], list[int]]] = []
        self.intervals: list[tuple[Affine, Affine, Affine, int]] = []
        self.cumulatives: list[tuple[list[int], list[int], Affine]] = []
        self.objective: list[tuple[int, int]] = []
        self.hint: dict[int, int] = {}

    def between(self, lower: int, upper: int) -> int:
        """A column with a whole value from ``lower`` to ``upper``."""
        self.domains.append([lower, upper])
        return len(self.domains) - 1

    def literal(self) -> int:
        return self.between(0, 1)

    def whole(self, values: Iterable[int]) -> int:
        """A column that takes one of ``values``."""
        self.domains.append([end for value in sorted(set(values)) for end in (value, value)])
        return len(self.domains) - 1

    def at_least(self, terms: Iterable[tuple[Affine, int]], lower: int, only_if: list[int]) -> None:
        """``Σ factor · affine ≥ lower``, where all literals of ``only_if`` hold."""
        cols, factors, shift = [], [], 0
        for (col, constant), factor in terms:
            shift += factor * constant
            if col != ABSENT:
                cols.append(col)
                factors.append(factor)
        self.linear.append((cols, factors, lower - shift, only_if))

    def some(self, literals: list[int], only_if: list[int]) -> None:
        """One of ``literals`` holds, where all of ``only_if`` do."""
        self.clauses.append((literals, only_if))

    def length(self, start: Affine, end: Affine, longest: int) -> Affine:
        """``end - start`` where that is nothing but a column and a constant, else a new column."""
        if start[0] == ABSENT:
            return end[0], end[1] - start[1]
        return self.between(0, longest), 0

    def interval(self, start: Affine, size: Affine, end: Affine, present: int) -> int:
        """``[start, end)``, optional unless ``present`` is :data:`ALWAYS`; its number."""
        self.intervals.append((start, size, end, present))
        return len(self.intervals) - 1

    def cumulative(self, intervals: list[int], demands: list[int], capacity: Affine) -> None:
        """At no moment do the demands of the intervals around it exceed ``capacity``."""
        self.cumulatives.append((intervals, demands, capacity))

    def as_json(self) -> dict[str, object]:
        return {**vars(self), "hint": list(self.hint.items())}
