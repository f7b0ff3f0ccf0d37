"""The numbers of a comparison's figures: points and regions from its rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..comparison_record import ComparisonRecord, ComparisonRow

ROUNDING = 1e-9
"""Overheads and bounds are quotients of the same times, rounded once each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A row's point in a figure.

    Parameters
    ----------
    peak_bytes
        Peak of the whole step.
    overhead
        Extra time as a fraction of the unplanned step.
    quartiles
        Quartiles of a measured overhead; both equal to a predicted one.
    """

    peak_bytes: int
    overhead: float
    quartiles: tuple[float, float]


def predicted_point(row: ComparisonRow) -> Point | None:
    """The point by replay; ``None`` if the row has no figures.

    A schedule that failed when it was executed has its error and its prediction.
    """
    peak, overhead = row.predicted_peak_bytes, row.overhead
    if peak is None or overhead is None or not math.isfinite(overhead):
        return None
    return Point(peak_bytes=peak, overhead=overhead, quartiles=(overhead, overhead))


def measured_point(row: ComparisonRow) -> Point | None:
    """The point by real steps, paired with eager's; ``None`` if none were timed."""
    step = row.measured
    if row.error or step is None or not math.isfinite(step.ratio):
        return None
    low, high = (q - 1 if math.isfinite(q) else step.ratio - 1 for q in step.quartiles)
    return Point(peak_bytes=step.peak_bytes, overhead=step.ratio - 1, quartiles=(low, high))


def curves(rows: Iterable[ComparisonRow], *, measured: bool = False) -> dict[str, list[Point]]:
    """For each strategy or peer, its points by peak; equal ones once.

    A row that misses its budget is still a schedule with a peak and a time. It is
    included, unless the strategy has another one that needs neither more memory nor more
    time.
    """
    met: dict[str, dict[Point, None]] = {}
    missed: dict[str, dict[Point, None]] = {}
    for row in rows:
        point = measured_point(row) if measured else predicted_point(row)
        if point is not None:
            own = (missed if row.fits is False else met).setdefault(row.strategy, {})
            own[point] = None
    result: dict[str, list[Point]] = {}
    for name in [*met, *(name for name in missed if name not in met)]:
        every = [*met.get(name, {}), *missed.get(name, {})]
        worth = [p for p in missed.get(name, {}) if not any(_beats(q, p) for q in every)]
        result[name] = sorted(
            {*met.get(name, {}), *worth}, key=lambda p: (p.peak_bytes, -p.overhead)
        )
    return result


def _beats(one: Point, other: Point) -> bool:
    """Whether ``one`` needs no more of anything, and less of something."""
    mine, others = (one.peak_bytes, one.overhead), (other.peak_bytes, other.overhead)
    return mine != others and mine[0] <= others[0] and mine[1] <= others[1]


def staircase(points: Iterable[Point]) -> list[Point]:
    """The points that are best within some budget, by peak: each takes less time than the last.

    Within a budget between two of them, the left one is the best; no plan between them
    is claimed.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.peak_bytes, p.overhead)):
        if not best or point.overhead < best[-1].overhead:
            best.append(point)
    return best


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreachable:
    """The region proven unreachable: below ``tops``, strip by strip.

    Parameters
    ----------
    edges_bytes
        Borders of the strips, ascending from 0; one more than ``tops``.
    tops
        For each strip, the lower bound on the overhead of schedules with a peak in it;
        infinite if no schedule has such a peak. A peak at a border belongs to the strip
        on its left, except for the border of the infinite strip, which some schedule may
        have.
    """

    edges_bytes: tuple[int, ...]
    tops: tuple[float, ...]

    def covers(self, peak_bytes: int, overhead: float) -> bool:
        """Whether a schedule with these figures is proven to be impossible."""
        for right, top in zip(self.edges_bytes[1:], self.tops):
            if peak_bytes < right or (peak_bytes == right and math.isfinite(top)):
                return overhead < top - ROUNDING
        return False


def unreachable(comparison: ComparisonRecord) -> Unreachable:
    """Return exactly the region that the comparison's bounds prove unreachable.

    A bound at a budget holds for every peak up to it, so between two budgets the bound at
    the upper one is proven. Right of the highest budget nothing is proven.
    """
    base_us = comparison.baseline_step_us
    least = comparison.least_bound_bytes
    at: dict[int, float] = {}
    for bound in comparison.bounds:
        if bound.lower_bound_us is not None and base_us > 0 and bound.budget_bytes > least:
            top = max(0.0, bound.lower_bound_us / base_us - 1)
            at[bound.budget_bytes] = max(top, at.get(bound.budget_bytes, 0.0))
    edges, tops, highest = [], [], 0.0
    for budget in sorted(at, reverse=True):
        highest = max(highest, at[budget])
        edges.append(budget)
        tops.append(highest)
    if least > 0:
        return Unreachable(
            edges_bytes=(0, least, *reversed(edges)), tops=(math.inf, *reversed(tops))
        )
    return Unreachable(edges_bytes=(0, *reversed(edges)), tops=tuple(reversed(tops)))
