"""A block's graph, and which of its storages are also others'."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from graph_capture.calls.storage_id import storage_id
from graph_capture.captured_step import CapturedStep, storages_by_memory
from graph_capture.cost_graph import CostGraph
from solvers.block_plans.stepping import Block


class InsideBlock:
    """A block's graph, and which of its storages are also others'."""

    def __init__(
        self,
        captured: CapturedStep,
        graph: CostGraph,
        carriers: tuple[tuple[Node, ...], ...],
    ) -> None:
        step = captured.step
        at = storages_by_memory(carriers)
        self.captured = captured
        attributes = {
            at[storage_id(node.meta["val"])]
            for node in step.graph.find_nodes(op="placeholder")
            if node.meta["role"] == "attribute" and storage_id(node.meta["val"]) in at
        }  # the rest counts them among what modules hold
        turn = next(v for v, op in enumerate(graph.operators) if op.phase == "loss")
        self.block = Block(
            graph=CostGraph(
                graph.operators,
                tuple(
                    replace(s, size_bytes=0) if k in attributes else s
                    for k, s in enumerate(graph.storages)
                ),
            ),
            turn=turn,
        )
        inputs = {}
        self.state: dict[str, int] = {}
        for node in step.graph.find_nodes(op="placeholder"):
            k = at.get(storage_id(node.meta["val"]))
            if k is None:
                continue
            if node.meta["role"] == "input":
                inputs[int(node.meta["target"])] = k
            elif node.meta["role"] in ("parameter", "buffer"):
                self.state[str(node.meta["target"])] = k
        self.inputs = inputs
        names = range(len(step.template.names))
        self.outputs = [at[storage_id(step.outputs[i].meta["val"])] for i in names]
        self.outputs = [k for k in self.outputs if k not in set(inputs.values())]
        self.of_output = {i: at[storage_id(step.outputs[i].meta["val"])] for i in names}
        self.tangents = [at[storage_id(node.meta["val"])] for node in step.tangents]
        self.gradients = [at[storage_id(node.meta["val"])] for _, node in step.gradients]

    @classmethod
    def planned(cls, captured: CapturedStep) -> InsideBlock:
        """The step that plans are made of."""
        return cls(captured, captured.graph, captured.carriers)

    @classmethod
    def eager(cls, captured: CapturedStep) -> InsideBlock:
        """The step as eager PyTorch runs it."""
        assert captured.unplanned is not None
        return cls(captured, captured.unplanned, captured.unplanned_carriers)
