"""The rest of a step that was captured on stand-ins, and where in it the blocks' calls are."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.fx import Node

from graph_capture.apart.opaque_calls import BACKWARD, FORWARD, SeenCall
from graph_capture.calls.storage_id import storage_id
from graph_capture.captured_step import CapturedStep, storages_by_memory
from graph_capture.cost_graph import CostGraph, Storage

from .rest import CallPlace


class CapturedRest:
    """See :class:`.rest.Rest`."""

    measured = False

    def __init__(self, captured: CapturedStep) -> None:
        assert captured.unplanned is not None
        self.captured = captured
        self.loss = captured.step.loss_spec
        self._graph, self._target = captured.unplanned, captured.target
        self._at = storages_by_memory(captured.unplanned_carriers)
        self._nodes = {node.name: node for node in captured.step.graph.nodes}
        self._forward: dict[int, int] = {}
        self._backward: dict[int, int] = {}
        for v, op in enumerate(self._graph.operators):
            if op.target in (FORWARD, BACKWARD):
                places = self._forward if op.target == FORWARD else self._backward
                places[self._nodes[op.name].args[1]] = v
        state: dict[str, int] = {}
        for node in captured.step.graph.find_nodes(op="placeholder"):
            if node.meta["role"] in ("parameter", "buffer"):
                k = self._at[storage_id(node.meta["val"])]
                state.update((name, k) for name in node.meta["targets"])
        self.state: Mapping[str, int] = state

    def graph(self, copied_bytes: int | None) -> CostGraph:
        """The rest, in which the operators that stand for blocks take no time or scratch.

        Parameters
        ----------
        copied_bytes
            Of what blocks copy in case that a check of a value fails; ``None`` for the step
            without a plan.
        """
        stands = {*self._forward.values(), *self._backward.values()}
        operators = tuple(
            replace(op, cost_ns=0, workspace_bytes=0) if v in stands else op
            for v, op in enumerate(self._graph.operators)
        )
        others = {}
        if copied_bytes is not None:
            others = {
                "copies in blocks, in case a check fails": copied_bytes,
                "results that nobody reads": self._unread_bytes(),
            }
        beside = tuple(
            Storage(name=name, size_bytes=num_bytes, producer=None, category="buffer")
            for name, num_bytes in others.items()
            if num_bytes
        )
        return CostGraph(operators, (*self._graph.storages, *beside))

    def _unread_bytes(self) -> int:
        """Bytes of what eager code makes and perhaps holds for a while, though nobody reads it.

        A planned graph leaves such calls out, eager code does not.
        """
        sizes = {
            storage_id(value): value.untyped_storage().nbytes()
            for node in self._nodes.values()
            if node.op == "call_function"
            and isinstance(value := node.meta.get("val"), torch.Tensor)
            and self._target.place(value.device).type == self._target.torch_type
        }
        return sum(num_bytes for sid, num_bytes in sizes.items() if sid not in self._at)

    def place_of(self, call: SeenCall) -> CallPlace | None:
        """See :class:`.rest.Rest`; ``None`` where the operators of the call were merged."""
        if call.number not in self._forward or call.number not in self._backward:
            return None
        forward, backward = self._forward[call.number], self._backward[call.number]
        ahead, behind = (self._nodes[self._graph.operators[v].name] for v in (forward, backward))
        num_tangents = len(call.form.differentiated)
        tangents = behind.args[0][:num_tangents]
        return CallPlace(
            forward=forward,
            backward=backward,
            given=tuple(map(self._of, ahead.args[0])),
            made={i: self._of(item) for i, item in _items(ahead).items()},
            tangents=tuple(map(self._of, tangents)),
            gradients={i: self._of(item) for i, item in _items(behind).items()},
            copied_bytes=sum(
                value.numel() * value.element_size()
                for value, i in zip(
                    (node.meta["val"] for node in tangents), call.form.differentiated, strict=True
                )
                if value.stride() != call.form.outputs[i].spec.stride and not value.is_contiguous()
            ),
        )

    def _of(self, node: Node) -> int:
        return self._at[storage_id(node.meta["val"])]


def _items(node: Node) -> dict[int, Node]:
    """The tensors of a call that returns several."""
    return {
        user.args[1]: user  # type: ignore[misc]
        for user in node.users
        if user.target is operator.getitem
    }
