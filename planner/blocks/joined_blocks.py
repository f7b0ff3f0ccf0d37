"""Join a step's rest and its blocks, as solvers see them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from graph_capture.captured_step import CapturedStep, storages_by_memory
from graph_capture.cost_graph import CostGraph, Storage
from graph_capture.costs.cost_model import TimingProgress
from graph_capture.opaque_calls import BACKWARD, FORWARD, OpaqueForm, SeenCall
from graph_capture.recorder import storage_id
from graph_capture.target import Target
from solvers.block_plans.points import BlockPoints
from solvers.block_plans.stepping import Block, BlockCall, BlockedStep

from ..base.step_spec import StepSpec
from .captured_blocks import Capturing, DistinctBlock, UnfitBlockError
from .sharded_groups import sharded_groups
from .sharded_step import sharded_step


@dataclass(frozen=True, kw_only=True)
class CapturedBlocks:
    """A step that was captured in blocks.

    Parameters
    ----------
    rest
        The captured rest of the step.
    blocks
        The distinct blocks.
    step
        The same for solvers.
    eager
        The step as eager PyTorch runs it.
    points
        What each distinct block can trade; solved as they are asked for.
    """

    rest: CapturedStep
    blocks: tuple[DistinctBlock, ...]
    step: BlockedStep
    eager: BlockedStep
    points: tuple[BlockPoints, ...]


def capture_blocks(
    model: nn.Module,
    arguments: Mapping[str, Any],
    paths: tuple[str, ...],
    *,
    spec: StepSpec,
    target: Target,
    progress: TimingProgress | None = None,
    seed: int = 0,
) -> CapturedBlocks:
    """Capture the blocks of a step by the calls that its forward really makes.

    Parameters
    ----------
    arguments
        Of the model's own forward, by name.
    paths
        The blocks.

    Raises
    ------
    CaptureError
        When the rest of the step cannot be captured.
    UnfitBlockError
        When a block cannot be captured, is called as no plan inside it can be, or would
        give gradients with other last bits.
    """
    capturing = Capturing(model, paths, spec, target, progress)
    rest, calls = capturing.rest(arguments)
    return _joined(rest, calls, capturing, seed)


def _joined(
    rest: CapturedStep, calls: list[SeenCall], capturing: Capturing, seed: int
) -> CapturedBlocks:
    blocks = tuple(capturing.blocks)
    of = [capturing.used[call.path] for call in calls]
    used = sorted(set(of))  # what was captured before its unused outputs were known is not
    of = [used.index(b) for b in of]
    blocks = tuple(blocks[b] for b in used)
    around = _Rest(rest)
    planned = [_Inside.planned(block.captured) for block in blocks]
    eager = [_Inside.eager(block.captured) for block in blocks]
    holds = capturing.spec.holds
    num_bytes = sum(
        block.captured.step.before_checks.num_bytes for block in (blocks[b] for b in of)
    )
    steps = [
        BlockedStep(
            around.graph(num_bytes if insides is planned else None),
            tuple(inside.block for inside in insides),
            tuple(
                around.call(call, b, insides[b], holds=insides is planned)
                for call, b in zip(calls, of, strict=True)
            ),
        )
        for insides in (planned, eager)
    ]
    if holds.sharded is not None:
        groups = sharded_groups(capturing.model, rest, calls, holds.sharded)
        steps = [
            sharded_step(step, groups, holds.sharded, accumulates=holds.accumulates)
            for step in steps
        ]
    return CapturedBlocks(
        rest=replace(rest, holds=holds),
        blocks=blocks,
        step=steps[0],
        eager=steps[1],
        points=tuple(
            BlockPoints(
                inside.block,
                inputs=frozenset(inside.inputs.values()),
                outputs=frozenset(inside.outputs),
                tangents=frozenset(inside.tangents),
                leaving=steps[0].leaving(b),
                seed=seed,
            )
            for b, inside in enumerate(planned)
        ),
    )


class _Inside:
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
    def planned(cls, captured: CapturedStep) -> _Inside:
        """The step that plans are made of."""
        return cls(captured, captured.graph, captured.carriers)

    @classmethod
    def eager(cls, captured: CapturedStep) -> _Inside:
        """The step as eager PyTorch runs it."""
        assert captured.unplanned is not None
        return cls(captured, captured.unplanned, captured.unplanned_carriers)


class _Rest:
    """The rest of a step, and where in it the blocks' calls are."""

    def __init__(self, captured: CapturedStep) -> None:
        assert captured.unplanned is not None
        self._graph, self._target = captured.unplanned, captured.target
        self._at = storages_by_memory(captured.unplanned_carriers)
        self._nodes = {node.name: node for node in captured.step.graph.nodes}
        self._forward: dict[int, int] = {}
        self._backward: dict[int, int] = {}
        for v, op in enumerate(self._graph.operators):
            if op.target in (FORWARD, BACKWARD):
                places = self._forward if op.target == FORWARD else self._backward
                places[self._nodes[op.name].args[1]] = v
        self._state: dict[str, int] = {}
        for node in captured.step.graph.find_nodes(op="placeholder"):
            if node.meta["role"] in ("parameter", "buffer"):
                k = self._at[storage_id(node.meta["val"])]
                self._state.update((name, k) for name in node.meta["targets"])

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

    def call(self, call: SeenCall, block: int, inside: _Inside, *, holds: bool) -> BlockCall:
        """Say where in the rest a block's call is, and which storages they share.

        Parameters
        ----------
        holds
            Whether the call holds its arguments until its backward, as a planned one does.
        """
        if call.number not in self._forward or call.number not in self._backward:
            raise UnfitBlockError(
                call.path,
                f"the model writes in place to what block {call.path!r} returns, which a plan "
                "inside the block cannot follow: write to a copy, or leave it out of blocks=",
            )
        forward, backward = self._forward[call.number], self._backward[call.number]
        ahead, behind = (self._nodes[self._graph.operators[v].name] for v in (forward, backward))
        given, returned = ahead.args[0], _items(ahead)
        outside: dict[int, int] = {}
        for i, k in inside.inputs.items():
            outside[k] = self._of(given[i])
        made = iter(range(len(call.form.outputs)))
        for i, output in enumerate(call.form.outputs):
            if output.given is None:
                item = returned.get(next(made))
                if item is not None:
                    outside[inside.of_output[i]] = self._of(item)
        tangents = behind.args[0]
        for i, k in enumerate(inside.tangents):
            outside[k] = self._of(tangents[i])
        gradients = _items(behind)
        made = iter(range(len(call.form.gradients)))
        for k, gradient in zip(inside.gradients, call.form.gradients, strict=True):
            if gradient.given is None:
                item = gradients.get(next(made))
                if item is not None:
                    outside[k] = self._of(item)
        for name, k in inside.state.items():
            outside[k] = self._state[f"{call.path}.{name}"]
        return BlockCall(
            path=call.path,
            block=block,
            forward=forward,
            backward=backward,
            outside=outside,
            arguments=tuple(sorted({self._of(node) for node in given})) if holds else (),
            held_bytes=_handed_over_bytes(call.form) if holds else 0,
        )

    def _of(self, node: Node) -> int:
        return self._at[storage_id(node.meta["val"])]


def _handed_over_bytes(form: OpaqueForm) -> int:
    """Bytes of the elements that stand for gradients which a planned call takes over."""
    return sum(form.outputs[i].spec.dtype.itemsize for i in form.differentiated)


def _items(node: Node) -> dict[int, Node]:
    """The tensors of a call that returns several."""
    return {
        user.args[1]: user  # type: ignore[misc]
        for user in node.users
        if user.target is operator.getitem
    }
