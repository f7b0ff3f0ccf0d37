"""Small models on which peers are tried, and counts of what runs in a step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from planner.base.training_step import train_step

WIDTH = 16


class Layer(nn.Module):
    """One matrix product, dropout, and an argument beside the hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.25)

    def forward(self, x: Tensor, scale: Tensor, *, flag: bool = True) -> Tensor:
        assert flag
        return x + self.dropout(torch.sin(self.linear(x)).cos()) * scale


class Stack(nn.Module):
    """Layers that feed each other directly, with one argument beside that all share."""

    def __init__(self, num_layers: int = 9) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(num_layers))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = x.mean(dim=-1, keepdim=True)
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, scale, flag=True)
        return self.head(x).square().mean()


class Between(Stack):
    """Other code runs between the layers."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.mean(dim=-1, keepdim=True)
        for layer in self.layers:
            x = layer(x, scale) * 1.5
        return self.head(x).mean()


class Peeking(Stack):
    """Where it is told to, it reads what lies between two layers."""

    peek = False

    def forward(self, x: Tensor) -> Tensor:
        scale = x.mean(dim=-1, keepdim=True)
        seen = []
        for layer in self.layers:
            x = layer(x, scale)
            seen.append(x)
        return self.head(x).mean() + (seen[0].mean() if self.peek else 0)


class Statistics(nn.Module):
    """Blocks with batch norm: a second forward pass moves the statistics again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.GELU())
                for _ in range(4)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def made(kind: type[nn.Module], **options: Any) -> tuple[nn.Module, Tensor]:
    """A model and its input; the random generator stays as it is."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(3)
        return kind(**options).train(), torch.randn(32, WIDTH)


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def calls_of_step(model: nn.Module, sample: Tensor) -> Counter[str]:
    """How often each function of ATen is dispatched in a step."""
    torch.manual_seed(0)
    with _Counting() as counting:
        train_step(model, sample)
    model.zero_grad(set_to_none=True)
    return counting.calls
