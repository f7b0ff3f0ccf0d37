"""One of the two runs of a loop, and the register of what loops change in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import loop_models
from .loop_models import LoopModel

_SGD = functools.partial(torch.optim.SGD, lr=0.05)


@dataclass(slots=True, kw_only=True)
class LoopSide:
    """One of the two runs of a loop: the planned one, or its twin without a plan.

    Parameters
    ----------
    case
        The kind of model.
    model
        The current model; a move may replace it.
    call
        What the loop calls: the model itself, or a wrapper of it.
    planned
        Whether a plan is applied.
    policy
        The plan's ``on_shape_change``.
    build_optimizer
        Maps parameters to an optimizer; the loop builds it again after each move.
    optimizer
        The last one built.
    loss
        The loop's loss.
    change_sample
        Applied to each step's keyword arguments.
    autocast
        Whether steps run under bfloat16.
    handles
        Handles of hooks, to remove them.
    counts
        Planned and unplanned steps before the current step, if they are counted.
    """

    case: LoopModel
    model: nn.Module
    call: Callable[..., Any]
    planned: bool
    policy: str
    build_optimizer: Callable[..., torch.optim.Optimizer] = _SGD
    optimizer: torch.optim.Optimizer | None = None
    loss: Callable[[Any], Tensor] | None = None
    change_sample: Callable[[dict[str, Any]], dict[str, Any]] = dict
    batch: int = loop_models.BATCH
    autocast: bool = False
    handles: list[Any] = field(default_factory=list)
    counts: tuple[int, int] | None = None

    def part(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)


class Unfit(Exception):
    """A move does not apply to this model; the loop draws another."""


Move = Callable[[LoopSide], None]
MOVES: dict[str, Move] = {}


def named_move(name: str) -> Callable[[Move], Move]:
    def register(move: Move) -> Move:
        MOVES[name] = move
        return move

    return register


def needs(model: nn.Module, name: str) -> None:
    if not hasattr(model, name):
        raise Unfit(name)


def there(path: str) -> str:
    if not path:
        raise Unfit("no such part")
    return path
