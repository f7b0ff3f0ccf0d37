"""From a model and a sample to a cost graph: the entry point of this package."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .assembly import Assembly
from .calls.argument_memory import argument_bytes
from .calls.call_spec import bind_call, split_sample, tensors_of
from .calls.storage_id import storage_id
from .capture_lock import holds_capture_lock
from .captured_step import CapturedStep
from .cost_graph import CostGraph
from .costs.call_collector import CallCollector
from .costs.cost_model import PreparedCostModel, TimingProgress
from .costs.devices import Device
from .costs.profile import ProfiledCosts
from .costs.resolve import (
    CostModelChoice,
    resolve_cost_model,
)
from .costs.roofline import LONGEST_TRIAL_NS, Roofline
from .costs.target import Target, target_of
from .costs.workspace import WorkspaceProbe
from .folding.dropout import split_dropout
from .folding.last_readings import LastReadings
from .folding.leaving import CopiedOutput, Leaving
from .folding.operators import Folder, drop_unused, pin_readers_of_written
from .folding.pricing import Pricing
from .folding.reuse import ReuseFinder
from .loop.data_parallel import bucket_bytes
from .loop.loop_holds import NOTHING_ELSE, LoopHolds
from .loop.loss import LossFn, LossSpec
from .loop.optimizer_step import OptimizerStep
from .tracing.trace import trace_step
from .tracing.traced_step import TakenPath, TracedStep


def capture(
    model: nn.Module,
    sample_input: Any,
    *,
    loss_fn: LossFn | None = None,
    optimizer: OptimizerStep | None = None,
    device: str | Device | None = None,
    cost_model: CostModelChoice = "roofline",
    holds: LoopHolds = NOTHING_ELSE,
) -> CostGraph:
    """Return the cost graph of a training step of ``model`` on inputs like ``sample_input``.

    Parameters
    ----------
    device
        Where the step will run, see :func:`~graph_capture.costs.target.target_of`.
    cost_model
        See :func:`~graph_capture.costs.resolve.resolve_cost_model`.
    holds
        What the loop around the step holds.

    Raises
    ------
    CaptureError
        When the step cannot be written down as one graph.
    """
    args, kwargs = split_sample(sample_input)
    arguments = bind_call(model.forward, args, kwargs)
    target = target_of(model, tensors_of(arguments), device)
    return capture_step(
        model,
        arguments,
        loss=loss_fn,
        optimizer=optimizer,
        forward=model.forward,
        target=target,
        cost_model=cost_model,
        holds=holds,
        argument_bytes=argument_bytes(model, arguments),
    ).graph


@holds_capture_lock
def capture_step(
    model: nn.Module,
    arguments: Mapping[str, Any],
    *,
    loss: LossFn | LossSpec | None = None,
    optimizer: OptimizerStep | None = None,
    forward: Callable[..., Any],
    target: Target,
    measure_scratch: bool = True,
    cost_model: CostModelChoice = "roofline",
    progress: TimingProgress | None = None,
    taken: TakenPath | None = None,
    check: Callable[[CostGraph], None] | None = None,
    holds: LoopHolds = NOTHING_ELSE,
    argument_bytes: tuple[int, ...] | None = None,
    computed: frozenset[int] = frozenset(),
) -> CapturedStep:
    """Trace a step and fold it into a cost graph.

    Parameters
    ----------
    arguments
        As from ``call_spec.bind_call``.
    loss
        The code of the loss, or what an earlier capture saw of it.
    forward
        The function to call: the model's own forward, without a plan.
    measure_scratch
        Whether to measure how much scratch memory each call takes; not needed if the
        graph is only compared with another.
    target
        Where the step will run.
    cost_model
        See :func:`~graph_capture.costs.resolve.resolve_cost_model`.
    progress
        Is told the progress of a cost model that times calls.
    taken
        The path of an earlier capture through the model, to be taken again.
    check
        Called with the graph, without scratch, before any call is run to measure its
        scratch; raises to prevent that.
    holds
        What the loop around the step holds.
    argument_bytes
        What the call's tensors keep alive, see
        :func:`~graph_capture.calls.argument_memory.argument_bytes`; ``None`` for what they span.
    computed
        Tensors of the call, by index, that other modules of a larger step have computed.
    """
    if holds.sharded is not None:
        raise ValueError(
            f"distributed={str(holds.sharded)!r} is counted in plans in blocks only: plan with "
            "optimize(…, granularity='blocks')"
        )
    costs, roofline = resolve_cost_model(cost_model, target), Roofline(target.device)
    step = trace_step(
        model,
        arguments,
        loss,
        forward=forward,
        target=target,
        taken=taken,
        releases_outputs=holds.releases,
        computed=computed,
    )
    split_dropout(step.graph)

    probe = WorkspaceProbe(
        target.torch_device,
        at_hand=target.at_hand,
        scratch=measure_scratch,
        cache=costs.cache if isinstance(costs, ProfiledCosts) else None,
        too_long=lambda call: roofline.time_ns(call) > LONGEST_TRIAL_NS,
    )
    region = step.loss.without(step.gone_bytes()) if holds.releases else step.loss
    step = replace(step, loss=region.with_scratch(probe.bytes_of))
    if optimizer is not None:
        optimizer = optimizer.with_scratch(probe.bytes_of)
    pricing = Pricing(
        target=target,
        costs=costs,
        probe=probe,
        held_bytes=_held(model, step, target),
        bucket_bytes=0
        if holds.distributed is None
        else bucket_bytes(holds.distributed, model.parameters(), target.torch_type),
        holds=holds,
        argument_bytes=argument_bytes,
    )
    first = pricing if check is None else _unmeasured(pricing)
    try:
        eager = _fold(step, first, optimizer, model, progress, reuse=False)
        folded = _fold(step, pricing, optimizer, model, progress, reuse=True, check=check)
    finally:
        if isinstance(costs, PreparedCostModel):
            costs.save()
    record = costs.record()
    record = replace(record, notes=(*record.notes, *probe.notes))
    return replace(
        folded,
        unplanned=eager.graph,
        unplanned_carriers=eager.carriers,
        costs=record,
        holds=holds,
    )


def _fold(
    step: TracedStep,
    pricing: Pricing,
    optimizer: OptimizerStep | None,
    model: nn.Module,
    progress: TimingProgress | None,
    *,
    reuse: bool,
    check: Callable[[CostGraph], None] | None = None,
) -> CapturedStep:
    """Operators and storages of a traced step, with or without writing over dead arguments."""
    nodes = list(step.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder" and n.meta["role"] != "tangent"]
    kept = [*step.outputs, *(n for _, n in step.gradients)]
    finder = ReuseFinder(nodes, {storage_id(n.meta["val"]) for n in kept}) if reuse else None
    folder = Folder(inputs, LastReadings(nodes, kept), finder)
    folder.fold(n for n in nodes if n.meta.get("phase") == "forward")
    turn = folder.produce_outside(step.tangents)
    released = [step.outputs[i] for i in step.releasable] if pricing.holds.releases else []
    read_by_loop = [*(step.outputs[i] for i in step.differentiated), *released]
    turn.reads = {n: folder.block_of(n) for n in read_by_loop}
    folder.fold(n for n in nodes if n.meta.get("phase") == "backward")
    pin_readers_of_written(folder)

    output_blocks = {folder.block_of(n) for n in step.outputs}
    gradient_blocks = {folder.block_of(n) for _, n in step.gradients}
    operators = drop_unused(folder.operators, output_blocks | gradient_blocks)

    copied = _copied(step, folder) if pricing.holds.copies_outputs else ()
    handed_on = _handed_on(step, folder) if pricing.holds.hands_on else {}
    leaving = Leaving(
        outputs={folder.block_of(n) for n in released},
        copied=copied,
        replaced=_replaced(copied, step, folder) - gradient_blocks,
        gradients=handed_on,
        names={folder.block_of(gradient): leaf.meta["target"] for leaf, gradient in step.gradients},
        arrivals=_arrivals(step, folder, handed_on),
        at_once=not reuse,
    )

    def assembled(pricing: Pricing) -> CapturedStep:
        return Assembly(
            step, folder.blocks, output_blocks, gradient_blocks, optimizer, pricing, leaving
        ).finish(operators, turn, weakref.ref(model))

    if check is not None:
        check(assembled(_unmeasured(pricing)).graph)
    if isinstance(pricing.costs, PreparedCostModel):
        collector = CallCollector()
        assembled(replace(pricing, costs=collector, known={}))
        pricing.costs.prepare(collector.calls, progress)
    return assembled(pricing)


def _handed_on(step: TracedStep, folder: Folder) -> dict[int, int]:
    """Blocks of gradients that do not stay in the step, and of what each is for."""
    others = [n for leaf, n in step.gradients if leaf.meta["role"] != "parameter"]
    staying = {folder.block_of(n) for n in (*others, *step.outputs)}
    return {
        folder.block_of(gradient): folder.block_of(leaf)
        for leaf, gradient in step.gradients
        if leaf.meta["role"] == "parameter" and folder.block_of(gradient) not in staying
    }


def _copied(step: TracedStep, folder: Folder) -> tuple[CopiedOutput, ...]:
    """The outputs, each of which is copied on its way to the loop."""
    requiring = {*step.differentiated, *step.detached}
    return tuple(
        CopiedOutput(node=node, block=folder.block_of(node), replaced=i in requiring)
        for i, node in enumerate(step.outputs[: len(step.template.names)])
    )


def _replaced(copied: Sequence[CopiedOutput], step: TracedStep, folder: Folder) -> set[int]:
    """Blocks of outputs of which the loop and the model have nothing once they are copied."""
    stay = {folder.block_of(node) for node in step.outputs[len(copied) :]}
    stay |= {copy.block for copy in copied if not copy.replaced}
    return {copy.block for copy in copied} - stay


def _arrivals(
    step: TracedStep, folder: Folder, handed_on: Mapping[int, int]
) -> dict[int, tuple[int, int]]:
    """When gradients arrive in eager's backward pass, by their blocks."""
    position = {node: i for i, node in enumerate(step.graph.nodes)}
    return {
        folder.block_of(gradient): (turn, max(position[gradient], position.get(last, -1)))
        for (_, gradient), (turn, last) in zip(step.gradients, step.arrivals, strict=True)
        if folder.block_of(gradient) in handed_on
    }


