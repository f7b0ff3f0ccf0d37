"""Convert a captured step to the functional joint graph that PyTorch's partitioners take.

``torch.compile`` gives its partitioner one graph of forward and backward without
in-place writes, with parameters and inputs as ``primals_…`` and the gradients of the
outputs as ``tangents_…``. The captured step is the same graph, except for calls that
write to memory. Here each of these becomes its functional twin, and later reads of the
memory read the twin's result.

Nothing is traced again, so each node stands for a call of the step, and each of its
results for a storage of the cost graph. A partitioner's choice of what to save is
therefore exact, for every model that can be captured.

Dropout is written as AOTAutograd writes it, as ``native_dropout``, which the
partitioner knows to be random; eager's CPU kernels draw a mask and multiply.

Writes that a call's schema does not mention (batch norm's running statistics) are
left out.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.fx import Graph, Node

from graph_capture.calls.storage_id import storage_id
from graph_capture.captured_step import CapturedStep
from graph_capture.private_torch.aten import to_copy
from graph_capture.private_torch.operators import OpOverload, schema_of
from graph_capture.private_torch.trees import tree_map

aten = torch.ops.aten

STATIC_ROLES = ("parameter", "buffer", "attribute", "constant")
"""Roles of placeholders whose memory exists before and after every step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JointGraph:
    """Forward and backward of a captured step, without in-place writes.

    Parameters
    ----------
    graph
        Placeholders ``primals_…``, then ``tangents_…``; every node carries
        ``meta["val"]``. The output is a tuple: forward's results, the new values of
        buffers and inputs that it writes to, then the gradients.
    num_forward_outputs
        How many of the outputs come before the gradients.
    static_inputs
        The placeholders that are parameters, buffers and constants.
    storage_of
        From the name of a node to the storage of the cost graph that holds its
        value; nodes without one are missing.
    """

    graph: Graph
    num_forward_outputs: int
    static_inputs: tuple[int, ...]
    storage_of: Mapping[str, int]


def joint_graph(captured: CapturedStep) -> JointGraph:
    """Rewrite a captured step without in-place calls.

    Raises
    ------
    ValueError
        When a call writes to memory and returns nothing, so that no node could stand
        for what it wrote.
    """
    return _Functional(captured).finish()


