"""Predicted peaks hold on a card."""

from __future__ import annotations

import pytest

from benchmarks.device_check.bench import Bench
from benchmarks.device_check.memory import check_planned, check_unplanned
from benchmarks.device_check.results import ERROR_ALLOWED

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


@pytest.mark.parametrize("where", [0.8, 0.6, 0.4, "least"])
def test_a_planned_step_is_within_its_budget_and_as_predicted(
    bench: Bench, where: float | str
) -> None:
    """``max_memory_allocated`` is never above the budget and within 2 % of the prediction."""
    row = check_planned(bench, where)
    if row.infeasible:
        pytest.skip(row.infeasible)
    assert row.measured_bytes <= row.budget_bytes
    assert row.predicted_bytes == pytest.approx(row.measured_bytes, rel=ERROR_ALLOWED)


def test_the_unplanned_step_is_as_predicted(bench: Bench) -> None:
    """Within 5 %: eager's autocast cache holds casts that no graph knows of."""
    row = check_unplanned(bench)
    assert row.predicted_bytes == pytest.approx(row.measured_bytes, rel=0.05)


def test_the_allocator_holds_at_least_what_it_hands_out(bench: Bench) -> None:
    """Fragmentation is read from the same step and is no negative number."""
    row = check_planned(bench, 0.8)
    assert row.allocator_bytes is not None
    assert row.allocator_bytes >= row.measured_bytes * (1 - ERROR_ALLOWED)
    assert row.fragmentation is not None
    assert row.fragmentation >= 0
