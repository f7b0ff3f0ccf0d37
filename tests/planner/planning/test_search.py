"""A search whose time is too short ends with what is known to fit, not with an error."""

from __future__ import annotations

import pytest

from planner import optimize
from planner.base.budget import Budget
from planner.base.solve_options import SolveOptions
from planner.compiled.priced_step import price_step
from planner.compiled.solve_step import solve_step
from tests.planner.compiled.models import model_and_sample
from tests.planner.compiled.test_joint_step import joint_step_of


@pytest.mark.parametrize("share", ["100%", "90%", "75%"])
def test_no_time_at_all_gives_a_plan(share: str) -> None:
    """Of a uniform schedule, or of the one that keeps everything; its gap says how good it is."""
    model, x = model_and_sample()
    plan = optimize(model, x, budget=share, time_limit_s=0)
    assert plan.predicted_peak_bytes <= plan.budget_bytes
    assert (plan.gap > 0) == (share != "100%")


def test_no_time_at_all_gives_a_compiled_plan() -> None:
    """By the same schedules."""
    model, x = model_and_sample()
    priced = price_step(joint_step_of(lambda x, *_: model(x), x, *model.parameters()))
    budget = Budget(total_bytes=500_000, headroom_bytes=0)
    result = solve_step(priced, budget, SolveOptions(time_limit_s=0.0))
    assert result.schedule is not None
    assert result.peak_bytes is not None
    assert result.peak_bytes <= 500_000
