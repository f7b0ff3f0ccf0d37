"""Gradients of a step, how far two of them are apart, and whether they are those of its loss.

Two compilations of a step that draw in another order have other dropout masks from one seed. So
where losses differ, gradients are judged by the loss itself, by its slope along each of them.
"""

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

SLOPE_STEP = 1e-2
"""How far a parameter is moved along its gradient's direction, both ways, for a slope."""

SMALL = 1e-3
"""Share of the norm of all gradients below which one is no judge."""

OTHER_LOSS = 1e-4
"""Relative difference of losses from which on they are of other masks, and not of rounding."""

TIMES_THE_UNBUDGETED = 3.0
"""How far from float64 right gradients may be, in errors of unbudgeted compilations: the order
in which a kernel adds depends on what it is fused with."""


def gradients(model: nn.Module, call: Callable[..., Any], sample: Any) -> list[torch.Tensor]:
    """The gradients of a seeded step."""
    model.zero_grad()
    torch.manual_seed(SEED)
    train_step(call, sample)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def loss_of(model: nn.Module, call: Callable[..., Any], sample: Any) -> float:
    """The loss of the same seeded step."""
    model.zero_grad()
    torch.manual_seed(SEED)
    _, loss = train_step(call, sample)
    assert loss is not None
    return loss.item()


def slope_error(model: nn.Module, call: Callable[..., Any], sample: Any) -> float:
    """The largest relative error of a gradient's norm against the loss's slope along it.

    The slope is a central difference of two seeded steps, a parameter moved by ``SLOPE_STEP``
    along its gradient and against it. Gradients that are small beside all are left out.
    """
    found = gradients(model, call, sample)
    parameters = [p for p in model.parameters() if p.grad is not None]
    total = torch.stack([g.norm() for g in found]).norm()
    errors = [0.0]
    for parameter, gradient in zip(parameters, found, strict=True):
        norm = gradient.norm()
        if norm < SMALL * total:
            continue
        before = parameter.detach().clone()
        losses = []
        for distance in (SLOPE_STEP, -SLOPE_STEP):
            with torch.no_grad():
                parameter.add_(gradient, alpha=distance / norm.item())
            losses.append(loss_of(model, call, sample))
            with torch.no_grad():
                parameter.copy_(before)
        slope = (losses[0] - losses[1]) / (2 * SLOPE_STEP)
        errors.append(abs(slope / norm.item() - 1))
    return max(errors)


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
    "OTHER_LOSS",
    "TIMES_THE_UNBUDGETED",
    "error",
    "float64_gradients",
    "gradients",
    "loss_of",
    "same_bits",
    "slope_error",
]
