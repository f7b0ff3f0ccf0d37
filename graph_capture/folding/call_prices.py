"""Time and scratch of the calls of a step, and what lies in memory beside its storages."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from ..calls.storage_id import storage_id
from ..cost_graph import Category
from ..costs.cost_model import Call
from ..costs.library_workspace import STORAGE_NAME, library_workspace_bytes
from ..loop.optimizer_step import OptimizerStep
from ..private_torch.operators import OpOverload, schema_of
from ..private_torch.trees import tree_map
from ..tracing.traced_step import TracedStep
from .operators import item_index
from .pricing import Pricing


class CallPrices:
    """Prices calls on stand-ins of their tensors.

    Parameters
    ----------
    pricing
        Cost model and probe; keeps what was priced.
    """

    def __init__(self, pricing: Pricing) -> None:
        self._pricing = pricing
        self._resized: dict[int, torch.Tensor] = {}

    def resize(self, item: Node, num_bytes: int) -> None:
        """Let a stand-in that says nothing of its size be of so many bytes from now on."""
        if num_bytes and not item.meta["val"].numel():
            stand_in = torch.empty(num_bytes, dtype=torch.uint8, device="meta")
            self._resized[storage_id(item.meta["val"])] = stand_in

    def of(self, call: Node) -> tuple[int, int]:
        """Return nanoseconds and scratch bytes of a call."""
        key = call, call.target
        if key not in self._pricing.known:
            self._pricing.known[key] = self._priced(call)
        return self._pricing.known[key]

    def _priced(self, call: Node) -> tuple[int, int]:
        args, kwargs = self.values(call)
        assert isinstance(call.target, OpOverload)
        out = call.meta["val"]
        if out is None:
            items = {
                item_index(u): u.meta["val"] for u in call.users if u.target is operator.getitem
            }
            out = tuple(items.get(i) for i in range(len(schema_of(call.target).returns)))
        made = Call(
            func=call.target,
            args=args,
            kwargs=kwargs,
            out=out,
            grad_enabled=call.meta["phase"] == "forward",
        )
        return self._pricing.costs.time_ns(made), self._pricing.probe.bytes_of(made)

    def clone_ns(self, node: Node) -> int:
        """Return nanoseconds of a copy of a tensor."""
        value = node.meta["val"]
        func = torch.ops.aten.clone.default
        return self._pricing.costs.time_ns(Call(func=func, args=(value,), kwargs={}, out=value))

    def region_ns(self, calls: tuple[tuple[Any, tuple, dict, Any], ...]) -> int:
        """Time of code that stays in the training loop."""
        return sum(
            self._pricing.costs.time_ns(Call(func=func, args=args, kwargs=kwargs, out=out))
            for func, args, kwargs, out in calls
        )

    def values(self, call: Node) -> tuple[tuple, dict]:
        """Stand-ins of the tensors that a call was made with."""

        def value(x: Any) -> Any:
            if not isinstance(x, Node):
                return x
            return self._resized.get(storage_id(x.meta["val"]), x.meta["val"])

        return tree_map(value, call.args), tree_map(value, call.kwargs)


def beside(
    step: TracedStep, pricing: Pricing, optimizer: OptimizerStep | None, calls: Sequence[Any]
) -> Iterator[tuple[str, int, Category]]:
    """What lies in memory all step long and belongs to no block: name, bytes, category.

    Parameters
    ----------
    calls
        What the step calls.
    """
    holds = pricing.holds
    found: list[tuple[str, int, Category]] = [
        ("held by loss_fn", step.loss.constant_bytes, "input"),
        ("held by modules", pricing.held_bytes, "buffer"),
        ("copies, in case a check fails", step.before_checks.num_bytes, "buffer"),
        (STORAGE_NAME, library_workspace_bytes(calls, pricing.target.device), "buffer"),
        ("optimizer state", 0 if optimizer is None else optimizer.state_bytes, "optimizer_state"),
        ("held by the loop", holds.resident_bytes, "resident"),
    ]
    yield from (row for row in found if row[1])
    if holds.concurrent_calls > 1:
        yield "held for other calls", holds.waiting_bytes, "waiting"
