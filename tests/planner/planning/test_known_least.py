"""The least memory of a step is searched for once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from planner import InfeasibleBudgetError, optimize
from planner.planning import known_least


def _layers() -> nn.Module:
    """Only PyTorch's own, so that the lines of code that a step names are the test's."""
    return nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))


def test_what_an_error_names_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """For another instance of the model and from another line, by a search of no time."""
    x = torch.ones(64, 32)
    with pytest.raises(InfeasibleBudgetError) as caught:
        optimize(_layers(), x, loss_fn=torch.sum, budget_bytes=1000)
    searches: list[float] = []
    monkeypatch.setattr(known_least, "least_memory", lambda *_, **__: searches.append(1.0))
    least_bytes = caught.value.min_budget_bytes
    plan = optimize(_layers(), x, loss_fn=torch.sum, budget_bytes=least_bytes, time_limit_s=1)
    assert plan.predicted_peak_bytes <= least_bytes
    assert searches == []


def test_each_loss_has_its_own_least_memory() -> None:
    """Steps that differ only in what their losses hold are not taken for one another."""
    x, mask = torch.ones(64, 32), torch.ones(64, 32) > 0.5
    losses = (lambda y: y.pow(2).mean(), lambda y: (y.pow(2) * mask).sum() / mask.sum())
    for loss in losses:
        model = _layers()
        with pytest.raises(InfeasibleBudgetError) as caught:
            optimize(model, x, loss_fn=loss, budget_bytes=1000)
        budget = caught.value.min_budget_bytes
        assert optimize(model, x, loss_fn=loss, budget_bytes=budget).budget_bytes == budget
