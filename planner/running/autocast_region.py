"""Detect several training steps within one autocast region.

Autocast keeps its casts of parameters until its outermost region ends. In eager, a loop
that steps the optimizer inside it goes on with casts of the old parameters; a planned
step casts the current ones.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import ref

import torch
from torch import nn

from graph_capture.private_torch.autograd import saved_by
from graph_capture.private_torch.tensors import version_of


def _nothing() -> None:
    """No cast is known."""


class AutocastRegion:
    """The region that the last backward pass ran in, if it ran in one."""

    def __init__(self) -> None:
        self._cast: Callable[[], torch.Tensor | None] = _nothing
        self._versions: list[int] = []

    def ran_in(self, model: nn.Module, device: torch.device) -> None:
        """Record that a backward pass of ``model`` has begun."""
        if not (torch.is_autocast_enabled(device.type) and torch.is_autocast_cache_enabled()):
            return
        if self._cast() is None:
            self._cast = _cast_of_a_leaf(device)
        self._versions = _versions(model)

    def has_casts_of_old(self, model: nn.Module) -> bool:
        """Whether that region is still open, and parameters of ``model`` were written to since."""
        return self._cast() is not None and self._versions != _versions(model)


def _cast_of_a_leaf(device: torch.device) -> Callable[[], torch.Tensor | None]:
    """Return a weak reference to a cast that only autocast holds and that dies with the region."""
    with torch.enable_grad():
        leaf = torch.ones(1, 1, device=device, requires_grad=True)
        made: torch.Tensor = torch.mm(leaf, leaf)
    return ref(saved_by(made.grad_fn, "self"))


def _versions(model: nn.Module) -> list[int]:
    return [version_of(parameter) for parameter in model.parameters()]


__all__ = ["AutocastRegion"]
