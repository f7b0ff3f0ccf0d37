"""The rest of a step that was run for real, because it cannot be captured.

One training step runs, forward, loss and backward, as eager runs it, with the blocks
computing their values apart (``graph_capture/computed_calls.py``). It begins with no
gradients, or with those that the loop is said to accumulate. The model is left as it was:
parameters are exchanged for stand-ins in the same memory, which no hook listens to, and
what is written to is put back.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import Graph

from graph_capture.call_spec import TensorSpec, call_forward, objects_of, specs_of, tensors_of
from graph_capture.capture_lock import holds_capture_lock
from graph_capture.captured_step import CapturedStep
from graph_capture.checkpointing import checkpoints_noticed
from graph_capture.computed_calls import Computing
from graph_capture.cost_graph import CostGraph, Storage
from graph_capture.costs.cost_model import TimingProgress
from graph_capture.errors import CaptureError
from graph_capture.foreign_generators import ForeignGenerators
from graph_capture.isolation import swap_tensors, undisturbed
from graph_capture.loss import LossRegion, LossSource, LossSpec
from graph_capture.opaque_calls import (
    BACKWARD,
    FORWARD,
    CheckpointedCallError,
    OpaqueCalls,
    SeenCall,
    UnknownFormError,
)
from graph_capture.optimizer_step import OptimizerStep
from graph_capture.outputs import take_apart, tensors_within
from graph_capture.private_torch.modules import buffers_of
from graph_capture.real_calls import RealCalls
from graph_capture.real_step import Ending, RealStep, real_step
from graph_capture.spread_out import refuse_spread_out
from graph_capture.target import Target
from graph_capture.traced_step import AS_EAGER, TracedStep

from ..base.preserve_state import preserve_state
from ..base.step_spec import StepSpec
from ..base.training_step import Differentiated, differentiate, outside_autocast
from .rest import CallPlace


class MeasuredRest:
    """See :class:`.rest.Rest`."""

    measured = True

    def __init__(
        self, step: RealStep, captured: CapturedStep, loss: LossSpec, state: Mapping[str, int]
    ) -> None:
        self.captured = captured
        self.loss = loss
        self.state = state
        self._step = step
        self._standing = step.standing

    def graph(self, copied_bytes: int | None) -> CostGraph:
        """See :class:`.rest.Rest`."""
        graph = self._step.graph
        if not copied_bytes:
            return graph
        beside = Storage(
            name="copies in blocks, in case a check fails",
            size_bytes=copied_bytes,
            producer=None,
            category="buffer",
        )
        return CostGraph(graph.operators, (*graph.storages, beside))

    def place_of(self, call: SeenCall) -> CallPlace | None:
        """See :class:`.rest.Rest`."""
        i, j = (self._standing[call.number, target] for target in (FORWARD, BACKWARD))
        ahead, behind = self._step.calls[i], self._step.calls[j]
        if not self._step.unwritten.issuperset(ahead.made):
            return None
        return CallPlace(
            forward=self._step.operators[i],
            backward=self._step.operators[j],
            given=ahead.given,
            tangents=behind.given[: len(call.form.differentiated)],
            made=dict(enumerate(ahead.made)),
            gradients=dict(enumerate(behind.made)),
            copied_bytes=sum(
                extent
                for k, i in zip(behind.given, call.form.differentiated, strict=False)
                if (extent := call.form.outputs[i].spec.extent_bytes)
                > self._step.graph.storages[k].size_bytes
            ),
        )


@holds_capture_lock
def measured_rest(
    model: nn.Module,
    arguments: Mapping[str, Any],
    forward: Callable[..., Any],
    calls: OpaqueCalls,
    *,
    spec: StepSpec,
    target: Target,
    optimizer: OptimizerStep | None,
    progress: TimingProgress | None = None,
) -> MeasuredRest:
    """Run a step for real, with blocks standing for themselves, and write down the rest of it.

    Parameters
    ----------
    arguments
        Of the model's own forward, by name; real tensors.
    forward
        The model's own.
    calls
        The blocks.

    Raises
    ------
    CaptureError
        When the step cannot be run here, or fails.
    UnknownFormError, CheckpointedCallError
        As from a capture.
    """
    refuse_spread_out(model)
    _refuse_unreal(model, arguments, target)
    with _own_generators_put_back(model):  # calls that draw run once more for their scratch
        return _measured(
            model,
            arguments,
            forward,
            calls,
            spec=spec,
            target=target,
            optimizer=optimizer,
            progress=progress,
        )


def _measured(
    model: nn.Module,
    arguments: Mapping[str, Any],
    forward: Callable[..., Any],
    calls: OpaqueCalls,
    *,
    spec: StepSpec,
    target: Target,
    optimizer: OptimizerStep | None,
    progress: TimingProgress | None,
) -> MeasuredRest:
    recorded = RealCalls(target.torch_type)
    calls.making = computing = Computing(recorded, model, target.torch_type)
    running = _Running(model, arguments, spec, recorded)
    try:
        ending, loss = running.run(calls.around(forward))
    except (UnknownFormError, CheckpointedCallError, KeyboardInterrupt, MemoryError, CaptureError):
        raise
    except Exception as error:  # the user's code may raise anything
        raise CaptureError(
            "a real step on the sample, in which each block holds its arguments until its "
            f"backward, fails: {type(error).__name__}: {error}"
        ) from error
    finally:
        computing.forget()
    step = real_step(
        recorded,
        ending,
        target=target,
        cost_model=spec.cost_model,
        optimizer=optimizer,
        holds=spec.holds,
        progress=progress,
    )
    captured = _captured(step, loss.region, model, spec, target, optimizer)
    return MeasuredRest(step, captured, loss, running.state)


class _Running:
    """Runs the step; knows which memory is what."""

    def __init__(
        self, model: nn.Module, arguments: Mapping[str, Any], spec: StepSpec, recorded: RealCalls
    ) -> None:
        self._model, self._arguments, self._spec = model, arguments, spec
        self._recorded = recorded
        self.state: dict[str, int] = {}

    def run(self, forward: Callable[..., Any]) -> tuple[Ending, LossSpec]:
        """Run the step and leave the model as it was."""
        model, recorded, spec = self._model, self._recorded, self._spec
        gc.collect()
        with (
            preserve_state(model, dict(self._arguments), spec.loss_fn, None),
            undisturbed(model, objects_of(self._arguments)),
            recorded.undoing(),
            checkpoints_noticed(),
            _without_collector(),
            torch.enable_grad(),
            torch.autograd.set_multithreading_enabled(False),
        ):
            leaves = self._stand_ins()
            self._declare(leaves)
            with recorded, recorded.inside_modules(model):
                held, loss = self._step(forward)
            recorded.end()
            outputs = frozenset(map(recorded.memory_of, tensors_within(held)))
            inputs = [t for t in tensors_of(self._arguments) if t.is_leaf]
            grads = [t.grad for t in (*leaves.values(), *inputs) if t.grad is not None]
            gradients = frozenset(map(recorded.memory_of, grads))
            del held, grads
            others = spec.loss_fn.parameters() if isinstance(spec.loss_fn, nn.Module) else ()
            for leaf in (*leaves.values(), *inputs, *others):
                leaf.grad = None
            gc.collect()
            left = recorded.alive() - gradients
        return Ending(gradients=gradients, outputs=outputs - gradients, left=left), loss

    def _step(self, forward: Callable[..., Any]) -> tuple[Any, LossSpec]:
        """As ``planner/base/training_step.py`` says it; returns what the loop holds."""
        spec = self._spec
        output = call_forward(forward, self._arguments)
        roots = differentiate(output, spec.loss_fn)
        loss = _loss(roots, output, spec)
        if spec.holds.releases and roots.loss is not None:
            output = None
        self._recorded.turn(str(loss.region.source), roots.tensors)
        with outside_autocast():
            torch.autograd.backward(roots.tensors, [torch.ones_like(t) for t in roots.tensors])
        return (output, roots.tensors), loss

    def _stand_ins(self) -> dict[int, nn.Parameter]:
        """Put parameters without hooks into the places of the model's, in the same memory."""
        made: dict[int, nn.Parameter] = {}

        def stand_in(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter):
                return tensor
            if id(tensor) not in made:
                twin = nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
                vars(twin).update(vars(tensor))
                made[id(tensor)] = twin
            return made[id(tensor)]

        swap_tensors(self._model, stand_in)
        return made

    def _declare(self, leaves: Mapping[int, nn.Parameter]) -> None:
        """Declare what is there before the step."""
        recorded, model = self._recorded, self._model
        for role, named in (
            ("parameter", model.named_parameters(remove_duplicate=False)),
            ("buffer", model.named_buffers(remove_duplicate=False)),
        ):
            for name, tensor in named:
                self.state[name] = recorded.there(tensor, f"{role} {name}", role)
        for path, module in model.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, torch.Tensor) and value.layout == torch.strided:
                    recorded.there(value, f"attribute {path}.{name}", "constant")
            for name, buffer in buffers_of(module).items():
                if buffer is not None:
                    recorded.there(buffer, f"buffer {path}.{name}", "buffer")
        for i, tensor in enumerate(tensors_of(self._arguments)):
            recorded.there(tensor, f"input {i}", "input")
        if self._spec.holds.accumulates:
            for leaf in leaves.values():
                if leaf.requires_grad:
                    leaf.grad = torch.zeros_like(leaf)
                    recorded.there(leaf.grad, f"earlier gradient {id(leaf)}", "gradient")


