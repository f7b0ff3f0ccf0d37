"""Small models and plans for them, for tests of what happens around a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from planner import InfeasibleBudgetError, Plan, optimize

ROWS = 256


class Net(nn.Module):
    """Three blocks with dropout and batch norm; ``scale`` is a plain argument."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.BatchNorm1d(width))
            for _ in range(3)
        )
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        for block in self.blocks:
            x = x + self.dropout(block(x)) * scale
        return self.head(x)


class Heads(nn.Module):
    """Two outputs from one trunk."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        )
        self.left = nn.Linear(width, 3)
        self.right = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x)
        return self.left(hidden), self.right(hidden)


def make(kind: Callable[[], nn.Module] = Net, seed: int = 0) -> nn.Module:
    """A model in training mode, with weights by the seed."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return kind().train()


def sample(seed: int = 0, rows: int = ROWS, width: int = 32) -> Tensor:
    """An input by the seed."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def square(output: Tensor) -> Tensor:
    """A scalar loss."""
    return output.square().mean()


def least_bytes(model: nn.Module, sample_input: Any, **options: Any) -> int:
    """The least budget that the planner knows to work."""
    try:
        optimize(model, sample_input, budget_bytes=1, time_limit_s=1, **options)
    except InfeasibleBudgetError as error:
        return error.min_budget_bytes
    raise AssertionError("a step within one byte")


def plan_for(model: nn.Module, sample_input: Any, *, share: float = 0.6, **options: Any) -> Plan:
    """A plan at a share of the way from the resident bytes to the peak of keeping all."""
    keep = optimize(model, sample_input, budget_gb=1000, **options)
    resident = keep.graph.resident_bytes
    budget_bytes = int(resident + share * (keep.baseline_peak_bytes - resident))
    options = {"time_limit_s": 1, **options}
    plan = optimize(model, sample_input, budget_bytes=budget_bytes, **options)
    assert plan.schedule.recomputed(), "the plan of a test must recompute something"
    return plan
