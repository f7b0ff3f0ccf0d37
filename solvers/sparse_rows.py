"""Collect the rows of a sparse model in batches."""

from __future__ import annotations

from collections.abc import Iterable

import highspy
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array

from .arrays import IntArray

ABSENT = -1  # not a column: the value is 0
ALWAYS = -2  # not a column: the value is 1

ColumnArray = NDArray[np.int32]


class Rows:
    """Rows whose columns may be :data:`ABSENT` or :data:`ALWAYS`."""

    def __init__(self) -> None:
        self.rows: list[IntArray] = []
        self.cols: list[IntArray] = []
        self.values: list[NDArray[np.float64]] = []
        self.lower: list[NDArray[np.float64]] = []
        self.upper: list[NDArray[np.float64]] = []
        self.num = 0

    def add(self, terms: Iterable[tuple[ColumnArray, float]], lower: NDArray[np.float64]) -> None:
        """Add one row ``Σ factor column ≥ lower`` for each place of the columns."""
        shift = np.zeros(len(lower))
        index = np.arange(self.num, self.num + len(lower))
        for cols, factor in terms:
            shift += np.where(cols == ALWAYS, factor, 0.0)
            real = cols >= 0
            self.rows.append(index[real])
            self.cols.append(cols[real].astype(np.int64))
            self.values.append(np.full(int(real.sum()), factor))
        self.lower.append(lower - shift)
        self.upper.append(np.full(len(lower), highspy.kHighsInf))
        self.num += len(lower)

    def add_one(self, cols: ColumnArray, factors: NDArray[np.float64], upper: float) -> None:
        """Add a single row ``Σ factors cols ≤ upper``."""
        shift = float(factors[cols == ALWAYS].sum())
        real = cols >= 0
        self.rows.append(np.full(int(real.sum()), self.num, dtype=np.int64))
        self.cols.append(cols[real].astype(np.int64))
        self.values.append(factors[real])
        self.lower.append(np.array([-highspy.kHighsInf]))
        self.upper.append(np.array([upper - shift]))
        self.num += 1

    def matrix(self, num_cols: int) -> coo_array:
        """Return all rows as a matrix."""
        return coo_array(
            (
                np.concatenate([*self.values, np.zeros(0)]),
                (
                    np.concatenate([*self.rows, np.zeros(0, dtype=np.int64)]),
                    np.concatenate([*self.cols, np.zeros(0, dtype=np.int64)]),
                ),
            ),
            shape=(self.num, num_cols),
        )
