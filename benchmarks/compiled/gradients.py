"""Gradients of a step, and how far two of them are apart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from planner.base.training_step import train_step
from planner.measuring.rounding import largest_error

SEED = 7

TIMES_THE_UNBUDGETED = 3.0
"""How far from float64 right gradients may be, in errors of unbudgeted compilations: the order
in which a kernel adds depends on what it is fused with."""


def gradients(model: nn.Module, call: Callable[..., Any], sample: Any) -> list[torch.Tensor]:
    """The gradients of a seeded step."""
    model.zero_grad()
    torch.manual_seed(SEED)
    train_step(call, sample)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def float64_gradients(model: nn.Module, sample: Any, lower: str) -> list[torch.Tensor]:
    """The same step compiled in float64 without a budget: seeds give the same dropout masks."""
    exact = copy.deepcopy(model).double()
    call = torch.compile(exact, backend=lower, dynamic=False)
    return gradients(exact, call, tree_map(_double, sample))


def _double(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    return value


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest error of a gradient, relative to its norm, or a thousandth of all gradients'."""
    return largest_error(list(zip(found, expected, strict=True)))


def same_bits(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Whether all gradients are equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


__all__ = [
    "TIMES_THE_UNBUDGETED",
    "error",
    "float64_gradients",
    "gradients",
    "same_bits",
]
