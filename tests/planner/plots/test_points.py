from __future__ import annotations

import math
from dataclasses import replace

import pytest

from planner.comparison_record import ComparisonRow
from planner.plots.points import (
    curves,
    measured_point,
    predicted_point,
    staircase,
    unreachable,
)
from solvers.replay import replay
from solvers.strategies import STRATEGIES, StrategyError, apply_strategy
from tests.solvers.graphs import exhaustive_optimum, least_memory_exact, random_step

from .made import MB, bound, comparison, row, step


def test_region_is_the_bound_of_the_next_budget_to_the_right() -> None:
    """Between two budgets the upper one's bound is proven; left of the least peak all."""
    found = unreachable(comparison(bounds=(bound(60 * MB, 0.1), bound(40 * MB, 0.3))))
    assert found.edges_bytes == (0, 30 * MB, 40 * MB, 60 * MB)
    assert found.tops == pytest.approx((math.inf, 0.3, 0.1))


@pytest.mark.parametrize(
    ("peak_mb", "overhead", "covered"),
    [
        (29, 9.0, True),  # below the least peak
        (30, 0.3, False),  # at it, and at the bound
        (30, 0.29, True),
        (40, 0.29, True),  # a budget is within its own bound
        (40, 0.3, False),
        (41, 0.29, False),  # more than 40: only the bound of 60 speaks of it
        (60, 0.09, True),
        (61, 0.0, False),
    ],
)
def test_region_covers_what_is_proven_and_no_more(
    peak_mb: int, overhead: float, covered: bool
) -> None:
    """A point at a budget is bound by it, a point one byte above is not."""
    region = unreachable(comparison(bounds=(bound(40 * MB, 0.3), bound(60 * MB, 0.1))))
    assert region.covers(peak_mb * MB, overhead) is covered


def test_a_higher_budgets_stronger_bound_holds_below_it() -> None:
    """A solve that ended early at a low budget inherits what is proven of a higher one."""
    region = unreachable(comparison(bounds=(bound(40 * MB, 0.1), bound(60 * MB, 0.2))))
    assert region.tops == pytest.approx((math.inf, 0.2, 0.2))


def test_budgets_without_a_bound_and_below_the_least_peak_add_nothing() -> None:
    """Where nothing fits there is no bound to draw, and left of the least peak none is needed."""
    found = unreachable(comparison(bounds=(bound(20 * MB, 0.5), bound(40 * MB, None))))
    assert found.edges_bytes == (0, 30 * MB)
    assert found.tops == (math.inf,)


@pytest.mark.parametrize("seed", range(6))
def test_region_never_covers_a_schedule(seed: int) -> None:
    """With the true optimum as the bound no strategy's point lies in the shaded region."""
    graph = random_step(seed, max_layers=2)
    base = graph.base_cost_ns
    most = replay(graph, apply_strategy(STRATEGIES["none"], graph).schedule).peak_bytes
    least = least_memory_exact(graph)
    bounds, rows = [], []
    for budget in range(least, most + 1, max(1, (most - least) // 3)):
        optimum = exhaustive_optimum(graph, budget)
        if optimum is None:
            continue
        bounds.append(bound(budget, optimum / base - 1))
        for name in ("none", "uniform_bytes", "linearized_sqrt", "dtr"):
            try:
                outcome = apply_strategy(STRATEGIES[name], graph, budget_bytes=budget)
            except StrategyError:
                continue
            rows.append(row(name, outcome.peak_bytes, outcome.cost_ns / base - 1))
    found = replace(comparison(*rows, bounds=tuple(bounds)), least_bound_bytes=least)
    region = unreachable(found)
    assert rows
    assert not [r for r in rows if region.covers(r.predicted_peak_bytes or 0, r.overhead or 0.0)]


def test_rows_without_figures_have_no_point() -> None:
    """Errors, missing figures and steps that were not timed stand nowhere."""
    nan = float("nan")
    untimed = row("a", MB, 0.1, measured=step(MB, nan, num_pairs=0))
    assert predicted_point(untimed) is not None
    assert measured_point(untimed) is None
    assert predicted_point(row("a", MB, nan)) is None
    assert predicted_point(ComparisonRow(strategy="a")) is None
    assert measured_point(ComparisonRow(strategy="a")) is None


def test_a_schedule_that_failed_when_it_ran_keeps_its_prediction() -> None:
    """The error of a row is of its execution where there is a prediction."""
    failed = row("a", MB, 0.1, error="out of memory when it ran")
    point = predicted_point(failed)
    assert point is not None
    assert (point.peak_bytes, point.overhead) == (MB, 0.1)
    assert measured_point(failed) is None


def test_staircase_has_the_best_of_each_budget() -> None:
    """What takes more time than a plan of a lower peak, or of the same, is no step."""
    points = curves(row("a", peak, o) for peak, o in ((1, 0.4), (2, 0.5), (3, 0.1), (3, 0.2)))["a"]
    assert [(p.peak_bytes, p.overhead) for p in staircase(points)] == [(1, 0.4), (3, 0.1)]
    assert staircase([]) == []


def test_measured_point_is_beside_eager() -> None:
    """Overhead and quartiles are ratios less one."""
    point = measured_point(row("a", MB, 0.1, measured=step(2 * MB, 1.3)))
    assert point is not None
    assert point.peak_bytes == 2 * MB
    assert (point.overhead, *point.quartiles) == pytest.approx((0.3, 0.29, 0.32))


def test_curves_go_by_peak_and_have_equal_points_once() -> None:
    """A strategy's rows of several budgets become one curve from the least peak on."""
    rows = [row("a", 3, 0.1), row("b", 5, 0.2), row("a", 1, 0.4), row("a", 3, 0.1)]
    drawn = {name: [(p.peak_bytes, p.overhead) for p in own] for name, own in curves(rows).items()}
    assert drawn == {"a": [(1, 0.4), (3, 0.1)], "b": [(5, 0.2)]}


def test_a_missed_budget_that_is_beaten_is_left_out() -> None:
    """What did not fit is drawn unless the strategy has something better in both respects."""
    rows = [row("a", 3, 0.1), row("a", 3, 0.5, fits=False), row("a", 2, 0.7, fits=False)]
    assert [(p.peak_bytes, p.overhead) for p in curves(rows)["a"]] == [(2, 0.7), (3, 0.1)]
