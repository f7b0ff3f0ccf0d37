"""Small models with a loss inside, and their steps under ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import planner.compiled
from planner.compiled import CompiledPlan

assert planner.compiled.remat


class Block(nn.Module):
    """Two layers with dropout between them, beside a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(self.dropout(F.gelu(self.up(x)))))


class WithLoss(nn.Module):
    """Blocks and a loss."""

    def __init__(self, num_blocks: int = 2, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def model_and_sample() -> tuple[nn.Module, Tensor]:
    """The model of most tests; its step takes 577 kB, and 352 kB at least."""
    torch.manual_seed(0)
    return WithLoss(), torch.randn(128, 32)


def step(model: nn.Module, call: Callable[..., Any], *sample: Tensor) -> dict[str, Tensor]:
    """Run one seeded step; returns loss, gradients, buffers and the generator's state."""
    model.zero_grad()
    torch.manual_seed(7)
    loss = call(*sample)
    loss.backward()
    found = {"loss": loss.detach(), "generator": torch.get_rng_state()}
    found |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {n: b.clone() for n, b in model.named_buffers()}


def compiled(
    model: nn.Module, *, lower: str = "aot_eager", **options: Any
) -> tuple[Any, list[CompiledPlan]]:
    """The model compiled within a budget, and the list that its plans go into."""
    torch.compiler.reset()
    plans: list[CompiledPlan] = []
    options = {"lower": lower, "on_plan": plans.append, **options}
    return torch.compile(model, backend="remat", options=options), plans


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Every tensor has the same bits."""
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