def _loss(roots: Differentiated, output: Any, spec: StepSpec) -> LossSpec:
    """Where backward begins; the loss itself is a part of the rest."""
    if roots.loss is None:
        source = LossSource.OUTPUTS
    elif spec.loss_fn is not None:
        source = LossSource.LOSS_FN
    else:
        source = LossSource.OUTPUT if roots.loss is output else LossSource.OUTPUT_LOSS
    return LossSpec(
        region=LossRegion(source=source),
        differentiated=tuple(range(len(roots.tensors))),
        tangents=tuple(TensorSpec.of(root.detach()) for root in roots.tensors),
    )


def _captured(
    step: RealStep,
    region: LossRegion,
    model: nn.Module,
    spec: StepSpec,
    target: Target,
    optimizer: OptimizerStep | None,
) -> CapturedStep:
    """What a plan's record says of the step; nothing of it is in a torch.fx graph."""
    template, _ = take_apart(())
    nothing = TracedStep(
        graph=Graph(),
        outputs=(),
        template=template,
        differentiated=(),
        tangents=(),
        gradients=(),
        constants={},
        loss=region,
        detached=(),
        how=AS_EAGER,
    )
    return CapturedStep(
        step=nothing,
        graph=step.graph,
        code=(),
        carriers=(),
        state_of={},
        state_node=Graph().placeholder("generator_state"),
        loss=next(v for v, op in enumerate(step.graph.operators) if op.phase == "loss"),
        target=target,
        optimizer=optimizer,
        model=weakref.ref(model),
        unplanned=step.graph,
        costs=step.costs,
        holds=spec.holds,
    )


