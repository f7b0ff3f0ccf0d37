"""The ``forward`` of a module instance: what is there, and what it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import PlanError
from .unwrap import find_wrapped, refuse_no_module

# Where a module keeps its stand-in, since others may wrap or replace what is in ``forward``.
_KEPT = "_remat_planned_forward"

Forward = Callable[..., Any]
Forwards = Sequence[tuple[nn.Module, Forward | None]]
"""Forwards of several modules; ``None`` stands for the class's own."""


class StandIn:
    """What may replace a module's forward; only ``planner.running`` makes one.

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
        """The forward that this replaces."""
        if self.own_forward is not None:
            return self.own_forward
        return type(self.model).forward.__get__(self.model)

    @property
    def constants(self) -> Sequence[torch.Tensor]:
        """Tensors that its steps read and that are neither in the module nor in its arguments."""
        return ()


def stand_in_of(model: nn.Module) -> StandIn | None:
    """Return a module's stand-in, even if its forward has been wrapped or replaced since."""
    found = model.__dict__.get(_KEPT)
    return found if isinstance(found, StandIn) else None


def planned_inside(model: nn.Module) -> list[tuple[str, StandIn]]:
    """Return the stand-ins of modules inside a model, by path."""
    return [
        (path, stand_in)
        for path, module in model.named_modules()
        if path and (stand_in := stand_in_of(module)) is not None
    ]


def refuse_plans_inside(model: nn.Module, error: Exception) -> None:
    """Name a plan inside a model that could not be captured, if there is one.

    Raises
    ------
    PlanError
        From the capture's error.
    """
    inside = planned_inside(model)
    if inside:
        raise PlanError(
            f"module {inside[0][0]!r} inside this {type(model).__name__} has a plan of its own, "
            "and the step could not be captured with it: remove it first, by "
            "BlockPlan.remove(model) where the model has plans in blocks, else by Plan.remove of "
            "the module"
        ) from error


def put_stand_in(model: nn.Module, stand_in: StandIn) -> None:
    """Make a module call ``stand_in`` from now on."""
    model.__dict__["forward"] = model.__dict__[_KEPT] = stand_in


def keep_stand_in(model: nn.Module, stand_in: StandIn) -> None:
    """Note that calls reach ``stand_in`` through what already is in a module's forward."""
    model.__dict__[_KEPT] = stand_in


def take_stand_in(model: nn.Module, stand_in: StandIn) -> None:
    """Restore a module's own forward, unless someone else has replaced it."""
    del model.__dict__[_KEPT]
    forward: Any = model.__dict__.get("forward")
    if stand_in in (forward, getattr(forward, "__func__", None)):
        _set_forward(model, stand_in.own_forward)


def original_forward(model: nn.Module) -> Forward:
    """Return the module's forward without a plan."""
    stand_in = find_wrapped(model.__dict__.get("forward"), StandIn)
    return model.forward if stand_in is None else stand_in.unplanned


def own_forward(model: nn.Module) -> Forward | None:
    """Return what the module holds in place of its class's forward when no plan is applied."""
    forward: Any = model.__dict__.get("forward")
    return forward.own_forward if isinstance(forward, StandIn) else forward


@contextmanager
def forward_set(model: nn.Module, forward: Forward | None) -> Iterator[None]:
    """Temporarily give a module another forward; ``None`` means its class's own."""
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
def forwards_set(forwards: Forwards) -> Iterator[None]:
    """Temporarily give several modules other forwards."""
    with ExitStack() as stack:
        for module, forward in forwards:
            stack.enter_context(forward_set(module, forward))
        yield


@contextmanager
def unplanned(model: nn.Module) -> Iterator[None]:
    """Temporarily let a planned module run its own forward, outside its budget.

    For calls that a plan does not cover, such as one whose gradient is differentiated
    again. A model with plans inside its blocks runs without any of them. Without a plan
    this changes nothing.

    Examples
    --------
    >>> import torch
    >>> layer = nn.Linear(2, 1)
    >>> with unplanned(layer):
    ...     penalty = layer(torch.ones(1, 2)).square().sum()
    """
    refuse_no_module(model)
    own = stand_in_of(model)
    stand_ins = [own] if own is not None else [s for _, s in planned_inside(model)]
    for stand_in in stand_ins:
        stand_in.suspended += 1
    try:
        yield
    finally:
        for stand_in in stand_ins:
            stand_in.suspended -= 1


def _set_forward(model: nn.Module, forward: Forward | None) -> None:
    if forward is None:
        model.__dict__.pop("forward", None)
    else:
        model.__dict__["forward"] = forward
