"""Read the joint graph of forward and backward that AOTAutograd hands to its partitioner.

The graph is functional: a call makes new memory, looks at its arguments' memory (a view), or
writes to an input of the step at the end of forward (``copy_``). Which is which shows in the
stand-ins that the nodes carry: views share their memory.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule, Node

from graph_capture.calls.storage_id import storage_id
from graph_capture.errors import CaptureError
from graph_capture.private_torch.operators import OpOverload, schema_of
from graph_capture.private_torch.trees import tree_leaves


@dataclass(frozen=True, kw_only=True)
class JointStep:
    """A joint graph, and what each of its nodes is.

    Parameters
    ----------
    module
        The joint graph; nobody changes it.
    outputs, gradients
        What forward and backward return; entries that are no nodes are constants.
    descriptions
        What AOTAutograd says of each of the two lists' entries, or ``None``.
    calls
        Nodes that make memory or have an effect, in base order: those that forward needs,
        then the others.
    num_forward
        How many of the calls forward needs.
    """

    module: GraphModule
    outputs: tuple[Any, ...]
    gradients: tuple[Any, ...]
    descriptions: tuple[Any, ...] | None
    calls: tuple[Node, ...]
    num_forward: int

    @cached_property
    def primals(self) -> tuple[Node, ...]:
        """The inputs of the step."""
        return tuple(n for n in self._placeholders if not is_tangent(n))

    @cached_property
    def tangents(self) -> tuple[Node, ...]:
        """The gradients of forward's outputs."""
        return tuple(n for n in self._placeholders if is_tangent(n))

    @cached_property
    def _placeholders(self) -> list[Node]:
        return list(self.module.graph.find_nodes(op="placeholder"))

    @cached_property
    def written(self) -> Mapping[int, Node]:
        """Memory of the step's inputs that a call writes to, and that call."""
        return {
            storage_id(target.meta["val"]): call
            for call in self.calls
            for target in written_nodes(call)
        }


def read_joint_step(module: GraphModule, num_outputs: int) -> JointStep:
    """Read a joint graph.

    Parameters
    ----------
    module
        As a partition function gets it.
    num_outputs
        How many of its results are forward's.

    Raises
    ------
    CaptureError
        When the graph has something that cannot be planned.
    """
    graph = module.graph
    (output,) = graph.find_nodes(op="output")
    results = tuple(tree_leaves(output.args[0]))
    described = output.meta.get("desc")
    descriptions = None
    if described is not None and len(described) == len(results):
        descriptions = tuple(described)
    for node in graph.nodes:
        if _returns_nothing(node):
            node.meta.setdefault("val", None)
        _check(node)
    outputs, gradients = results[:num_outputs], results[num_outputs:]
    effects = [n for n in graph.nodes if _has_effect(n)]
    early = [n for n in effects if n.meta.get("partitioner_tag") not in _BACKWARD_TAGS]
    forward = _needed_for([*_nodes(outputs), *early])
    if any(is_tangent(n) for n in forward):
        raise CaptureError("a result of forward depends on gradients; such a step is not planned")
    needed = _needed_for([*_nodes(results), *effects])
    calls = [n for n in graph.nodes if n in needed and makes_memory(n)]
    first = [n for n in calls if n in forward]
    return JointStep(
        module=module,
        outputs=outputs,
        gradients=gradients,
        descriptions=descriptions,
        calls=(*first, *(n for n in calls if n not in forward)),
        num_forward=len(first),
    )


_BACKWARD_TAGS = ("is_backward", "must_be_in_backward")


def is_tangent(node: Node) -> bool:
    """Whether a node is the gradient of an output, as AOTAutograd names it."""
    return node.op == "placeholder" and "tangents" in str(node.target)


def is_number(node: Node) -> bool:
    """Whether a node's value is a number: a size of a dynamic shape, or made of such."""
    return isinstance(
        node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
    )


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a node's value, in order."""
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def makes_memory(node: Node) -> bool:
    """Whether a node is a call that makes memory of its own, or has an effect."""
    if node.op != "call_function" or node.target is operator.getitem or is_number(node):
        return False
    if _has_effect(node):
        return True
    return not is_view(node)


def is_view(node: Node) -> bool:
    """Whether all that a call returns lies in the memory of its arguments."""
    made = {storage_id(t) for t in tensors_of(node.meta.get("val"))}
    given = {
        storage_id(t)
        for argument in node.all_input_nodes
        for t in tensors_of(argument.meta.get("val"))
    }
    return bool(made) and made <= given


def written_nodes(node: Node) -> list[Node]:
    """The arguments that a call writes to, by its schema."""
    if not isinstance(node.target, OpOverload) or not schema_of(node.target).is_mutable:
        return []
    found: list[Node] = []
    for i, argument in enumerate(schema_of(node.target).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.kwargs.get(argument.name, node.args[i] if i < len(node.args) else None)
            found += _nodes(tree_leaves(value))
    return found


def items_of(node: Node) -> list[Node]:
    """The tuple getters of a call that returns several values."""
    return [u for u in node.users if u.target is operator.getitem and u.args[0] is node]


def _has_effect(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if not isinstance(node.target, OpOverload):
        return False
    return schema_of(node.target).is_mutable or node.is_impure()


def _returns_nothing(node: Node) -> bool:
    """Whether a node is a check, for which tracing notes no value."""
    return isinstance(node.target, OpOverload) and not schema_of(node.target).returns


def _needed_for(wanted: list[Node]) -> set[Node]:
    needed: set[Node] = set()
    open_nodes = list(wanted)
    while open_nodes:
        node = open_nodes.pop()
        if node not in needed:
            needed.add(node)
            open_nodes += node.all_input_nodes
    return needed


def _nodes(values: Any) -> list[Node]:
    return [v for v in values if isinstance(v, Node)]


def _check(node: Node) -> None:
    """Refuse what the plan would get wrong."""
    if node.op in ("call_module", "call_method"):
        raise CaptureError(f"{node.format_node()} is no operator; such a graph is not planned")
    if node.op == "placeholder" and "seed_offset" in str(node.target):
        raise CaptureError(
            "the step's random numbers are functionalized "
            "(torch._functorch.config.functionalize_rng_ops), which is not planned: switch it off"
        )
    if node.op == "call_function" and "val" not in node.meta:
        raise CaptureError(f"nothing is known of the result of {node.name!r} ({node.target})")
    for tensor in tensors_of(node.meta.get("val")):
        if tensor.layout != torch.strided:
            raise CaptureError(
                f"{node.name!r} is a tensor of layout {tensor.layout}, and only dense ones are "
                "planned: build embeddings with sparse=False, or call to_dense()"
            )
    if makes_memory(node) and not _has_effect(node):
        given = {storage_id(t) for n in node.all_input_nodes for t in tensors_of(n.meta.get("val"))}
        if any(storage_id(t) in given for t in tensors_of(node.meta["val"])):
            raise CaptureError(
                f"{node.name!r} ({node.target}) returns memory of its arguments beside memory of "
                "its own, which is not planned"
            )


__all__ = [
    "JointStep",
    "is_number",
    "is_tangent",
    "is_view",
    "items_of",
    "makes_memory",
    "read_joint_step",
    "tensors_of",
    "written_nodes",
]
