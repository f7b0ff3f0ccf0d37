"""Write a result over an argument that nothing else reads.

Eager PyTorch allocates a result beside its arguments even if an argument is dead right
after. If an elementwise call is the only reader of an argument with the result's shape,
dtype and layout, the same kernel may write there: the bits are the same, and one tensor
less is alive. The gradient of the logits, for example, then needs one buffer instead of
two.

Such a call joins the operator that allocates the argument (see ``operators.Folder``).
A schedule then always runs both, and the memory saved is known before solving.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.fx import Node

from ..calls.draws import draws
from ..calls.storage_id import storage_id
from ..calls.writes import hidden_writes
from ..private_torch.operators import OpOverload, overload_name_of, packet_of, schema_of

# Not elementwise, but they read each row before they write it; compared bit by bit on CPU.
_BY_ROWS_ON_CPU = {
    "aten::_softmax",
    "aten::_log_softmax",
    "aten::_softmax_backward_data",
    "aten::_log_softmax_backward_data",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reuse:
    """A call that can write over an argument.

    Parameters
    ----------
    argument
        The argument that is overwritten.
    target, kwargs
        What to call instead, with the same positional arguments.
    """

    argument: Node
    target: Any
    kwargs: dict[str, Any]


@dataclass
class ReuseFinder:
    """Tracks which calls read what in a traced graph.

    Parameters
    ----------
    nodes
        The nodes of the whole graph, in order.
    kept
        Storages that outlive the step's use of them (outputs, gradients).
    """

    nodes: Iterable[Node]
    kept: set[int]
    _readers: dict[int, set[Node]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        seen: set[int] = set()
        for node in self.nodes:
            if node.op == "placeholder":
                seen.add(storage_id(node.meta["val"]))
            elif node.op == "call_function" and node.target is not operator.getitem:
                results = results_of(node)
                fresh = {storage_id(r) for r in results} - seen
                if fresh or node.meta["writes"] or not results:
                    for argument in node.all_input_nodes:
                        self._readers.setdefault(storage_id(argument.meta["val"]), set()).add(node)
                seen |= fresh

    def candidates(self, node: Node) -> list[Reuse]:
        """Return the arguments that the call may overwrite, the last computed first."""
        func, value = node.target, node.meta["val"]
        if not isinstance(func, OpOverload) or not isinstance(value, torch.Tensor):
            return []
        if node.meta["writes"] or draws(node) or hidden_writes(func, node.args):
            return []
        by_rows = (
            schema_of(func).name in _BY_ROWS_ON_CPU
            and value.device.type == "cpu"
            and all(a.meta["val"].is_contiguous() for a in node.all_input_nodes)  # rows, then
        )
        if not by_rows and torch.Tag.pointwise not in func.tags:
            return []
        if value.dtype.is_complex and not all(
            a.meta["val"].is_contiguous() for a in node.all_input_nodes
        ):
            return []  # the strided loop of complex products rounds differently when it overwrites
        arguments = [a for a in node.all_input_nodes if self._may_overwrite(node, a)]
        found = []
        for argument in sorted(arguments, reverse=True):
            variant = _variant(func, in_place=node.args[0] is argument)
            if variant is not None:
                target, out_name = variant
                kwargs = {**node.kwargs, **({out_name: argument} if out_name else {})}
                found.append(Reuse(argument=argument, target=target, kwargs=kwargs))
        return found

    def _may_overwrite(self, node: Node, argument: Node) -> bool:
        value, old = node.meta["val"], argument.meta["val"]
        sid = storage_id(old)
        same = [a for a in node.all_input_nodes if storage_id(a.meta["val"]) == sid]
        return (
            same == [argument]
            and sid not in self.kept
            and self._readers.get(sid) == {node}
            and (old.shape, old.dtype, old.device) == (value.shape, value.dtype, value.device)
            and old.stride() == value.stride()
            and fills_its_storage(old)
            and fills_its_storage(value)
        )


def results_of(node: Node) -> list[torch.Tensor]:
    """Return the tensors that a call returns."""
    if isinstance(node.meta["val"], torch.Tensor):
        return [node.meta["val"]]
    return [u.meta["val"] for u in node.users if u.target is operator.getitem]


def fills_its_storage(tensor: torch.Tensor) -> bool:
    """Whether a tensor occupies every byte of its storage."""
    num_bytes = tensor.numel() * tensor.element_size()
    return num_bytes > 0 and tensor.untyped_storage().nbytes() == num_bytes


@cache
def _variant(func: Any, *, in_place: bool) -> tuple[Any, str | None] | None:
    """The overload of ``func`` that writes to a given tensor, and the name of that argument.

    Generated ``out`` overloads are left out: they compute a result and copy it.
    """
    arguments = [(a.name, str(a.type)) for a in schema_of(func).arguments]
    for name in packet_of(func).overloads():
        other = getattr(packet_of(func), name)
        outs = [a.name for a in schema_of(other).arguments if a.is_out]
        rest = [(a.name, str(a.type)) for a in schema_of(other).arguments if not a.is_out]
        if len(outs) == 1 and rest == arguments and torch.Tag.generated not in other.tags:
            return other, outs[0]
    if in_place:
        packet = getattr(torch.ops.aten, schema_of(func).name.removeprefix("aten::") + "_", None)
        other = getattr(packet, overload_name_of(func), None) if packet is not None else None
        if other is not None and torch.Tag.generated not in other.tags:
            return other, None
    return None
