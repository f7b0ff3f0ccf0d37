"""Measure what a planned step costs besides its kernels, on models with tiny kernels.

``python -m benchmarks.small_kernels`` trains six of them on one thread with a plan that
recomputes nothing, in turn with eager. It prints the ratio of their times (the 5th
percentile of the thread's time, which other processes disturb least) and the time to
compare a call and the model with the planned ones.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from planner import optimize
from planner.running.planned_forward import PlannedForward

NUM_STEPS = 200
NUM_WARM_UP = 20


class Block(nn.Module):
    """A perceptron with normalization, dropout and a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.narrow(F.gelu(self.widen(self.norm(x)))))


class Cells(nn.Module):
    """A recurrent cell, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(8, 16)
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = state = x.new_zeros(x.shape[0], 16)
        for t in range(x.shape[1]):
            hidden, state = self.cell(x[:, t], (hidden, state))
        return self.head(hidden)


class Chain(nn.Module):
    """Only elementwise calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(16)) for _ in range(30))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.sin(x * weight) + x * 0.5
        return x


class Attention(nn.Module):
    """Attention by products and views."""

    def __init__(self, width: int = 32, num_heads: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        depth = width // self.num_heads
        parts = self.project(self.norm(x)).view(batch, length, 3, self.num_heads, depth)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) / depth**0.5).softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


def convolution(num_in: int, num_out: int) -> nn.Module:
    """A convolution with batch norm."""
    return nn.Sequential(
        nn.Conv2d(num_in, num_out, 3, padding=1), nn.BatchNorm2d(num_out), nn.ReLU()
    )


_Case = tuple[Callable[[], nn.Module], Sequence[int]]

CASES: dict[str, _Case] = {
    "12 perceptron blocks": (
        lambda: nn.Sequential(nn.Linear(16, 32), *(Block(32) for _ in range(12)), nn.Linear(32, 4)),
        (8, 16),
    ),
    "25 LSTM cells": (Cells, (4, 25, 8)),
    "120 elementwise calls": (Chain, (8, 16)),
    "8 attention layers": (lambda: nn.Sequential(*(Attention() for _ in range(8))), (2, 8, 32)),
    "11 convolutions": (
        lambda: nn.Sequential(convolution(3, 4), *(convolution(4, 4) for _ in range(10))),
        (2, 3, 8, 8),
    ),
    "40 linear layers": (
        lambda: nn.Sequential(*(m for _ in range(40) for m in (nn.Linear(16, 16), nn.Tanh()))),
        (4, 16),
    ),
}


def mean_square(output: Tensor) -> Tensor:
    """The loss."""
    return output.pow(2).mean()


def step_us(model: nn.Module, x: Tensor) -> float:
    """The thread's time for one training step without an optimizer."""
    begin_s = time.thread_time()
    mean_square(model(x)).backward()
    model.zero_grad()
    return (time.thread_time() - begin_s) * 1e6


def guard_us(model: nn.Module, x: Tensor) -> float:
    """Time to check that a call and the model are the planned ones."""
    planned = model.forward
    assert isinstance(planned, PlannedForward)
    times = []
    for _ in range(NUM_STEPS):
        begin_s = time.thread_time()
        planned.check({"input" if isinstance(model, nn.Sequential) else "x": x})
        times.append((time.thread_time() - begin_s) * 1e6)
    return statistics.median(times)


def compared(make: Callable[[], nn.Module], shape: Sequence[int]) -> tuple[float, float, float]:
    """Eager's time of a step, the planned one's, and that of the guard, in µs."""
    torch.manual_seed(0)
    eager, x = make().train(), torch.randn(*shape)
    model = copy.deepcopy(eager)
    optimize(model, x, budget_gb=1, loss_fn=mean_square).apply(model)
    for _ in range(NUM_WARM_UP):
        step_us(eager, x)
        step_us(model, x)
    pairs = [(step_us(eager, x), step_us(model, x)) for _ in range(NUM_STEPS)]
    at = NUM_STEPS // 20
    least = [sorted(times)[at] for times in zip(*pairs, strict=True)]
    return least[0], least[1], guard_us(model, x)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    table = Table("model", "eager, ms", "planned, ms", "planned / eager", "guard, µs")
    for name, (make, shape) in CASES.items():
        eager, planned, guard = compared(make, shape)
        table.add_row(
            name,
            f"{eager / 1e3:.2f}",
            f"{planned / 1e3:.2f}",
            f"{planned / eager:.2f}",
            f"{guard:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
