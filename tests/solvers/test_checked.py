"""What solvers are asked for, checked at the door."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from graph_capture.cost_graph import CostGraph
from solvers.any_order.solve import solve_in_any_order
from solvers.checked import checked_budget
from solvers.portfolio import solve
from solvers.replay import InvalidScheduleError, replay
from solvers.schedule import Schedule
from solvers.strategies import STRATEGIES
from solvers.strategies.strategy import apply_strategy
from solvers.uniform import uniform_under_budget
from tests.solvers.graphs import training_chain

_DOORS: dict[str, Callable[[CostGraph, object], object]] = {
    "solve": lambda graph, budget: solve(graph, budget),
    "any_order": lambda graph, budget: solve_in_any_order(graph, budget),
    "uniform": lambda graph, budget: uniform_under_budget(graph, budget),
    "strategy": lambda graph, budget: apply_strategy(
        STRATEGIES["none"], graph, budget_bytes=budget
    ),
}


@pytest.mark.parametrize("door", _DOORS)
@pytest.mark.parametrize(
    "budget", [float("nan"), float("inf"), -float("inf"), -1, 1e9, True, "1GB", [1]]
)
def test_a_budget_is_a_whole_number_of_bytes(door: str, budget: object) -> None:
    """nan, for one, would compare as if everything fitted."""
    with pytest.raises(ValueError, match="whole number of bytes"):
        _DOORS[door](training_chain(3), budget)


def test_numpys_integers_are_budgets() -> None:
    """They come from arrays of peaks."""
    assert checked_budget(np.int64(7)) == 7


@pytest.mark.parametrize("limit", [float("nan"), -1.0, True, "1"])
def test_a_time_limit_is_a_time(limit: object) -> None:
    """nan would never be over."""
    with pytest.raises(ValueError, match="time_limit_s"):
        solve(training_chain(3), 100, time_limit_s=limit)  # type: ignore[arg-type]


@pytest.mark.parametrize("run", [1.0, True, "0", None, float("nan")])
def test_a_run_that_is_no_index_is_no_schedule(run: object) -> None:
    """An index that is no integer is refused instead of raising a TypeError."""
    with pytest.raises(InvalidScheduleError, match="no index"):
        replay(training_chain(1), Schedule((0, run)))  # type: ignore[arg-type]
