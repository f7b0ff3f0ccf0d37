"""A plan file for the commands that read one."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner import Plan, optimize

from .small_training import build


@pytest.fixture(scope="session")
def small_plan() -> Plan:
    """A plan that recomputes."""
    model, sample_input, loss_fn = build()
    plan = optimize(model, sample_input, budget="85%", loss_fn=loss_fn, time_limit_s=1)
    assert plan.schedule.recomputed()
    return plan


@pytest.fixture(scope="session")
def plan_file(small_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a file."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    small_plan.save(path)
    return path
