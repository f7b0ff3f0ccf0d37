"""What the costs of a step's operators and storages are computed from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from ..costs.cost_model import CostModel
from ..costs.target import Target
from ..costs.workspace import WorkspaceProbe
from ..loop.loop_holds import NOTHING_ELSE, LoopHolds


@dataclass(frozen=True, slots=True, kw_only=True)
class Pricing:
    """What the costs of a step's operators and storages are computed from.

    Parameters
    ----------
    target
        Where the step runs.
    costs
        Time of each call.
    probe
        Scratch memory of each call.
    held_bytes
        Bytes of tensors that lie in modules but take no part in the step.
    bucket_bytes
        Bytes of the buckets of ``DistributedDataParallel``.
    holds
        What the loop around the step holds.
    argument_bytes
        What the tensors of the call keep alive, see
        :func:`~graph_capture.calls.argument_memory.argument_bytes`.
    known
        Time and scratch of the calls that were priced before, by node and target. A
        step is assembled more than once, and few calls change in between.
    """

    target: Target
    costs: CostModel
    probe: WorkspaceProbe
    held_bytes: int
    bucket_bytes: int = 0
    holds: LoopHolds = NOTHING_ELSE
    argument_bytes: tuple[int, ...] | None = None
    known: dict[tuple[Node, Any], tuple[int, int]] = field(default_factory=dict)
