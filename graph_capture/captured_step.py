"""A captured step: its graph, its cost graph, and how the two correspond."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.fx import Node

from .calls.storage_id import storage_id
from .cost_graph import CostGraph
from .costs.cost_model import CostRecord
from .costs.target import Target
from .folding.blocks import OperatorCode
from .loop.loop_holds import NOTHING_ELSE, LoopHolds
from .loop.optimizer_step import OptimizerStep
from .tracing.traced_step import TracedStep


def storages_by_memory(carriers: tuple[tuple[Node, ...], ...]) -> dict[int, int]:
    """Return the index of each storage by the memory that its nodes' values lie in."""
    return {
        storage_id(node.meta["val"]): k
        for k, nodes in enumerate(carriers)
        for node in nodes
        if node.meta.get("role") != "generator"
    }


@dataclass(frozen=True, kw_only=True)
class CapturedStep:
    """A traced step, its cost graph, and the meaning of each operator.

    Parameters
    ----------
    step
        The torch.fx graph of forward and backward.
    graph
        The cost graph; its operators are in the order of ``code``.
    code
        The fx nodes of each operator. The loss, the optimizer and the recording of
        a generator's state have no calls.
    carriers
        For each storage, the nodes whose value owns its memory.
    state_of
        For each operator that draws, the operator that records the generator's state.
    state_node
        Stands for any recorded state; the traced step has no node for it.
    loss
        Index of the operator that stands for the loss. Operators before it run in
        forward, those after it in backward.
    target
        Where the step runs and whose memory is counted.
    optimizer
        The optimizer whose state and step are counted, if any.
    unplanned
        The cost graph of the step as eager PyTorch runs it, without the planner's own
        writes over arguments; ``None`` while the step is being captured.
    unplanned_carriers
        For each storage of ``unplanned``, the nodes whose value owns its memory.
    model
        Refers weakly to the captured module.
    costs
        Where the times come from; ``None`` while the step is being captured.
    holds
        What the loop around the step holds.
    """

    step: TracedStep
    graph: CostGraph
    code: tuple[OperatorCode, ...]
    carriers: tuple[tuple[Node, ...], ...]
    state_of: Mapping[int, int]
    state_node: Node
    loss: int
    target: Target
    optimizer: OptimizerStep | None
    model: weakref.ref[nn.Module]
    unplanned: CostGraph | None = None
    unplanned_carriers: tuple[tuple[Node, ...], ...] = ()
    costs: CostRecord | None = None
    holds: LoopHolds = NOTHING_ELSE

    @property
    def storage_of_memory(self) -> dict[int, int]:
        """The index of each storage by the memory of its tensors, a ``recorder.storage_id``."""
        return storages_by_memory(self.carriers)

    @property
    def device_type(self) -> str:
        """``"cpu"`` or ``"cuda"``."""
        return self.target.torch_type
