"""What is recomputed, what more memory buys, and how it reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner import Plan
from planner.explaining.explanation import NUM_LINES
from solvers import BoundScope
from tests.planner.small import make, plan_for, sample, square


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan that recomputes, with a gap closed."""
    return plan_for(make(), sample(), loss_fn=square)


def test_recomputations_are_all_of_them(plan: Plan) -> None:
    """Their runs and times add up to the schedule's."""
    again = plan.explain(more=0).recomputations
    repeats = plan.schedule.recomputed()
    assert sum(one.num_runs for one in again) == sum(repeats.values())
    cost_ns = sum(plan.graph.operators[v].cost_ns * times for v, times in repeats.items())
    assert sum(one.time_us for one in again) == pytest.approx(cost_ns / 1e3)
    times = [one.time_us for one in again]
    assert times == sorted(times, reverse=True)


def test_enough_memory_buys_all_recomputations_back(plan: Plan) -> None:
    """With the unplanned peak as budget nothing runs again, which is what at most can be saved."""
    more = plan.explain(more=plan.baseline_peak_bytes - plan.budget_bytes).more
    assert more is not None
    assert more.num_recomputed == 0
    recomputed_us = plan.predicted_step_us - plan.graph.base_cost_ns / 1e3
    assert more.saved_us == pytest.approx(recomputed_us)
    assert more.at_most_us == pytest.approx(recomputed_us)
    assert more.budget_bytes == plan.baseline_peak_bytes


def test_a_tenth_of_the_budget_is_asked_about(plan: Plan) -> None:
    """Whatever the plan's size; another share may be named."""
    more = plan.explain(time_limit_s=0).more
    assert more is not None
    assert more.extra_bytes == plan.budget_bytes // 10
    five = plan.explain(more="5%", time_limit_s=0).more
    assert five is not None
    assert five.extra_bytes == plan.budget_bytes // 20


def test_a_plan_from_a_file_explains_itself(plan: Plan, tmp_path) -> None:
    """In the same words."""
    plan.save(tmp_path / "plan.json")
    assert str(Plan.load(tmp_path / "plan.json").explain(more=0)) == str(plan.explain(more=0))


def test_the_report_is_as_long_as_asked(plan: Plan) -> None:
    """Rows that do not fit are summed up in one."""
    explained = plan.explain(more=0)
    peak = explained.report(2).split("\n\n")[0].splitlines()
    assert len(peak) == 1 + 2 * 2 + 1
    assert peak[-1].endswith("other kinds")
    assert len(explained.report(1000)) > len(explained.report(NUM_LINES)) > len(explained.report(2))


def test_json_holds_everything(plan: Plan) -> None:
    """Plain values, a reason as its code."""
    said = json.loads(json.dumps(plan.explain(more=0).to_dict()))
    assert said["peak"]["total_bytes"] == plan.predicted_peak_bytes
    assert {holder["why"] for holder in said["holders"]} >= {"resident", "in_use"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"more": -1}, "more=-1.*write more='10%' of the budget, more='100MB', or 0"),
        ({"more": "0%"}, "more='0%'"),
        ({"more": 2**62}, "a budget has at most"),
        ({"more": "lots"}, "more='lots'"),
        ({"more": False}, "more=False"),
        ({"time_limit_s": -1}, "time_limit_s must be finite"),
    ],
)
def test_arguments_that_make_no_sense(plan: Plan, options, words) -> None:
    """Each is refused with what it was."""
    with pytest.raises(ValueError, match=words):
        plan.explain(**options)


def test_a_plan_in_its_own_order_is_solved_again_in_any() -> None:
    """More memory buys all recomputations back, under the bound for every order."""
    path = Path(__file__).parents[1] / "fixtures" / "fan_in_its_own_order.json"
    more = Plan.load(path).explain(more="100kB").more
    assert more is not None
    assert (more.num_recomputed, more.bound_scope) == (0, BoundScope.ANY_ORDER)
