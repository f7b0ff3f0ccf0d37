"""Ours at the peaks of others' points: which need a solve, and what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.compare.solve_at_peaks import (
    AtPeak,
    Point,
    points_of_others,
    points_to_solve,
    solve_at_peaks,
)
from planner.base.solve_options import SolveOptions
from planner.comparing.budgets import NamedBudget
from planner.comparing.comparison import Comparison
from planner.comparing.predict import Predictor
from planner.comparison_record import ComparisonRow
from solvers.least_memory import least_memory
from solvers.strategies import STRATEGIES
from tests.solvers.strategy_graphs import layered, unit_chain

GRAPH = layered(8)


def predictor() -> Predictor:
    return Predictor(
        GRAPH,
        GRAPH.base_cost_ns / 1e3,
        least_memory(GRAPH, time_limit_s=1.0),
        SolveOptions(time_limit_s=1.0, gap=1e-4, seed=0, workers=1),
    )


def row(
    strategy: str, peak_bytes: int, step_us: float, budget_bytes: int | None = None
) -> ComparisonRow:
    return ComparisonRow(
        strategy=strategy,
        budget="" if budget_bytes is None else f"{budget_bytes}B",
        budget_bytes=budget_bytes,
        fits=None if budget_bytes is None else peak_bytes <= budget_bytes,
        predicted_peak_bytes=peak_bytes,
        predicted_step_us=step_us,
    )


def comparison(*rows: ComparisonRow) -> Comparison:
    return Comparison(
        model="chain",
        rows=rows,
        bounds=(),
        baseline_peak_bytes=100,
        baseline_step_us=GRAPH.base_cost_ns / 1e3,
        least_bytes=1,
        least_bound_bytes=1,
        device="cpu",
        cost_model="roofline",
        fingerprint=GRAPH.fingerprint,
        seed=0,
    )


def test_points_are_distinct_and_know_whose_they_are() -> None:
    """Three rows of two strategies with one peak and time are one point, over a budget or not."""
    found = points_of_others(
        comparison(row("a", 50, 9.0), row("a", 50, 9.0, 40), row("b", 50, 9.0), row("auto", 1, 1.0))
    )
    assert found == [Point(peak_bytes=50, step_us=9.0, strategies=("a", "b"))]


def test_only_open_points_that_no_other_dominates_are_solved() -> None:
    """Covered by ours: 90; dominated by another of theirs: 60; so 50 is left."""
    found = points_to_solve(
        comparison(
            row("auto", 80, 10.0, 80),
            row("auto", 40, 20.0, 40),
            row("a", 50, 12.0),
            row("b", 60, 13.0),
            row("c", 90, 10.0),
        )
    )
    assert [point.strategies for point in found] == [("a",)]


def test_a_difference_that_counts_as_optimal_leaves_nothing_open() -> None:
    """Ours may take 0.01 % longer; 0.02 % is open."""
    ours = row("auto", 50, 10.0, 50)
    assert points_to_solve(comparison(ours, row("a", 50, 10.0 * (1 - 0.9e-4)))) == []
    assert len(points_to_solve(comparison(ours, row("a", 50, 10.0 * (1 - 2e-4))))) == 1


def test_ours_is_solved_at_the_peak_of_the_point() -> None:
    """A rival between our budgets is met at its own peak; one that no schedule reaches is not."""
    solver = predictor()
    rival = solver.predicted(STRATEGIES["transformers_per_layer"], None).row
    assert rival.predicted_peak_bytes is not None
    assert rival.predicted_step_us is not None
    roomy = NamedBudget(label="roomy", num_bytes=1000)
    ours = solver.predicted(STRATEGIES["auto"], roomy).row
    said: list[str] = []
    (found,) = solve_at_peaks(comparison(rival, ours), solver, said.append)
    assert said == ["settling 1/1: ours at the peak of transformers_per_layer"]
    assert found.verdict is AtPeak.AT_MOST
    assert found.peak_bytes == rival.predicted_peak_bytes
    assert found.ours_peak_bytes is not None
    assert found.ours_us is not None
    assert found.bound_us is not None
    assert found.ours_peak_bytes <= rival.predicted_peak_bytes
    assert found.bound_us <= found.ours_us <= rival.predicted_step_us
    impossible = replace(rival, predicted_step_us=0.5 * rival.predicted_step_us)
    (lost,) = solve_at_peaks(comparison(impossible, ours), solver, said.append)
    assert lost.verdict is AtPeak.BELOW
    assert "our proven gap is" in lost.words


def test_where_nothing_is_found_the_point_stays_below_ours() -> None:
    """With the reason."""
    solver = predictor()
    impossible = row("a", 1, 1.0)
    (found,) = solve_at_peaks(
        comparison(impossible, row("auto", 80, 10.0, 80)), solver, lambda words: None
    )
    assert found.verdict is AtPeak.NOTHING_FOUND
    assert found.words.startswith("below ours: proven: nothing fits in 1 bytes")
    assert (found.ours_us, found.bound_us) == (None, None)


def test_without_ours_there_is_nothing_to_settle() -> None:
    """There is no curve that a point could be below."""
    assert solve_at_peaks(comparison(row("a", 50, 12.0)), predictor(), lambda words: None) == []


def test_another_step_settles_nothing() -> None:
    """Its bytes and times are others; both fingerprints are named."""
    other = replace(comparison(), fingerprint=unit_chain(3).fingerprint)
    with pytest.raises(ValueError, match=GRAPH.fingerprint):
        solve_at_peaks(other, predictor(), lambda words: None)
