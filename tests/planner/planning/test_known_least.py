"""The least memory of a step is searched for once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from planner import InfeasibleBudgetError, optimize
from planner.planning import known_least
from tests.planner.small import make, sample, square


def _plan(budget_bytes: int, model: nn.Module) -> int:
    plan = optimize(model, sample(), loss_fn=square, budget_bytes=budget_bytes, time_limit_s=1)
    return plan.predicted_peak_bytes


def test_what_an_error_names_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """For another instance of the model, too, and were the second search cut by its clock."""
    with pytest.raises(InfeasibleBudgetError) as caught:
        _plan(1000, make())
    searches: list[float] = []
    monkeypatch.setattr(known_least, "least_memory", lambda *_, **__: searches.append(1.0))
    least_bytes = caught.value.min_budget_bytes
    assert _plan(least_bytes, make()) <= least_bytes
    assert searches == []


def test_each_loss_has_its_own_least_memory() -> None:
    """Steps that differ only in what their losses hold are not taken for one another."""
    x, mask = torch.ones(64, 32), torch.ones(64, 32) > 0.5
    losses = (lambda y: y.pow(2).mean(), lambda y: (y.pow(2) * mask).sum() / mask.sum())
    for loss in losses:
        model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
        with pytest.raises(InfeasibleBudgetError) as caught:
            optimize(model, x, loss_fn=loss, budget_bytes=1000)
        budget = caught.value.min_budget_bytes
        assert optimize(model, x, loss_fn=loss, budget_bytes=budget).budget_bytes == budget
