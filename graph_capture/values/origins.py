"""Trace where a value comes from: parameters, buffers, inputs, random numbers."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from ..calls.draws import draws
from ..calls.writes import hidden_writes
from ..private_torch.aten import ctc_loss
from ..private_torch.tensors import identity_of_storage


class Origins:
    """The origins of a value."""

    def __init__(self, part: set[Node]) -> None:
        self._part = part

    @property
    def part(self) -> frozenset[Node]:
        """All nodes that contribute to it."""
        return frozenset(self._part)

    @property
    def is_drawn(self) -> bool:
        """Whether random numbers contribute to it and parameters do not."""
        learned = any(n.op == "placeholder" and _is_learned(n) for n in self._part)
        return not learned and any(n.op != "placeholder" and draws(n) for n in self._part)

    @property
    def is_activation(self) -> bool:
        """Whether parameters or random numbers contribute to it."""
        return any(
            (n.op == "placeholder" and (_is_learned(n) or n.meta["role"] == "tangent"))
            or (n.op != "placeholder" and draws(n))
            for n in self._part
        )

    @property
    def state(self) -> str | None:
        """Name of a buffer or attribute that contributes to it."""
        held = (n for n in self._part if n.op == "placeholder")
        names = (n.meta["target"] for n in held if n.meta["role"] in ("buffer", "attribute"))
        return min(map(str, names), default=None)

    @property
    def counted(self) -> str | None:
        """Name of a buffer that the step writes to before this value reads it, if there is one."""
        memory = {m: n for n in self._part if n.op == "placeholder" for m in memory_of(n)}
        for node in self._part:
            for written in written_by(node):
                for m in memory_of(written):
                    if m in memory and memory[m].meta["role"] in ("buffer", "attribute"):
                        return str(memory[m].meta["target"])
        return None


def _is_learned(placeholder: Node) -> bool:
    """Whether it is a parameter, or what modules around the step have computed."""
    return placeholder.meta["role"] == "parameter" or placeholder.meta.get("computed", False)


def written_by(node: Node) -> tuple[Node, ...]:
    """Return the nodes whose memory a call writes to."""
    if node.op != "call_function" or node.target is operator.getitem:
        return ()
    return (*node.meta.get("writes", ()), *hidden_writes(node.target, node.args))


def memory_of(node: Node) -> list[int]:
    """Return the identity of the memory behind a node's tensor, if it has one."""
    value = node.meta.get("val")
    return [identity_of_storage(value.untyped_storage())] if isinstance(value, torch.Tensor) else []


def written_after(last: Node, node: Node) -> bool:
    """Whether a call after ``last`` writes to the memory of ``node``."""
    memory = set(memory_of(node))
    later = last.next
    while later.op != "root":
        if any(not memory.isdisjoint(memory_of(written)) for written in written_by(later)):
            return True
        later = later.next
    return False


def deciding(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the arguments whose values determine the result of a call that reads values.

    For a call that picks elements this is the mask: the shape of what it picks from is known.
    """
    picks = _PICKS.get(func)
    return (args, kwargs) if picks is None else args[picks]


_PICKS = {
    torch.ops.aten.index.Tensor: 1,
    torch.ops.aten.masked_select.default: 1,
    torch.ops.aten.bincount.default: slice(0, 1),
    ctc_loss.Tensor: slice(2, 4),
}


LENGTHS_IN_LISTS = (
    "F.ctc_loss got lengths as Python numbers, and writes them to memory of its own, which "
    "stand-ins do not have: give input_lengths and target_lengths as tensors, "
    "torch.tensor(lengths); its results are the same"
)


def has_lengths_in_lists(func: Any) -> bool:
    """Whether a call is a CTC loss of lengths that are no tensors."""
    return func is ctc_loss.default


__all__ = [
    "LENGTHS_IN_LISTS",
    "Origins",
    "deciding",
    "has_lengths_in_lists",
    "memory_of",
    "written_after",
    "written_by",
]
