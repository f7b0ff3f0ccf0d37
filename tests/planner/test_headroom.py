"""What of a budget a plan leaves alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from graph_capture.costs.devices import DEVICES
from planner import InfeasibleBudgetError, Plan, optimize
from planner.base.budget import (
    DEFAULT_HEADROOM,
    Budget,
    beyond_device,
    parse_headroom,
)
from planner.report import EXPANDABLE_SEGMENTS
from tests.planner.small import least_bytes, make, sample, square

GB = 10**9


@pytest.mark.parametrize(
    ("headroom", "device_type", "expected"),
    [
        (None, "cpu", 0),
        (None, "cuda", 3 * GB // 10),
        (0, "cuda", 0),
        (0.0, "cuda", 0),
        (0.25, "cpu", 25 * GB // 10),
        ("5%", "cpu", GB // 2),
        (" 0 %", "cuda", 0),
        ("2.5 %", "cpu", GB // 4),
        ("2GB", "cpu", 2 * GB),
        ("1GiB", "cpu", 2**30),
        (2_000_000, "cpu", 2_000_000),
        (2e9, "cpu", 2 * GB),
        (100, "cpu", 100),
        (10 * GB - 1, "cpu", 10 * GB - 1),
    ],
)
def test_headroom_in_each_way(headroom, device_type, expected):
    """A fraction, per cent, bytes with and without a unit, and the device's default, of 10 GB."""
    budget = parse_headroom(headroom, 10 * GB, device_type)
    assert (budget.headroom_bytes, budget.usable_bytes) == (expected, 10 * GB - expected)


@pytest.mark.parametrize(
    "headroom",
    [-0.1, -1, 1, 1.0, 1.5, 5, 99, math.nan, math.inf, -math.inf, 123.5, True, "100%", "-5%", "x",
     "", "5 %%", [0.1], "0GB", "0.05", "5", "0", "2000000000", " 1e9 "],
)  # fmt: skip
def test_what_is_no_headroom_is_refused(headroom):
    """Negative, not finite, what may be per cent or bytes without saying so, and other types."""
    with pytest.raises(ValueError, match=r"headroom is a fraction|amount of memory"):
        parse_headroom(headroom, 10 * GB, "cpu")


@pytest.mark.parametrize("headroom", [10 * GB, "10GB", "40GB", 11 * GB])
def test_headroom_that_leaves_nothing_is_refused(headroom):
    """As much as the budget or more; the message has the budget."""
    with pytest.raises(ValueError, match=r"leaves nothing of a budget of 10 GB; give less"):
        parse_headroom(headroom, 10 * GB, "cpu")


def test_a_wrong_headroom_is_refused_before_anything_runs():
    """The model is not called for an argument that makes no sense."""

    class Untouched(torch.nn.Linear):
        def forward(self, _x):
            raise AssertionError("called")

    with pytest.raises(ValueError, match="headroom is a fraction"):
        optimize(Untouched(2, 2), torch.ones(2, 2), budget_gb=1, headroom=-1)


@pytest.mark.parametrize("fraction", [0.0, 0.03, 1 / 3, 0.5, 0.97, 0.9999])
@pytest.mark.parametrize("peak_bytes", [1, 2, 970, 999, 12_345_678, 79_999_999_999])
def test_the_least_total_for_a_peak(fraction, peak_bytes):
    """The total leaves the peak, and one byte less does not."""
    total = Budget(total_bytes=1, headroom_bytes=0, fraction=fraction).total_for(peak_bytes)
    assert parse_headroom(fraction, total, "cpu").usable_bytes >= peak_bytes
    if total > 1:
        assert parse_headroom(fraction, total - 1, "cpu").usable_bytes < peak_bytes


