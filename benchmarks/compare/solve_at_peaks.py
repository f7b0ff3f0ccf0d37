"""Solve ours at the peaks of others' schedules, if the comparison's own budgets do not decide.

A comparison solves ours at a few budgets. A schedule of another strategy with a peak
between two of them may take less time than our plan at the lower one, and still be no
better than what we would find at its own peak. So each such point is decided: ours is
solved with that peak as its budget.

A point is a peak and a time, by replay; several strategies, or one at several budgets,
may have the same point. Only points that no other point of theirs dominates need a
solve: a plan at least as good as these is also as good as those that they dominate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from planner.comparing.budgets import NamedBudget
from planner.comparing.comparison import Comparison
from planner.comparing.predict import Predictor
from solvers.result import OPTIMAL_GAP
from solvers.strategies.solved import AUTO


class AtPeak(StrEnum):
    """Ours against a point of others, at that point's peak."""

    AT_MOST = "at_most"  # theirs, in time
    WITHIN = "within"  # OPTIMAL_GAP of it
    BELOW = "below"  # theirs takes less time
    NOTHING_FOUND = "nothing_found"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A predicted peak and a predicted time, and whose schedules have them."""

    peak_bytes: int
    step_us: float
    strategies: tuple[str, ...] = ()

    def covers(self, other: Point, tolerance: float = 0.0) -> bool:
        """Whether it needs no more memory and, within the tolerance, no more time."""
        return self.peak_bytes <= other.peak_bytes and self.step_us <= other.step_us * (
            1 + tolerance
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SolvedAtPeak:
    """Ours at the peak of one point of others.

    Parameters
    ----------
    strategies, peak_bytes, theirs_us
        The point.
    ours_peak_bytes, ours_us
        Our plan with that peak as its budget; ``None`` if nothing was found.
    bound_us
        No schedule in eager's order within that peak takes less; ``None`` if nothing fits.
    error
        Why nothing of ours was found.
    """

    strategies: tuple[str, ...]
    peak_bytes: int
    theirs_us: float
    ours_peak_bytes: int | None
    ours_us: float | None
    bound_us: float | None
    error: str = ""

    @property
    def verdict(self) -> AtPeak:
        """The verdict from the figures."""
        if self.ours_us is None:
            return AtPeak.NOTHING_FOUND
        if self.ours_us <= self.theirs_us:
            return AtPeak.AT_MOST
        within = self.ours_us <= self.theirs_us * (1 + OPTIMAL_GAP)
        return AtPeak.WITHIN if within else AtPeak.BELOW

    @property
    def words(self) -> str:
        """The verdict in words, with figures and reason."""
        if self.verdict is AtPeak.AT_MOST:
            return "ours at most theirs"
        if self.verdict is AtPeak.WITHIN:
            return f"ours within {OPTIMAL_GAP:.2%} of theirs"
        if self.ours_us is None:
            return f"below ours: {self.error}"
        gap = self.bound_us and f"; our proven gap is {self.ours_us / self.bound_us - 1:.3%}"
        return f"below ours by {1 - self.theirs_us / self.ours_us:.3%} of our time{gap or ''}"


def took_part(comparison: Comparison) -> bool:
    """Whether ours has a row at a budget, so that there is a curve of ours."""
    return any(
        r.strategy == comparison.ours and r.budget_bytes is not None for r in comparison.rows
    )


def points_of_others(comparison: Comparison) -> list[Point]:
    """The distinct points of all other strategies, by peak; including those over a budget."""
    whose: dict[tuple[int, float], dict[str, None]] = {}
    for row in comparison.rows:
        if row.kind != "strategy" or row.strategy == comparison.ours:
            continue
        if row.predicted_peak_bytes is not None and row.predicted_step_us is not None:
            point = (row.predicted_peak_bytes, row.predicted_step_us)
            whose.setdefault(point, {})[row.strategy] = None
    return [
        Point(peak_bytes=peak, step_us=us, strategies=tuple(names))
        for (peak, us), names in sorted(whose.items())
    ]


def points_of_ours(comparison: Comparison, solved: Sequence[SolvedAtPeak] = ()) -> list[Point]:
    """Our plans of the comparison, and those that were found at others' peaks."""
    found = [
        Point(peak_bytes=row.predicted_peak_bytes, step_us=row.predicted_step_us)
        for row in comparison.rows
        if row.strategy == comparison.ours
        and row.predicted_peak_bytes is not None
        and row.predicted_step_us is not None
    ]
    return found + [
        Point(peak_bytes=one.ours_peak_bytes, step_us=one.ours_us)
        for one in solved
        if one.ours_peak_bytes is not None and one.ours_us is not None
    ]


def uncovered(
    others: Sequence[Point], ours: Sequence[Point], tolerance: float = OPTIMAL_GAP
) -> list[Point]:
    """The points of others that no plan of ours matches within the tolerance."""
    return [point for point in others if not any(our.covers(point, tolerance) for our in ours)]


def points_to_solve(comparison: Comparison) -> list[Point]:
    """The points that need a solve: uncovered, and dominated by no other point of others."""
    others = points_of_others(comparison)
    return [
        point
        for point in uncovered(others, points_of_ours(comparison))
        if not any(other is not point and other.covers(point) for other in others)
    ]


def solve_at_peaks(
    comparison: Comparison, predictor: Predictor, say: Callable[[str], None]
) -> list[SolvedAtPeak]:
    """Ours at the peak of each point that the comparison leaves open.

    Parameters
    ----------
    predictor
        The predictor of the same step; it solves as the comparison did.
    say
        Is told which point is next.

    Raises
    ------
    ValueError
        When the predictor is for a step other than the comparison's.
    """
    if predictor.graph.fingerprint != comparison.fingerprint:
        raise ValueError(
            f"the comparison is of step {comparison.fingerprint}, and the step to solve is "
            f"{predictor.graph.fingerprint}: capture and compare again"
        )
    points = points_to_solve(comparison) if took_part(comparison) else []
    found = []
    for i, point in enumerate(points):
        say(f"settling {i + 1}/{len(points)}: ours at the peak of {', '.join(point.strategies)}")
        budget = NamedBudget(label=f"{point.peak_bytes}B", num_bytes=point.peak_bytes)
        row = predictor.predicted(AUTO, budget).row
        bound_us = predictor.bound_of(budget).lower_bound_us
        found.append(
            SolvedAtPeak(
                strategies=point.strategies,
                peak_bytes=point.peak_bytes,
                theirs_us=point.step_us,
                ours_peak_bytes=row.predicted_peak_bytes,
                ours_us=row.predicted_step_us,
                bound_us=bound_us,
                error=row.error,
            )
        )
    return found