class _Functional:
    """Walks over the captured nodes and maps each to its current node.

    ``_now`` has the node that holds a captured node's value, and ``_at`` the version of
    its memory at that time. ``_whole`` has, for each memory, the node that holds all of
    its current contents.
    """

    def __init__(self, captured: CapturedStep) -> None:
        self._captured = captured
        self._graph = Graph()
        self._now: dict[Node, Node] = {}
        self._at: dict[Node, int] = {}
        self._version: dict[int, int] = {}
        self._whole: dict[int, Node] = {}
        self._storages = _StorageOf(captured)
        self._storage_of: dict[str, int] = {}
        self._static: list[int] = []
        self._resident: set[int] = set()

    def finish(self) -> JointGraph:
        step = self._captured.step
        placeholders = step.graph.find_nodes(op="placeholder")
        resident = [n for n in placeholders if n.meta["role"] != "tangent"]
        self._resident.update(_memory(n) for n in resident)
        for i, node in enumerate(resident):
            self._place(node, f"primals_{i + 1}")
            if node.meta["role"] in STATIC_ROLES:
                self._static.append(i)
        for i, node in enumerate(step.tangents):
            self._place(node, f"tangents_{i + 1}")
        for node in step.graph.nodes:
            if node.op == "call_function":
                self._storages.pass_by(node)
                self._add(node)
        forward = [self._read(n) for n in step.outputs]
        forward += [self._read(n) for n in resident if self._version[_memory(n)]]
        gradients = [self._read(n) for _, n in step.gradients]
        self._graph.output((*forward, *gradients))
        self._fuse_dropout()
        return JointGraph(
            graph=self._graph,
            num_forward_outputs=len(forward),
            static_inputs=tuple(self._static),
            storage_of=self._storage_of,
        )

    def _place(self, node: Node, name: str) -> None:
        new = self._graph.placeholder(name)
        new.meta["val"] = node.meta["val"]
        self._hold(node, new)

    def _add(self, node: Node) -> None:
        if node.target is operator.getitem:
            source = node.args[0]
            assert isinstance(source, Node)
            new = self._graph.call_function(operator.getitem, (self._now[source], node.args[1]))
            new.meta["val"] = node.meta["val"]
            self._hold(node, new)
            return
        new = self._call(node)
        if isinstance(node.meta["val"], torch.Tensor):
            written = node.meta["writes"]
            if written:
                self._write(written[0], new)
            self._hold(node, new)
        else:
            self._now[node] = new

    def _call(self, node: Node) -> Node:
        """The functional twin of a call, on the current values of its arguments."""
        assert isinstance(node.target, OpOverload)
        twin = functional_twin(node.target)
        taken = {a.name for a in schema_of(twin).arguments}
        kwargs = {k: v for k, v in node.kwargs.items() if k in taken}
        inner = [w for w in node.meta["writes"] if _memory(w) not in self._resident]
        one_result = isinstance(node.meta["val"], torch.Tensor)
        if inner and not (one_result and len(node.meta["writes"]) == 1):
            raise ValueError(
                f"{node.target} ({node.meta['source']}) writes to {len(inner)} tensors of the "
                "step and returns no single result that could stand for them"
            )
        new = self._graph.create_node(
            "call_function",
            twin,
            tree_map(self._read_if_node, node.args),
            tree_map(self._read_if_node, kwargs),
            name=node.name,
        )
        new.meta["val"] = node.meta["val"] if one_result else _items(node)
        new.meta["phase"] = node.meta["phase"]
        if schema_of(twin).is_mutable and node.meta["phase"] == "backward":
            new.meta["partitioner_tag"] = "is_backward"
        return new

    def _hold(self, node: Node, new: Node) -> None:
        """Set ``new`` as the value of ``node``, in the current version of its memory."""
        memory = _memory(node)
        self._whole.setdefault(memory, new)
        self._at[node] = self._version.setdefault(memory, 0)
        self._now[node] = new
        storage = self._storages.of(node)
        if storage is not None:
            self._storage_of[new.name] = storage

    def _write(self, written: Node, new: Node) -> None:
        """Set ``new`` as the contents of the memory that ``written`` looks at."""
        memory = _memory(written)
        whole = self._whole[memory]
        self._version[memory] += 1
        value, all_of_it = written.meta["val"], whole.meta["val"]
        if value.numel() != all_of_it.numel():
            placed = _strided(value)
            new_whole = self._graph.call_function(
                aten.as_strided_scatter.default, (whole, new, *placed)
            )
            new_whole.meta["val"] = all_of_it
            if whole.name in self._storage_of:
                self._storage_of[new_whole.name] = self._storage_of[whole.name]
            self._whole[memory] = new_whole
        else:
            self._whole[memory] = new
        self._now[written] = new
        self._at[written] = self._version[memory]

    def _fuse_dropout(self) -> None:
        """Turn draw, scale, multiply into ``native_dropout``, and their backward into its own."""
        for draw in list(self._graph.find_nodes(op="call_function", target=aten.bernoulli.p)):
            dropout = _dropout_of(draw)
            if dropout is not None:
                self._fuse(dropout)

    def _fuse(self, dropout: _Dropout) -> None:
        keep, product = dropout.keep_probability, dropout.product
        with self._graph.inserting_before(product):
            fused = self._graph.call_function(
                aten.native_dropout.default, (dropout.argument, 1 - keep, True)
            )
            fused.meta["val"] = (product.meta["val"], dropout.mask.meta["val"])
            results = [self._graph.call_function(operator.getitem, (fused, i)) for i in (0, 1)]
        for result, before in zip(results, (product, dropout.mask), strict=True):
            result.meta["val"] = before.meta["val"]
            if before.name in self._storage_of:
                self._storage_of[result.name] = self._storage_of[before.name]
        product.replace_all_uses_with(results[0])
        for way_back, gradient in dropout.ways_back:
            way_back.target = aten.native_dropout_backward.default
            way_back.args, way_back.kwargs = (gradient, results[1], 1 / keep), {}
        for node in (product, *dropout.noise, dropout.mask):
            self._graph.erase_node(node)

    def _read_if_node(self, argument: Any) -> Any:
        return self._read(argument) if isinstance(argument, Node) else argument

    def _read(self, node: Any) -> Node:
        """The node that now holds the value of ``node``; a view is made again after a write."""
        memory = _memory(node)
        if self._at[node] != self._version[memory]:
            whole, value = self._whole[memory], node.meta["val"]
            if _strided(value) != _strided(whole.meta["val"]):
                whole = self._graph.call_function(
                    aten.as_strided.default, (whole, *_strided(value))
                )
                whole.meta["val"] = value
            self._hold(node, whole)
        return self._now[node]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dropout:
    """A dropout in a functional graph.

    Parameters
    ----------
    mask
        The draw, one byte per element.
    noise
        The factors made from it, last first.
    keep_probability
        Of an element.
    argument, product
        The input of the dropout, and its output.
    ways_back
        Products of the backward pass, each with the gradient that it scales.
    """

    mask: Node
    noise: tuple[Node, ...]
    keep_probability: float
    argument: Node
    product: Node
    ways_back: tuple[tuple[Node, Node], ...]


