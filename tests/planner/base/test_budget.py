"""The budget as people write it, and the error when nothing fits."""

from __future__ import annotations

import json
import math

import pytest

from planner import InfeasibleBudgetError, Plan, PlanError, optimize
from planner.base.budget import RequestedBudget, parse_budget, read_budget
from planner.planning.make_plan import replan
from planner.saving.serialize import plan_from_dict, plan_to_dict
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
    [
        (None, 1.5, "budget_bytes=1.5 is not a whole"),
        (0, None, "budget_gb=0: .*write budget_gb=40"),
    ],
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


@pytest.mark.parametrize("ways", [("60%", None, None), (None, " 60 % ", None), (None, None, "60%")])
def test_a_share_in_each_way(ways):
    """Whoever writes a percent sign means a share."""
    assert read_budget(*ways) == RequestedBudget(num_bytes=None, share=0.6)


def test_an_amount_as_text():
    """``budget`` takes what ``budget_gb`` takes, as text."""
    assert read_budget("40GiB", None, None).num_bytes == 40 * 2**30


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("0%", r"above 0% and at most 100%, got '0%'"),
        ("101%", r"above 0% and at most 100%, got '101%'"),
        ("60", r"budget='60': a number says neither a share nor a unit"),
        (0.6, r"budget=0.6: a number says neither a share nor a unit; write budget='60%' or"),
        ("lots", r"budget='lots': not an amount of memory"),
        (None, "give the budget once: budget='60%'"),
    ],
)
def test_what_is_neither_a_share_nor_an_amount_is_refused(budget, words):
    """The message says how to write one."""
    with pytest.raises(ValueError, match=words):
        read_budget(budget, None, None)


def test_a_share_is_one_of_the_peak_without_a_plan(tmp_path):
    """The plan knows the bytes and the request; so does its file, and its text."""
    plan = optimize(make(), sample(), budget="62.5%", loss_fn=square, time_limit_s=1)
    assert plan.budget_bytes == int(0.625 * plan.baseline_peak_bytes)
    assert plan.predicted_peak_bytes <= plan.budget_bytes
    assert plan.budget_share == 0.625
    assert "(62.5% of the peak without a plan)" in str(plan).splitlines()[0]
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_all_of_the_peak_recomputes_nothing():
    """100 % is what the step takes by itself."""
    plan = optimize(make(), sample(), budget="100%", loss_fn=square)
    assert not plan.schedule.recomputed()


def test_another_shape_is_planned_for_the_same_bytes():
    """They are a share of the first shape's peak, and not of the other one's."""
    model = make()
    plan = optimize(model, sample(), budget="70%", loss_fn=square, time_limit_s=1)
    arguments = {"x": sample(rows=128)}
    other, _ = replan(plan, plan._live, model, arguments, model.forward)
    assert (other.budget_bytes, other.budget_share) == (plan.budget_bytes, None)


def test_a_share_that_its_file_does_not_come_to_is_refused():
    """A file is believed only as far as it agrees with itself."""
    plan = optimize(make(), sample(), budget="90%", loss_fn=square, time_limit_s=1)
    data = json.loads(json.dumps(plan_to_dict(plan))) | {"budget_share": 0.5}
    with pytest.raises(PlanError, match="budget"):
        plan_from_dict(data)
