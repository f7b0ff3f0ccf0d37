"""The ``forward`` of a module instance: what stands there, and what it stands in for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .unwrap import find_wrapped

# Where a module keeps its stand-in: what is in ``forward`` may be wrapped or replaced by others.
_KEPT = "_remat_planned_forward"

Forward = Callable[..., Any]


class StandIn:
    """What may stand in a module for its forward; made by ``planner.running`` alone.

    Parameters
    ----------
    model
        The module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.own_forward: Forward | None = model.__dict__.get("forward")
        self.unwatched = 0
        self.suspended = 0

    @property
    def unplanned(self) -> Forward:
        """The forward that this stands in for."""
        if self.own_forward is not None:
            return self.own_forward
        return type(self.model).forward.__get__(self.model)

    @property
    def constants(self) -> Sequence[torch.Tensor]:
        """Tensors that its steps read and that lie neither in the module nor in its arguments."""
        return ()


def stand_in_of(model: nn.Module) -> StandIn | None:
    """What stands in for the forward of a module, whatever was put around it or in its place."""
    found = model.__dict__.get(_KEPT)
    return found if isinstance(found, StandIn) else None


def put_stand_in(model: nn.Module, stand_in: StandIn) -> None:
    """Let a module call ``stand_in`` from now on."""
    model.__dict__["forward"] = model.__dict__[_KEPT] = stand_in


def take_stand_in(model: nn.Module, stand_in: StandIn) -> None:
    """Give a module its own forward back, unless somebody else has put theirs there."""
    del model.__dict__[_KEPT]
    forward: Any = model.__dict__.get("forward")
    if stand_in in (forward, getattr(forward, "__func__", None)):
        _set_forward(model, stand_in.own_forward)


def original_forward(model: nn.Module) -> Forward:
    """The module's forward without a plan."""
    stand_in = find_wrapped(model.__dict__.get("forward"), StandIn)
    return model.forward if stand_in is None else stand_in.unplanned


def own_forward(model: nn.Module) -> Forward | None:
    """What stands in the module for its class' forward when no plan is applied."""
    forward: Any = model.__dict__.get("forward")
    return forward.own_forward if isinstance(forward, StandIn) else forward


@contextmanager
def forward_set(model: nn.Module, forward: Forward | None) -> Iterator[None]:
    """Let a module run another forward for a while; ``None`` stands for its class' own."""
    before = model.__dict__.get("forward")
    stand_in = stand_in_of(model)
    _set_forward(model, forward)
    if stand_in is not None:
        stand_in.unwatched += 1
    try:
        yield
    finally:
        if stand_in is not None:
            stand_in.unwatched -= 1
        _set_forward(model, before)


@contextmanager
def unplanned(model: nn.Module) -> Iterator[None]:
    """Let a planned module run its own forward for a while, outside its budget.

    For calls that a plan does not hold, such as one whose gradient is
    differentiated again. Without a plan this changes nothing.

    Examples
    --------
    >>> import torch
    >>> layer = nn.Linear(2, 1)
    >>> with unplanned(layer):
    ...     penalty = layer(torch.ones(1, 2)).square().sum()
    """
    stand_in = stand_in_of(model)
    if stand_in is not None:
        stand_in.suspended += 1
    try:
        yield
    finally:
        if stand_in is not None:
            stand_in.suspended -= 1


def _set_forward(model: nn.Module, forward: Forward | None) -> None:
    if forward is None:
        model.__dict__.pop("forward", None)
    else:
        model.__dict__["forward"] = forward
