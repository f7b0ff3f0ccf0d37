"""Options of compiled steps: read once, refused in words."""

from __future__ import annotations

from typing import Any

import pytest

from planner.compiled.backend import remat
from planner.compiled.options import CompiledOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (None, "give the budget once"),
        ({"budget_gb": 1, "budget_bytes": 1}, "give the budget once"),
        ({"budget_gb": -1}, "budget_gb=-1"),
        ({"budget_gb": 1, "budgets": 2}, "has no option 'budgets'; there are budget_gb"),
        ({"budget_gb": 1, "lower": "eager"}, "lower is .*, got 'eager'"),
        ({"budget_gb": 1, "on_plan": 3}, "on_plan is a function"),
        ({"budget_gb": 1, "resident_bytes": -1}, "resident_bytes is a number of bytes"),
        ({"budget_gb": 1, "grads": "consumed"}, "grads is 'none' or 'accumulated'.*'consumed'"),
        ({"budget_gb": 1, "grads": "sum"}, "grads is .*, got 'sum'"),
        ({"budget_gb": 1, "headroom": 5}, "headroom is a fraction"),
        ({"budget_gb": 1, "time_limit_s": -1}, "time_limit_s must be"),
        ({"budget_gb": 1, "later_bytes": -1}, "^later_bytes is a number of bytes"),
        ({"budget_gb": 1, "later_bytes": "x"}, "^later_bytes='x': not an amount"),
        ({"budget_gb": 1, "calls": 0}, "calls is a number from 1, got 0"),
        ({"budget_gb": 1, "rounds": True}, "rounds is a number from 1, got True"),
        ({"budget_gb": 1, "outputs": "free"}, "outputs is 'held' or 'released', got 'free'"),
        ("budget_gb=40", "options is a dictionary"),
    ],
)
def test_invalid_options_are_refused(options: Any, message: str) -> None:
    """Each names the option and what it may be."""
    with pytest.raises(ValueError, match=message):
        CompiledOptions.of(options)


def test_options_are_read() -> None:
    """Units and defaults are those of ``optimize``, with ten seconds for solving."""
    options = CompiledOptions.of({"budget_gb": "1GiB", "resident_bytes": "2kB", "seed": 3})
    assert options.budget_bytes == 2**30
    assert options.resident_bytes == 2000
    assert (options.solving.seed, options.solving.time_limit_s) == (3, 10.0)


def test_a_mode_is_refused() -> None:
    """Modes are Inductor's."""
    with pytest.raises(ValueError, match="takes no mode, got 'max-autotune'"):
        remat(None, [], mode="max-autotune")  # type: ignore[arg-type]