def _dropout_of(draw: Node) -> _Dropout | None:
    """The dropout that a draw belongs to; ``None`` if it belongs to something else.

    It is either what ``graph_capture.folding.dropout`` writes (a mask, its copy in the tensor's
    dtype, that divided by the probability, and products with it), or eager's own, which
    draws in the tensor's dtype.
    """
    copy = _only_user(draw, to_copy.default)
    noise = _only_user(copy or draw, aten.div.Scalar)
    keep = draw.args[1] if len(draw.args) > 1 else 0.5  # default arguments are not recorded
    if noise is None or not isinstance(keep, float) or not 0 < keep < 1:
        return None
    users = [u for u in noise.users if u.target is aten.mul.Tensor and len(u.args) == 2]
    partner = {u: u.args[1] if u.args[0] is noise else u.args[0] for u in users}
    forward = [u for u in users if u.meta["phase"] == "forward"]
    if len(users) < len(noise.users) or len(forward) != 1 or noise in partner.values():
        return None
    nodes = {u: p for u, p in partner.items() if isinstance(p, Node)}
    if len(nodes) < len(users):
        return None
    (product,) = forward
    argument = nodes.pop(product)
    if len({tuple(n.meta["val"].shape) for n in (draw, argument, product)}) > 1:
        return None  # drops whole channels or paths; AOTAutograd has no single call for that
    return _Dropout(
        mask=draw,
        noise=(noise,) if copy is None else (noise, copy),
        keep_probability=keep,
        argument=argument,
        product=product,
        ways_back=tuple(nodes.items()),
    )


def _only_user(node: Node, target: Any) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is target else None


class _StorageOf:
    """The storage that a captured node's memory belongs to, call after call.

    One memory of the captured step can be two storages, if a call that would overwrite
    what others still read works on a copy.
    """

    def __init__(self, captured: CapturedStep) -> None:
        copies = {new for code in captured.code for _, new in code.clones}
        copies |= {new for code in captured.code for new in code.blanks}
        self._owned = {
            node: k
            for k, carriers in enumerate(captured.carriers)
            if k not in copies
            for node in carriers
        }
        self._copied: dict[Node, list[tuple[Node, int]]] = {
            code.calls[0]: [
                (n, new)
                for new in (*(new for _, new in code.clones), *code.blanks)
                for n in captured.carriers[new]
            ]
            for code in captured.code
            if code.clones or code.blanks
        }
        self._current: dict[int, int] = {}

    def pass_by(self, call: Node) -> None:
        """Note that the walk has reached ``call``."""
        for carrier, new in self._copied.get(call, ()):
            self._current[_memory(carrier)] = new

    def of(self, node: Node) -> int | None:
        """The storage of a node's value; ``None`` if the cost graph has none."""
        memory = _memory(node)
        if memory not in self._current and node in self._owned:
            self._current[memory] = self._owned[node]
        return self._current.get(memory)


@cache
def functional_twin(func: OpOverload) -> OpOverload:
    """Return the overload that computes the same without writing in place.

    ``aten.add_.Tensor`` gives ``aten.add.Tensor``, ``aten.mul.out`` gives
    ``aten.mul.Tensor``. Overload names differ between the two, so the arguments decide.
    An overload without a twin (``normal_``) is its own.

    Examples
    --------
    >>> functional_twin(torch.ops.aten.bernoulli_.float)
    <OpOverload(op='aten.bernoulli', overload='p')>
    """
    if not schema_of(func).is_mutable:
        return func
    has_out = any(a.is_out for a in schema_of(func).arguments)
    wanted = [(a.name, str(a.type)) for a in schema_of(func).arguments if not a.is_out]
    namespace, name = schema_of(func).name.split("::")
    packets = [name] if has_out else [name.removesuffix("_"), name + "_functional"]
    for packet_name in packets:
        packet = getattr(getattr(torch.ops, namespace), packet_name, None)
        for overload in packet.overloads() if packet is not None else ():
            twin = getattr(packet, overload)
            same = [(a.name, str(a.type)) for a in schema_of(twin).arguments] == wanted
            if same and not schema_of(twin).is_mutable:
                return twin
    return func


def _items(node: Node) -> tuple[Any, ...]:
    """The results of a call that returns several; ``None`` for unused ones."""
    taken = {u.args[1]: u.meta["val"] for u in node.users if u.target is operator.getitem}
    assert isinstance(node.target, OpOverload)
    return tuple(taken.get(i) for i in range(len(schema_of(node.target).returns)))


def _memory(node: Node) -> int:
    return storage_id(node.meta["val"])


def _strided(value: torch.Tensor) -> tuple[list[int], list[int], int]:
    return list(value.shape), list(value.stride()), int(value.storage_offset())