def _refuse_unreal(model: nn.Module, arguments: Mapping[str, Any], target: Target) -> None:
    """Refuse a step that cannot be run here."""
    tensors = tensors_of(arguments)
    why = None
    if target.elsewhere or not target.at_hand:
        why = f"the step is planned for {target.device.name}, which is not where the model lies"
    elif any(t.device.type == "meta" for t in (*model.parameters(), *model.buffers())):
        why = "the model lies on meta"
    elif len(tensors) < len(list(specs_of(arguments))) or any(
        t.device.type == "meta" for t in tensors
    ):
        why = "the sample holds no real tensors"
    if why is not None:
        raise CaptureError(
            f"what lies between the blocks cannot be captured, so one step would have to be run "
            f"for real, and {why}: pass a real model and a real sample on the device"
        )


@contextmanager
def _own_generators_put_back(model: nn.Module) -> Iterator[None]:
    """Restore generators, arrays and iterators that modules hold; global ones are put back, too."""
    foreign = ForeignGenerators()
    states = []
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            foreign.meet(value, f"{path}.{name}")
            if isinstance(value, torch.Generator):
                states.append((value, value.get_state()))
    try:
        yield
    finally:
        foreign.put_back()
        for generator, state in states:
            generator.set_state(state)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Collect no cycles meanwhile, so that the figures are the same each time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
