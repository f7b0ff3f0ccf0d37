"""What kernels of the loss take for themselves is part of the prediction."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planner import InfeasibleBudgetError, optimize

TARGET = torch.rand(256, 64, generator=torch.Generator().manual_seed(0))

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mse_loss": lambda o: F.mse_loss(o, TARGET),
    "mse_loss of doubles": lambda o: F.mse_loss(o.double(), TARGET.double()),
    "smooth_l1_loss": lambda o: F.smooth_l1_loss(o, TARGET),
    "huber_loss": lambda o: F.huber_loss(o, TARGET),
    "binary_cross_entropy": lambda o: F.binary_cross_entropy(o.sigmoid(), TARGET),
    "a target made in the loss": lambda o: F.mse_loss(o, torch.zeros_like(o)) + o.mean(),
    "mixed dtypes": lambda o: (o * TARGET.bfloat16()).mean(),
    "abs of complex numbers": lambda o: torch.complex(o, o).abs().mean(),
    "integer target": lambda o: (o - TARGET.round().long()).square().mean(),
    "product": lambda o: o.prod(1).sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_measured_peak_is_within_the_least_budget(name: str) -> None:
    """The planned step keeps the least feasible budget, whatever the loss takes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).train()
    x, loss = torch.randn(256, 64), LOSSES[name]
    with pytest.raises(InfeasibleBudgetError) as refused:
        optimize(model, x, budget_bytes=1, loss_fn=loss, time_limit_s=1)
    least = refused.value.min_budget_bytes
    plan = optimize(model, x, budget_bytes=least, loss_fn=loss, time_limit_s=0.3)
    seen = plan.validate(model, x, loss_fn=loss, repeats=0)
    assert seen.peak.measured <= least
    assert seen.bits == "equal"
