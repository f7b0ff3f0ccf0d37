"""From a model and a sample to a cost graph: the one door of this package."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from .assembly import Assembly, CapturedStep, device_type_of
from .call_spec import bind_call, split_sample
from .cost_graph import CostGraph
from .costs.workspace import WorkspaceProbe
from .dropout import split_dropout
from .loss import LossFn, LossSpec
from .operators import (
    Folder,
    drop_unused,
    pin_readers_of_written,
)
from .optimizer_step import OptimizerStep
from .recorder import storage_id
from .reuse import ReuseFinder
from .trace import TracedStep, trace_step


def capture(
    model: nn.Module,
    sample_input: Any,
    *,
    loss_fn: LossFn | None = None,
    optimizer: OptimizerStep | None = None,
) -> CostGraph:
    """The cost graph of one training step of ``model`` on inputs like ``sample_input``.

    Raises
    ------
    CaptureError
        When the step cannot be written down as one graph.
    """
    args, kwargs = split_sample(sample_input)
    arguments = bind_call(model.forward, args, kwargs)
    return capture_step(model, arguments, loss=loss_fn, optimizer=optimizer).graph


def capture_step(
    model: nn.Module,
    arguments: Mapping[str, Any],
    *,
    loss: LossFn | LossSpec | None = None,
    optimizer: OptimizerStep | None = None,
    forward: Callable[..., Any] | None = None,
    measure_scratch: bool = True,
) -> CapturedStep:
    """Trace a step and fold it into a cost graph.

    Parameters
    ----------
    arguments
        As from ``call_spec.bind_call``.
    loss
        The code of the loss, or what an earlier capture saw of it.
    forward
        Called instead of ``model.forward``.
    measure_scratch
        Whether to find out how much scratch memory each call takes; not needed
        when the graph is only compared with another.
    """
    step = trace_step(model, arguments, loss, forward=forward)
    split_dropout(step.graph)

    probe = WorkspaceProbe(
        device_type_of(step),
        at_hand=not any(_is_stand_in(t) for t in model.parameters()),
        scratch=measure_scratch,
    )
    held = _held_by_modules(model, step)
    unplanned = _fold(step, probe, held, optimizer, weakref.ref(model), reuse=False).graph
    folded = _fold(step, probe, held, optimizer, weakref.ref(model), reuse=True)
    return replace(folded, unplanned=unplanned)


def _fold(
    step: TracedStep,
    probe: WorkspaceProbe,
    held: int,
    optimizer: OptimizerStep | None,
    model: weakref.ref[nn.Module],
    *,
    reuse: bool,
) -> CapturedStep:
    """Operators and storages of a traced step, with or without writing over dead arguments."""
    nodes = list(step.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder" and n.meta["role"] != "tangent"]
    kept = [*step.outputs, *(n for _, n in step.gradients)]
    finder = ReuseFinder(nodes, {storage_id(n.meta["val"]) for n in kept}) if reuse else None
    folder = Folder(inputs, finder)
    folder.fold(n for n in nodes if n.meta.get("phase") == "forward")
    turn = folder.produce_outside(step.tangents)
    turn.reads = {n: folder.block_of(n) for i in step.differentiated for n in [step.outputs[i]]}
    folder.fold(n for n in nodes if n.meta.get("phase") == "backward")
    pin_readers_of_written(folder)

    output_blocks = {folder.block_of(n) for n in step.outputs}
    gradient_blocks = {folder.block_of(n) for _, n in step.gradients}
    operators = drop_unused(folder.operators, output_blocks | gradient_blocks)
    assembly = Assembly(step, folder.blocks, output_blocks, gradient_blocks, optimizer, probe, held)
    return assembly.finish(operators, turn, model)


def _held_by_modules(model: nn.Module, step: TracedStep) -> int:
    """Bytes of tensors that lie in modules as plain attributes and take no part in the step."""
    counted = {storage_id(t) for t in (*model.parameters(), *model.buffers())}
    counted |= {storage_id(t) for t in step.constants.values()}
    held = {
        storage_id(value): value.untyped_storage().nbytes()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == device_type_of(step)
    }
    return sum(num_bytes for sid, num_bytes in held.items() if sid not in counted)


def _is_stand_in(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


__all__ = ["CapturedStep", "capture", "capture_step"]
