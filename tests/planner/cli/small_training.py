"""What the commands are given in tests: quick to capture, and worth planning."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.planner.small import Heads, make, sample, square

TARGET = f"{__name__}:build"
HEADS = f"{__name__}:build_heads"


def _stack() -> nn.Module:
    return nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(16, 16), nn.Tanh())))


def build() -> tuple[nn.Module, torch.Tensor, Any]:
    """A stack of layers."""
    return make(_stack), sample(rows=64, width=16), square


def build_heads() -> tuple[nn.Module, torch.Tensor, Any]:
    """Another one, which takes a batch of one."""
    return make(Heads), sample(rows=64), lambda heads: heads[0].sum() + heads[1].sum()
