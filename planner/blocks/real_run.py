"""Run a model on the sample for real, and leave it as it was.

Parameters are exchanged for stand-ins in the same memory, which no hook listens to, and what
is written to is put back.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from graph_capture.apart.opaque_calls import CheckpointedCallError, UnknownFormError
from graph_capture.apart.real_calls import RealCalls
from graph_capture.apart.real_step import Ending
from graph_capture.calls.call_spec import TensorSpec, call_forward, objects_of, specs_of, tensors_of
from graph_capture.calls.spread_out import is_spread
from graph_capture.costs.target import Target
from graph_capture.errors import CaptureError
from graph_capture.loop.loss import LossRegion, LossSource, LossSpec
from graph_capture.private_torch.modules import buffers_of
from graph_capture.reads.foreign_generators import ForeignGenerators
from graph_capture.reads.isolation import swap_tensors, undisturbed
from graph_capture.recording.outputs import tensors_within
from graph_capture.tracing.checkpointing import checkpoints_noticed
from graph_capture.without_collector import without_collector

from ..base.preserve_state import preserve_state
from ..base.step_spec import StepSpec
from ..base.training_step import Differentiated, differentiate, outside_autocast


class RealRun:
    """Runs the step; knows which memory is what."""

    def __init__(
        self, model: nn.Module, arguments: Mapping[str, Any], spec: StepSpec, recorded: RealCalls
    ) -> None:
        self._model, self._arguments, self._spec = model, arguments, spec
        self._recorded = recorded
        self.state: dict[str, int] = {}

    def step(self, forward: Callable[..., Any]) -> tuple[Ending, LossSpec]:
        """Run the step and leave the model as it was."""
        recorded = self._recorded
        with self._undone() as leaves:
            with recorded, recorded.inside_modules(self._model):
                held, loss = self._step(forward)
            recorded.end()
            outputs = frozenset(map(recorded.memory_of, tensors_within(held)))
            inputs = [t for t in tensors_of(self._arguments) if t.is_leaf]
            grads = [t.grad for t in (*leaves, *inputs) if t.grad is not None]
            gradients = frozenset(map(recorded.memory_of, grads))
            del held, grads
            loss_fn = self._spec.loss_fn
            others = loss_fn.parameters() if isinstance(loss_fn, nn.Module) else ()
            for leaf in (*leaves, *inputs, *others):
                leaf.grad = None
            gc.collect()
            left = recorded.alive() - gradients
        return Ending(gradients=gradients, outputs=outputs - gradients, left=left), loss

    def forward(self, forward: Callable[..., Any]) -> None:
        """Run the model's forward alone and leave the model as it was."""
        recorded = self._recorded
        with self._undone(), recorded, recorded.inside_modules(self._model):
            call_forward(forward, self._arguments)

    @contextmanager
    def _undone(self) -> Iterator[list[nn.Parameter]]:
        """Stand-ins for the model's parameters; what is done meanwhile is undone."""
        model = self._model
        gc.collect()
        with (
            preserve_state(model, dict(self._arguments), self._spec.loss_fn, None),
            undisturbed(model, objects_of(self._arguments)),
            self._recorded.undoing(),
            checkpoints_noticed(),
            without_collector(),
            torch.enable_grad(),
            torch.autograd.set_multithreading_enabled(False),
        ):
            leaves = self._stand_ins()
            self._declare(leaves)
            yield list(leaves.values())

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


@contextmanager
def failures_told(what: str) -> Iterator[None]:
    """Say of an error of the user's code that it is one of the real run, named ``what``."""
    try:
        yield
    except (UnknownFormError, CheckpointedCallError, KeyboardInterrupt, MemoryError, CaptureError):
        raise
    except Exception as error:  # the user's code may raise anything
        raise CaptureError(f"{what} fails: {type(error).__name__}: {error}") from error


def refuse_unreal(
    model: nn.Module, arguments: Mapping[str, Any], target: Target, reason: str
) -> None:
    """Refuse what cannot be run here, and for which ``reason`` it would have to be run."""
    if any(map(is_spread, model.parameters())):
        raise CaptureError(
            f"{reason} would have to be run for real, and the model's parameters are DTensors, "
            "whose collectives would wait for other ranks: plan blocks that can be captured, or "
            "use torch.utils.checkpoint inside the model, which communicates again"
        )
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
            f"{reason} would have to be run for real, and {why}: pass a real model and a real "
            "sample on the device"
        )


@contextmanager
def own_generators_put_back(model: nn.Module) -> Iterator[None]:
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
