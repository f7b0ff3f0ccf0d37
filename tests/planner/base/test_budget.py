"""The budget as people write it, and the error when nothing fits."""

from __future__ import annotations

import math

import pytest

from planner import InfeasibleBudgetError, PlanError, optimize
from planner.base.budget import parse_budget
from tests.planner.small import make, sample, square


@pytest.mark.parametrize(
    ("budget_gb", "budget_bytes", "expected"),
    [
        (40, None, 40 * 10**9),
        (0.5, None, 500_000_000),
        ("40GiB", None, 40 * 2**30),
        ("40 gib", None, 40 * 2**30),
        ("1.5", None, 1_500_000_000),
        ("300MB", None, 300_000_000),
        (None, 12345, 12345),
        (None, 2**53, 2**53),
    ],
)
def test_a_budget_in_each_way(budget_gb, budget_bytes, expected):
    """A number counts GB of 10^9 bytes, a string names its unit, bytes are bytes."""
    assert parse_budget(budget_gb, budget_bytes) == expected


@pytest.mark.parametrize(("budget_gb", "budget_bytes"), [(None, None), (1, 1), ("1GB", 5), (0, 0)])
def test_the_budget_is_given_once(budget_gb, budget_bytes):
    """None and both are refused with the three ways to write it."""
    with pytest.raises(ValueError, match=r"give the budget once.*budget_bytes"):
        parse_budget(budget_gb, budget_bytes)


@pytest.mark.parametrize(
    "amount",
    [0, -1, 0.0, math.nan, math.inf, -math.inf, True, "", "x", "4 parsecs", "-1GB", [1], 1j],
)
def test_what_is_no_amount_is_refused(amount):
    """Neither way takes what is not a positive, finite amount, and the message repeats it."""
    for ways in ((amount, None), (None, amount)):
        with pytest.raises(ValueError, match=r"amount of memory|unknown unit"):
            parse_budget(*ways)


@pytest.mark.parametrize(
    ("budget_gb", "budget_bytes", "words"),
    [(None, 1.5, "budget_bytes=1.5 is no whole"), (0, None, "budget_gb=0: .*write budget_gb=40")],
)
def test_a_wrong_budget_names_the_argument(budget_gb, budget_bytes, words):
    """The message says which argument was wrong and how to write it; bytes are not cut."""
    with pytest.raises(ValueError, match=words):
        parse_budget(budget_gb, budget_bytes)
    assert parse_budget(None, 2e9) == 2 * 10**9


@pytest.fixture(scope="module")
def error() -> InfeasibleBudgetError:
    """What a budget of 1 kB gives."""
    with pytest.raises(InfeasibleBudgetError) as caught:
        optimize(make(), sample(), budget_bytes=1000, loss_fn=square, time_limit_s=1)
    return caught.value


def test_an_infeasible_budget_has_its_figures(error):
    """Budget, least known and lower bound are fields, in that order of size."""
    assert isinstance(error, PlanError)
    assert error.budget_bytes == 1000
    assert error.budget_bytes < error.lower_bound_bytes <= error.min_budget_bytes


def test_the_message_says_what_to_do(error):
    """It has the least budget to the byte, the operator that holds it up, and advice."""
    text = str(error)
    assert f"budget_bytes={error.min_budget_bytes}" in text
    for part in ("(1000 bytes)", "no schedule needs less than", "What holds it up: '", "resident"):
        assert part in text


def test_the_least_budget_is_feasible(error):
    """Asked for, it gives a plan that needs all of it at most."""
    plan = optimize(
        make(), sample(), budget_bytes=error.min_budget_bytes, loss_fn=square, time_limit_s=1
    )
    assert plan.predicted_peak_bytes <= error.min_budget_bytes


def test_below_the_lower_bound_nothing_fits(error):
    """One byte less than the bound is refused again."""
    with pytest.raises(InfeasibleBudgetError):
        optimize(
            make(),
            sample(),
            budget_bytes=error.lower_bound_bytes - 1,
            loss_fn=square,
            time_limit_s=1,
        )
