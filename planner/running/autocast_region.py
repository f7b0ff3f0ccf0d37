"""Detect what an autocast region does in eager and not in a planned step.

Autocast keeps its casts of parameters until its outermost region ends. In eager, a loop
that steps the optimizer inside it goes on with casts of the old parameters; a planned
step casts the current ones. In a backward pass inside of it autocast casts what the
formulas of gradients multiply, too, such as that of a region within forward that is
switched off; a planned backward pass runs as outside.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import ref

import torch
from torch import nn

from graph_capture.private_torch.autograd import saved_by
from graph_capture.private_torch.tensors import version_of
from graph_capture.tracing.traced_step import TracedStep

_PRODUCTS = {
    torch.ops.aten.mm,
    torch.ops.aten.bmm,
    torch.ops.aten.addmm,
    torch.ops.aten.addbmm,
    torch.ops.aten.baddbmm,
}
_CAST = {torch.float32, torch.bfloat16, torch.float16}


def _nothing() -> None:
    """No cast is known."""


class AutocastRegion:
    """The region that the last backward pass ran in, if it ran in one."""

    def __init__(self, step: TracedStep) -> None:
        self._multiplied = _multiplied_in_backward(step)
        self._cast: Callable[[], torch.Tensor | None] = _nothing
        self._versions: list[int] = []

    def ran_in(self, model: nn.Module, device: torch.device) -> None:
        """Record that a backward pass of ``model`` has begun."""
        if not (torch.is_autocast_enabled(device.type) and torch.is_autocast_cache_enabled()):
            return
        if self._cast() is None:
            self._cast = _cast_of_a_leaf(device)
        self._versions = _versions(model)

    def casts_gradients(self, device: torch.device) -> bool:
        """Whether eager would cast what a backward pass multiplies that runs now."""
        if not (self._multiplied and torch.is_autocast_enabled(device.type)):
            return False
        return bool(self._multiplied - {torch.get_autocast_dtype(device.type)})

    def has_casts_of_old(self, model: nn.Module) -> bool:
        """Whether that region is still open, and parameters of ``model`` were written to since."""
        return self._cast() is not None and self._versions != _versions(model)


def _cast_of_a_leaf(device: torch.device) -> Callable[[], torch.Tensor | None]:
    """Return a weak reference to a cast that only autocast holds and that dies with the region."""
    with torch.enable_grad():
        leaf = torch.ones(1, 1, device=device, requires_grad=True)
        made: torch.Tensor = torch.mm(leaf, leaf)
    return ref(saved_by(made.grad_fn, "self"))


def _multiplied_in_backward(step: TracedStep) -> set[torch.dtype]:
    """Return the dtypes that a backward pass multiplies, of those that autocast changes."""
    return {
        factor.meta["val"].dtype
        for node in step.graph.nodes
        if node.meta.get("phase") == "backward"
        and getattr(node.target, "overloadpacket", None) in _PRODUCTS
        for factor in node.all_input_nodes
    } & _CAST


def _versions(model: nn.Module) -> list[int]:
    return [version_of(parameter) for parameter in model.parameters()]


__all__ = ["AutocastRegion"]
