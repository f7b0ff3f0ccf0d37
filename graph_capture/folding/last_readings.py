"""Determine whether anything still reads what an in-place call is about to overwrite.

Chunked losses work in one buffer: each chunk's logits are written over those of the
last chunk. Nobody needs the old values then, so a planned step may let the call
write to new memory instead of to a copy of the old.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.fx import Node

from ..calls.storage_id import storage_id
from ..calls.writes import hidden_writes
from ..private_torch.operators import OpOverload, schema_of
from ..private_torch.trees import tree_iter
from .reuse import results_of

aten = torch.ops.aten

# They overwrite all of their target, and read none of it.
_OVERWRITES = {
    "aten::copy_",
    "aten::fill_",
    "aten::zero_",
    "aten::normal_",
    "aten::uniform_",
    "aten::exponential_",
}

_MOST_EVENTS = 4096  # of one memory: each write looks at all that follow


@dataclass(frozen=True, slots=True)
class _Event:
    """A call that reads or writes one memory, or the end of the step, ``None``."""

    call: Node | None
    reads: tuple[Node, ...]
    overwrites: Node | None


class LastReadings:
    """Tracks which parts of which memory are read after each call of a step.

    Parameters
    ----------
    nodes
        The nodes of the whole step, in order.
    kept
        Nodes whose values outlive the step.
    """

    def __init__(self, nodes: Iterable[Node], kept: Iterable[Node]) -> None:
        self._events: dict[int, list[_Event]] = {}
        seen: set[int] = set()
        for node in nodes:
            if node.op == "placeholder":
                seen.add(storage_id(node.meta["val"]))
            elif node.op == "call_function" and node.target is not operator.getitem:
                seen |= self._note(node, seen)
        for node in kept:
            self._events.setdefault(storage_id(node.meta["val"]), []).append(
                _Event(None, (node,), None)
            )

    def _note(self, node: Node, seen: set[int]) -> set[int]:
        """Note what a call reads and writes; returns the memory that it makes."""
        results = results_of(node)
        fresh = {storage_id(r) for r in results} - seen
        if not fresh and not node.meta["writes"] and results:
            return fresh  # a view
        by_memory: dict[int, list[Node]] = {}
        for argument in node.all_input_nodes:
            by_memory.setdefault(storage_id(argument.meta["val"]), []).append(argument)
        for memory, arguments in by_memory.items():
            target = overwritten(node)
            if target is None or arguments != [target]:
                event = _Event(node, tuple(arguments), None)
            else:
                event = _Event(node, (), target)
            self._events.setdefault(memory, []).append(event)
        return fresh

    def leaves_nothing(self, call: Node) -> bool:
        """Whether the call, or a later one, writes all that is read later of its target."""
        target = overwritten(call)
        if target is None:
            return False
        events = self._events.get(storage_id(target.meta["val"]), [])
        if len(events) > _MOST_EVENTS:
            return False
        place = next((i for i, e in enumerate(events) if e.call is call), None)
        if place is None or events[place].overwrites is None:
            return False
        new = [target.meta["val"]]
        for event in events[place + 1 :]:
            for node in event.reads:
                if not any(lies_within(node.meta["val"], part) for part in new):
                    return False
            if event.overwrites is not None:
                new.append(event.overwrites.meta["val"])
        return True


def overwritten(call: Node) -> Node | None:
    """Return the one argument that a call fills without reading it, if there is one."""
    func = call.target
    if not isinstance(func, OpOverload) or hidden_writes(func, call.args):
        return None
    written = call.meta["writes"]
    if len(written) != 1:
        return None
    target: Node = written[0]
    if sum(x is target for x in tree_iter((call.args, call.kwargs))) > 1:
        return None  # addmm(total, a, b, out=total) reads it, too
    is_out = any(call.kwargs.get(a.name) is target for a in schema_of(func).arguments if a.is_out)
    if is_out and isinstance(call.meta["val"], torch.Tensor):
        return target if call.meta["val"].shape == target.meta["val"].shape else None
    fills = schema_of(func).name in _OVERWRITES and call.args and call.args[0] is target
    return target if fills else None


def lies_within(part: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether ``whole`` contains every element of ``part``, both views of the same memory.

    ``False`` also if that is hard to decide.

    >>> x = torch.zeros(4, 8)
    >>> lies_within(x[1:, :2], x[:, :4]), lies_within(x[:, 3:5], x[:, :4])
    (True, False)
    """
    if part.dtype != whole.dtype:
        return False
    if part.numel() == 0:
        return True
    if whole.numel() == 0:
        return False
    dims = _merged(whole)
    if any(s < n * t for (_, s), (n, t) in pairwise(dims)):
        return False  # its rows overlap, or lie in each other's gaps
    rest = part.storage_offset() - whole.storage_offset()
    if rest < 0:
        return False
    last = []  # in each dimension of the whole: how far the part reaches
    for _, stride in dims:
        last.append(rest // stride)
        rest %= stride
    if rest:
        return False
    for size, stride in _merged(part):
        i = next((i for i, (_, s) in enumerate(dims) if s <= stride), None)
        if i is None or stride % dims[i][1]:
            return False
        last[i] += (size - 1) * (stride // dims[i][1])
    return all(place < size for place, (size, _) in zip(last, dims, strict=True))


def _merged(t: torch.Tensor) -> list[tuple[int, int]]:
    """Sizes and strides, outer dimensions first, with dimensions merged that lie densely."""
    dims = sorted(
        ((size, abs(stride)) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1),
        key=lambda d: -d[1],
    )
    merged: list[tuple[int, int]] = []
    for size, stride in dims:
        if stride == 0:  # the same elements again
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


__all__ = ["LastReadings", "lies_within", "overwritten"]