@pytest.mark.parametrize("headroom", [0.07, "40kB"])
def test_the_least_budget_works_with_the_same_headroom(headroom):
    """What the error names is feasible with the headroom; one byte below the bound is refused."""
    options = {"loss_fn": square, "time_limit_s": 0.3, "headroom": headroom}
    with pytest.raises(InfeasibleBudgetError) as caught:
        optimize(make(), sample(), budget_bytes=50_000, **options)
    error = caught.value
    assert error.budget_bytes == 50_000
    assert error.lower_bound_bytes <= error.min_budget_bytes
    assert error.min_budget_bytes > least_bytes(make(), sample(), loss_fn=square)
    plan = optimize(make(), sample(), budget_bytes=error.min_budget_bytes, **options)
    assert plan.budget_bytes == error.min_budget_bytes
    assert plan.headroom_bytes == parse_headroom(headroom, plan.budget_bytes, "cpu").headroom_bytes
    assert plan.predicted_peak_bytes <= plan.budget_bytes - plan.headroom_bytes
    with pytest.raises(InfeasibleBudgetError):
        optimize(make(), sample(), budget_bytes=error.lower_bound_bytes - 1, **options)


def test_the_message_tells_headroom_and_peak_apart():
    """Budget, headroom, the budget to ask for and the peak that it is for."""
    least = least_bytes(make(), sample(), loss_fn=square)
    with pytest.raises(InfeasibleBudgetError) as caught:
        optimize(
            make(), sample(), budget_bytes=100_000, loss_fn=square, time_limit_s=1, headroom="10kB"
        )
    text = str(caught.value)
    assert "(100000 bytes), 10 kB of it left as headroom" in text
    assert f"budget_bytes={least + 10_000}" in text
    assert caught.value.min_budget_bytes == least + 10_000


def test_headroom_keeps_the_peak_down():
    """A budget with headroom gives a plan that peaks no higher than one with the rest."""
    keep = optimize(make(), sample(), budget_gb=1, loss_fn=square)
    budget_bytes = keep.baseline_peak_bytes
    plan = optimize(
        make(), sample(), budget_bytes=budget_bytes, loss_fn=square, time_limit_s=1, headroom=0.1
    )
    assert plan.predicted_peak_bytes <= budget_bytes - plan.headroom_bytes < budget_bytes
    assert f"({0.1:.1%}) of the budget left free" in str(plan)


def for_a100(plan: Plan, **changes) -> Plan:
    """The plan as it would read if it had been made for that card."""
    costs = replace(plan.costs, device=DEVICES["a100"].title)
    return replace(plan, device_type="cuda", costs=costs, _live=None, **changes)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan for the CPU within 1 GB."""
    return optimize(make(), sample(), budget_gb=1, loss_fn=square)


def test_the_report_calls_the_default_an_assumption(plan):
    """On CUDA it says so and how to keep fragmentation low; on CPU there is nothing to say."""
    cuda = for_a100(plan, headroom_bytes=int(DEFAULT_HEADROOM["cuda"] * GB))
    assert "30 MB (3.0%) of the budget left free: cuda's default, assumed" in str(cuda)
    assert EXPANDABLE_SEGMENTS in str(cuda)
    assert plan.headroom_bytes == 0
    assert "left free" not in str(plan)
    assert "expandable_segments" not in str(plan)


def test_another_headroom_is_not_called_the_default(plan):
    """What the user asked for is no assumption of the planner's."""
    cuda = for_a100(plan, headroom_bytes=GB // 10)
    assert "100 MB (10.0%) of the budget left free\n" in str(cuda)


class Card:
    """The part of a device that says how much memory it has."""

    title = "card"
    memory_bytes = 80 * GB
    context_bytes = GB // 2


@pytest.mark.parametrize(
    ("budget_bytes", "fits"), [(79_500_000_000, True), (79_500_000_001, False)]
)
def test_a_budget_beyond_the_device(budget_bytes, fits):
    """More than the memory less its context is told, with both."""
    said = beyond_device(budget_bytes, Card())
    assert (said is None) is fits
    if said is not None:
        assert "80 GB" in said
        assert "500 MB" in said


def test_a_device_of_unknown_memory_is_not_judged():
    """The CPU's memory is the machine's."""
    assert beyond_device(10**15, DEVICES["cpu"]) is None


def test_the_report_notes_a_budget_beyond_the_device(plan, monkeypatch):
    """print(plan) has the note, also of a plan from a file, whose card is found by its title."""
    monkeypatch.setattr("planner.report.beyond_device", lambda n, d: f"{n} {d.name}")
    assert "note: 1000000000 a100" in str(for_a100(plan))
    assert "note: 1000000000 cpu" in str(plan)