def _unmeasured(pricing: Pricing) -> Pricing:
    """The same pricing, but no call is run for its scratch."""
    target = pricing.target
    probe = WorkspaceProbe(target.torch_device, at_hand=target.at_hand, scratch=False)
    return replace(pricing, probe=probe, known={})


def _held(model: nn.Module, step: TracedStep, target: Target) -> int:
    """Bytes of tensors that lie in modules as plain attributes and take no part in the step."""
    counted = {storage_id(t) for t in (*model.parameters(), *model.buffers())}
    counted |= {storage_id(t) for t in step.constants.values()}
    counted |= {storage_id(t) for t in _attributes(model, step)}
    held = {
        storage_id(value): value.untyped_storage().nbytes()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and target.place(value.device).type == target.torch_type
    }
    first = (
        step.outputs[entry.output].meta["val"].untyped_storage().nbytes()
        for entry in step.reassigned
        if entry.role == "attribute" and not isinstance(_attribute(model, entry.target), Tensor)
    )  # from the second step on, those of the previous step lie there
    return sum(first) + sum(num_bytes for sid, num_bytes in held.items() if sid not in counted)


def _attributes(model: nn.Module, step: TracedStep) -> Iterator[torch.Tensor]:
    """Tensors in plain attributes that the step takes as inputs."""
    for node in step.graph.find_nodes(op="placeholder"):
        if node.meta["role"] == "attribute":
            yield _attribute(model, node.meta["target"])


def _attribute(model: nn.Module, target: str) -> Any:
    path, _, name = target.rpartition(".")
    return vars(model.get_submodule(path)).get(name)


__all__ = ["capture", "capture_step"]
