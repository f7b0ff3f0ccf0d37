"""Fit two joined lines to points: the least squares that the package pwlf approximates.

PyTorch's module program takes the curve of a module, discarded memory against repeated time, as
two lines from ``pwlf.PiecewiseLinFit``, which looks for the joint by differential evolution, an
unseeded random search. Here the joint is found exactly (Hudson, "Fitting segmented curves whose
join points have to be estimated", JASA 1966): between two neighbouring points the best joint is
where the lines through the points on either side meet, or else one of the two points.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

Floats = np.ndarray


class TwoLines:
    """One line, or two that meet, with the least sum of squared distances in ``y``.

    Has of ``pwlf.PiecewiseLinFit`` what PyTorch calls.

    Parameters
    ----------
    x, y
        The points; ``x`` from the lowest up.
    """

    def __init__(self, x: Sequence[float], y: Sequence[float]) -> None:
        self._x, self._y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
        self.intercepts: Floats = np.zeros(0)
        self.fit_breaks: Floats = np.zeros(0)
        self._slopes: Floats = np.zeros(0)

    def fit(self, n_segments: int) -> Floats:
        """Fit one line or two; returns where they begin and end.

        Raises
        ------
        ValueError
            When more lines are asked for.
        """
        if n_segments not in (1, 2):
            raise ValueError(f"one line or two can be fitted, not {n_segments}")
        first, last = self._x[0], self._x[-1]
        joints = list(self._joints()) if n_segments == 2 else []
        found = [self._fitted(joint) for joint in joints] or [self._fitted(None)]
        _, at, (level, slope, bend) = min(found, key=lambda one: one[0])
        start = level - slope * first
        if n_segments == 1 or at is None:
            self._slopes, self.intercepts = np.array([slope]), np.array([start])
            self.fit_breaks = np.array([first, last])
        else:
            self._slopes = np.array([slope, slope + bend])
            self.intercepts = np.array([start, start - bend * at])
            self.fit_breaks = np.array([first, at, last])
        return self.fit_breaks

    def calc_slopes(self) -> Floats:
        """Return the slopes of the lines."""
        return self._slopes

    def _fitted(self, at: float | None) -> tuple[float, float | None, Floats]:
        """The squared distances with a joint there, and level, slope and bend of the lines."""
        x, first = self._x, self._x[0]
        bend = np.zeros_like(x) if at is None else np.maximum(x - at, 0.0)
        columns = np.stack([np.ones_like(x), x - first, bend], axis=1)
        # A column of zeros, or a lone point, has no part in the least of all solutions.
        found, *_ = np.linalg.lstsq(columns, self._y, rcond=None)
        return float(((columns @ found - self._y) ** 2).sum()), at, found

    def _joints(self) -> Iterator[float]:
        """Where the best joint may be."""
        x, y = self._x, self._y
        yield from x[1:-1]
        for cut in range(2, len(x) - 1):
            (b, a), (d, c) = (
                _line(x[part], y[part]) for part in (slice(None, cut), slice(cut, None))
            )
            if b != d and x[cut - 1] < (meet := (c - a) / (b - d)) < x[cut]:
                yield meet


def _line(x: Floats, y: Floats) -> tuple[float, float]:
    """Slope and intercept of the least squares."""
    around = x - x.mean()
    square = float((around**2).sum())
    slope = float((around * y).sum()) / square if square else 0.0
    return slope, float(y.mean()) - slope * float(x.mean())
