"""Predict which calls of a joint graph Inductor makes into one kernel, by rule.

Inductor writes elementwise calls into the loops of whoever reads them, and reductions into the
loops that read their results over the same elements. So a call whose readers all lie in one
kernel needs no memory of its own, and costs next to nothing to repeat there. Memory is needed
where

- a kernel of a library reads it (matrix products, convolutions, attention),
- it is a result of the graph,
- kernels of forward and of backward read it: one may save it, or make it again,
- several kernels read it.

The rules are a prediction; what Inductor made of a graph is measured afterwards
(:mod:`planner.compiled.lowered_peak`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch.fx import Node

from graph_capture.calls.storage_id import storage_id
from graph_capture.costs.device import Device
from graph_capture.costs.operator_classes import (
    COPY,
    ELEMENTWISE,
    INDEXING,
    NORMALIZATION,
    REDUCTION,
    operator_class,
)
from graph_capture.private_torch.operators import OpOverload, schema_of

from .joint_step import JointStep, items_of, makes_memory, tensors_of, written_nodes
from .sizes import concrete, num_bytes


@dataclass(frozen=True, kw_only=True)
class FusedGroups:
    """Calls that become one kernel.

    Parameters
    ----------
    groups
        In base order, forward's first; each in the order of its calls.
    inner
        Memory that lies inside a kernel, by identity.
    """

    groups: tuple[tuple[Node, ...], ...]
    inner: frozenset[int]


def fuse(step: JointStep) -> FusedGroups:
    """Return the kernels that a joint graph's calls become."""
    return _Fusing(step).finish()


class _Fusing:
    """Walks the calls from last to first, each after all of its readers."""

    def __init__(self, step: JointStep) -> None:
        self._step = step
        self._place = {call: i for i, call in enumerate(step.calls)}
        self._kernel: dict[Node, Node] = {}  # call -> the last call of its kernel
        self._inner: set[int] = set()
        results = [v for v in (*step.outputs, *step.gradients) if isinstance(v, Node)]
        self._results = {storage_id(t) for n in results for t in tensors_of(n.meta["val"])}

    def finish(self) -> FusedGroups:
        for call in reversed(self._step.calls):
            self._kernel[call] = self._kernel_of(call)
        members: dict[Node, list[Node]] = {}
        for call in self._step.calls:
            members.setdefault(self._kernel[call], []).append(call)
        ordered = sorted(members, key=self._place.__getitem__)
        return FusedGroups(
            groups=tuple(tuple(members[last]) for last in ordered), inner=frozenset(self._inner)
        )

    def _kernel_of(self, call: Node) -> Node:
        """The kernel that a call joins: its own, or its readers'."""
        if not (is_elementwise(call) or is_reduction(call)):
            return call
        readers = [r for r in _readers(call) if r in self._place]  # others are not run
        early = [r for r in readers if self._is_forward(r) == self._is_forward(call)]
        kernels = {self._kernel[r] for r in early}
        if len(kernels) != 1:
            return call
        (kernel,) = kernels
        fitting = is_elementwise(kernel) or is_reduction(kernel)
        if not fitting or not all(is_elementwise(r) or is_reduction(r) for r in early):
            return call
        alone = len(early) == len(readers) and not self._is_result(call)
        if is_reduction(call):
            if _domain(call) != self._domain_of(kernel):
                return call
        elif not alone:
            return call
        if alone:
            self._inner |= {storage_id(t) for t in tensors_of(call.meta["val"])}
        return kernel

    def _domain_of(self, kernel: Node) -> int:
        return max(_domain(c) for c, last in self._kernel.items() if last is kernel)

    def _is_forward(self, call: Node) -> bool:
        return self._place[call] < self._step.num_forward

    def _is_result(self, call: Node) -> bool:
        return any(storage_id(t) in self._results for t in tensors_of(call.meta["val"]))


def is_elementwise(call: Node) -> bool:
    """Whether Inductor writes a call into the loops of its readers."""
    func = call.target
    if not isinstance(func, OpOverload) or written_nodes(call):
        return False
    if func.namespace == "prims":
        return schema_of(func).name in _ELEMENTWISE_OF_INDUCTOR
    kind = operator_class(func, call.args, call.kwargs)
    if kind == INDEXING:
        return schema_of(func).name in _GATHERING
    return kind == ELEMENTWISE or (kind == COPY and len(call.all_input_nodes) <= 1)


def is_reduction(call: Node) -> bool:
    """Whether a call reduces, in loops of Inductor's own."""
    func = call.target
    if not isinstance(func, OpOverload) or func.namespace != "aten":
        return False
    kind = operator_class(func, call.args, call.kwargs)
    return kind == REDUCTION or (kind == NORMALIZATION and "softmax" not in schema_of(func).name)


_ELEMENTWISE_OF_INDUCTOR = {
    "prims::convert_element_type",
    "prims::inductor_random",
    "prims::inductor_lookup_seed",
    "prims::iota",
    "prims::broadcast_in_dim",
    "prims::fma",
    "prims::div",
}
_GATHERING = {"aten::embedding", "aten::index", "aten::_unsafe_index", "aten::gather"}


def kernel_ns(group: Sequence[Node], outside: Sequence[Node], device: Device) -> int | None:
    """Nanoseconds of a fused kernel: what it reads and writes once, and slow functions.

    ``None`` for a call of a library.
    """
    if not all(is_elementwise(call) or is_reduction(call) for call in group):
        return None
    read = {storage_id(t): num_bytes(t) for n in outside for t in tensors_of(n.meta.get("val"))}
    made = num_bytes(next(tensors_of(group[-1].meta["val"])))
    moved_ns = (sum(read.values()) + made) / device.bytes_per_s * 1e9
    slow_ns = 0.0
    for call in group:
        assert isinstance(call.target, OpOverload)
        per_element = device.fused_element_ns.get(schema_of(call.target).name, 0.0)
        slow_ns += per_element * _domain(call)
    return max(device.launch_ns, round(moved_ns + slow_ns))


def _domain(call: Node) -> int:
    """Elements that a call's loops run over: the most that it reads or makes."""
    tensors = [t for n in (call, *call.all_input_nodes) for t in tensors_of(n.meta.get("val"))]
    return max((prod(concrete(t).shape) for t in tensors), default=0)


def _readers(call: Node) -> list[Node]:
    """Calls that read what a call makes, through views."""
    found: dict[Node, None] = {}
    open_nodes: list[Any] = [call, *items_of(call)]
    while open_nodes:
        for user in open_nodes.pop().users:
            if user.op != "call_function":
                continue
            if makes_memory(user):
                found[user] = None
            else:
                open_nodes.append(user)
    return list(found)


__all__ = ["FusedGroups", "fuse", "is_elementwise", "is_reduction", "kernel_ns"]
