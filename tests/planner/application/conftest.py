"""Plans that are made once for the tests of this folder."""

from __future__ import annotations

import pytest

from planner import (
    Plan,
)
from tests.planner.small import make, plan_for, sample, square


@pytest.fixture(scope="package")
def plan() -> Plan:
    """A plan for ``Net`` under ``square``."""
    return plan_for(make(), sample(), loss_fn=square)
