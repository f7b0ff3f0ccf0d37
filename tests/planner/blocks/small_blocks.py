"""A small transformer in blocks, and a plan for it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from planner import BlockPlan, optimize


class Layer(nn.Module):
    """A residual block with dropout, called with a keyword argument."""

    def __init__(self, width: int, index: int) -> None:
        super().__init__()
        self.index = index  # differs, and forward does not read it
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        hidden = nn.functional.gelu(self.up(self.norm(x)))
        return x + self.dropout(self.down(hidden)) * scale


class Small(nn.Module):
    """Embedding, blocks, and a loss over its own head."""

    def __init__(self, num_layers: int = 3, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.layers = nn.ModuleList(Layer(width, i) for i in range(num_layers))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        hidden = self.embed(x)
        for layer in self.layers:
            hidden = layer(hidden, scale=0.5)
        return nn.functional.cross_entropy(self.head(hidden), target)


def small(seed: int = 0, num_layers: int = 3, width: int = 16) -> Small:
    """The model in training mode, with weights by the seed."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return Small(num_layers, width).train()


def batch(rows: int = 64) -> tuple[Tensor, Tensor]:
    """An input and its targets."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 8, generator=generator)
    return x, torch.randint(0, 5, (rows,), generator=generator)


@cache
def small_plan(budget: str = "70%") -> BlockPlan:
    """A plan in blocks for the model; made once."""
    plan = optimize(
        small(), batch(), budget=budget, granularity="blocks", blocks="layers.*", time_limit_s=0.6
    )
    assert isinstance(plan, BlockPlan)
    return plan


ROWS = 256


def deep(width: int = 16) -> Small:
    """The model with six blocks, more of which are between the first and the last."""
    return small(num_layers=6, width=width)


def deep_plan(
    word: str | None,
    budget: str = "75%",
    dtype: torch.dtype = torch.float32,
    width: int = 16,
) -> BlockPlan:
    """A plan in blocks that repeats something, for one rank of ``fully_shard`` if it says so."""
    x, target = batch(ROWS)
    plan = optimize(
        deep(width).to(dtype),
        (x.to(dtype), target),
        budget=budget,
        optimizer="adamw",
        granularity="blocks",
        blocks="layers.*",
        distributed=word,
        grads="accumulated" if word is not None and "no_sync" in word else "none",
        time_limit_s=0.6,
    )
    assert isinstance(plan, BlockPlan)
    assert plan.schedule.recomputed()
    return plan
