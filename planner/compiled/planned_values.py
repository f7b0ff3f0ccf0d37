"""What the nodes of a planned graph are to a compiler: memory of their own, views, writes.

A planned graph is written in eager's operators. An operator that writes returns what it wrote
to, so its result *is* its argument. A view costs nothing and can be written again wherever its
memory is there. What is left are *roots*: inputs, and results with memory of their own. Only
roots cross from one part of a graph to another.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch.fx import Graph, Node

from graph_capture.private_torch.autograd import set_grad_enabled
from graph_capture.private_torch.operators import OpOverload, schema_of
from graph_capture.private_torch.trees import tree_leaves


class PlannedValues:
    """Reads a planned graph, forward's or a part of backward's.

    Parameters
    ----------
    graph
        Its nodes carry ``val``, ``memory`` and, calls of operators, ``operator``.

    Attributes
    ----------
    calls
        Nodes that compute or write, in order.
    inputs, results
        What the graph takes and returns.
    modes
        Whether each call runs in grad mode; ``None`` before it is set for the first time.
    mode, first_mode
        The grad mode at the end and at the beginning, where it is set in between.
    """

    def __init__(self, graph: Graph) -> None:
        self._nodes = list(graph.nodes)
        self._same: dict[Node, Node] = {}  # the result of a write -> what is written to
        self._views: set[Node] = set()
        self.results: tuple[Node, ...] = _listed(self._nodes[-1].args[0])
        self.inputs = tuple(n for n in self._nodes if n.op == "placeholder")
        memories = Counter(n.meta.get("memory") for n in self.inputs)
        self._alone = {n for n in self.inputs if memories[n.meta.get("memory")] == 1}
        self.calls: list[Node] = []
        self.modes: dict[Node, bool | None] = {}
        self.mode: bool | None = None
        self.first_mode: bool | None = None
        self._unclear: set[Node] = set()  # roots that are looked at or reshaped behind our back
        for node in self._nodes:
            self._read(node)

    def _read(self, node: Node) -> None:
        if node.op in ("placeholder", "output"):
            return
        if node.target is set_grad_enabled:
            (enabled,) = node.args
            assert isinstance(enabled, bool)
            if self.mode is None:
                self.first_mode = not enabled
            self.mode = enabled
            return
        if node.target is operator.getitem:
            if node.args[0] in self._views:
                self._views.add(node)
            return
        func = node.meta.get("operator")
        written = written_by(node)
        if is_view(node):
            self._views.add(node)
            return
        if len(written) == 1 and isinstance(node.meta.get("val"), torch.Tensor):
            self._same[node] = written[0]
        elif _may_look_at_arguments(node):
            self._unclear |= {node, *node.users, *self.roots(node)}
        if isinstance(func, OpOverload) and torch.Tag.inplace_view in func.tags:
            self._unclear |= set(self.roots(node))
        self.modes[node] = self.mode
        self.calls.append(node)

    def as_written(self, node: Node) -> Node:
        """The node of the same tensor that no write made."""
        while node in self._same:
            node = self._same[node]
        return node

    def is_view(self, node: Node) -> bool:
        """Whether a node only looks at memory."""
        return node in self._views

    def root(self, node: Node) -> Node:
        """The node whose memory a node's value lies in."""
        node = self.as_written(node)
        while node in self._views:
            node = self.as_written(node.all_input_nodes[0])
        return node

    def roots(self, node: Node) -> list[Node]:
        """What a call or the output reads, each once."""
        return list(dict.fromkeys(self.root(n) for n in node.all_input_nodes))

    def made(self, call: Node) -> list[Node]:
        """Roots that a call makes."""
        if call in self._same:
            return []
        if isinstance(call.meta.get("val"), torch.Tensor):
            return [call]
        return [user for user in call.users if user.target is operator.getitem] or [call]

    def is_clear(self, root: Node) -> bool:
        """Whether all is known of who looks at a root and how it lies in memory."""
        return root not in self._unclear

    def is_alone(self, root: Node) -> bool:
        """Whether no other input of the graph may lie in a root's memory."""
        return root.op != "placeholder" or root in self._alone


_aten = torch.ops.aten
_BY_OFFSET = {_aten.as_strided.default}  # of the memory, whatever the argument looks at
_UNDECLARED_VIEWS = {"aten::_unsafe_view"}


def written_by(node: Node) -> list[Node]:
    """The arguments that a call writes to, by the schema of its operator."""
    func = node.meta.get("operator")
    if not isinstance(func, OpOverload) or not schema_of(func).is_mutable:
        return []
    found: list[Node] = []
    for i, argument in enumerate(schema_of(func).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.kwargs.get(argument.name, node.args[i] if i < len(node.args) else None)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Node)]
    return found


def is_view(node: Node) -> bool:
    """Whether a call only looks at the memory of its one tensor, from where that looks."""
    func = node.meta.get("operator")
    if not isinstance(func, OpOverload) or func in _BY_OFFSET or len(node.all_input_nodes) != 1:
        return False
    if schema_of(func).name in _UNDECLARED_VIEWS:
        return True
    return _declares_view(func) and torch.Tag.inplace_view not in func.tags


def _declares_view(func: OpOverload) -> bool:
    known = [argument.alias_info for argument in schema_of(func).arguments]
    return not schema_of(func).is_mutable and any(info is not None for info in known)


def _may_look_at_arguments(node: Node) -> bool:
    """Whether a call's results may lie in the memory of its arguments, though it is no view."""
    func = node.meta.get("operator")
    if isinstance(func, OpOverload) and _declares_view(func):
        return True
    memory = node.meta.get("memory")
    if memory is None or func in _COPIES:
        return False
    return any(memory == n.meta.get("memory") for n in node.all_input_nodes)


_COPIES = {_aten.clone.default}  # of a value before it is written over, which has its memory's name


def _listed(values: Any) -> tuple[Node, ...]:
    return tuple(values)


__all__ = ["PlannedValues", "is_view", "written_by"]
