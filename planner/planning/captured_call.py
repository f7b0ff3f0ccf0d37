"""Capture a user's model and sample as a step: where all planning begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from graph_capture.calls.argument_memory import enlarged_bytes
from graph_capture.calls.autocast import autocast_as
from graph_capture.calls.call_spec import bind_call, split_sample, tensors_of
from graph_capture.captured_step import CapturedStep
from graph_capture.costs.target import target_of
from graph_capture.errors import CaptureError
from graph_capture.loop.optimizer_step import measure_optimizer
from graph_capture.recording.module_state import refuse_lazy
from graph_capture.step_capture import capture_step
from solvers.replay import replay
from solvers.schedule import Schedule

from ..base.call_guard import lazy_input
from ..base.forward_slot import original_forward, refuse_plans_inside
from ..base.progress import (
    ShowProgress,
    showing_timing,
)
from ..base.shape_range import ShapeRange
from ..base.step_spec import StepSpec
from .concurrent import with_unplanned_calls


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedCall:
    """A captured step, and the call that it came from.

    Parameters
    ----------
    model
        The model of the step.
    arguments
        Arguments of the model's own forward, by name.
    captured
        The step.
    shapes
        Other shapes of this call that its plan is for.
    argument_bytes
        What the call's tensors keep alive, see
        :func:`graph_capture.calls.argument_memory.argument_bytes`.
    """

    model: nn.Module
    arguments: Mapping[str, Any]
    captured: CapturedStep
    argument_bytes: tuple[int, ...] | None = None
    shapes: ShapeRange = field(default_factory=ShapeRange)

    @property
    def unplanned_peak_bytes(self) -> int:
        """Predicted peak of the step without a plan."""
        assert self.captured.unplanned is not None
        unplanned = self.captured.unplanned
        return replay(unplanned, Schedule.keep_all(unplanned)).peak_bytes


@contextmanager
def captured_call(spec: StepSpec, progress: ShowProgress = None) -> Iterator[CapturedCall]:
    """Capture the step; the requested autocast stays on until the context ends.

    An applied plan is ignored.

    Raises
    ------
    CaptureError
        When the step cannot be captured.
    TypeError
        When the sample does not fit the model's signature.
    ValueError
        When the sample cannot be read, or the optimizer's name is unknown.
    """
    model = spec.model
    refuse_lazy(model)
    forward = original_forward(model)
    sample = bind_call(forward, *split_sample(spec.sample_input))
    shapes = ShapeRange.of(spec.shapes, sample)
    arguments = shapes.enlarged(sample)
    lazy = lazy_input(arguments)
    if lazy is not None:
        raise ValueError(lazy)
    target = target_of(model, tensors_of(arguments), spec.device)
    held = enlarged_bytes(model, sample, arguments)
    under = autocast_as(target.torch_type, spec.autocast) if spec.autocast else nullcontext()
    with under:
        with showing_timing(progress) as timing:
            captured = _captured(
                model,
                arguments,
                loss=spec.loss_fn,
                optimizer=measure_optimizer(
                    spec.optimizer, model, target, in_hooks=spec.holds.consumes
                ),
                forward=forward,
                target=target,
                cost_model=spec.cost_model,
                progress=timing,
                holds=spec.holds,
                argument_bytes=held,
            )
        captured = with_unplanned_calls(captured)
        yield CapturedCall(
            model=model,
            arguments=arguments,
            captured=captured,
            shapes=shapes,
            argument_bytes=held,
        )


def _captured(model: nn.Module, arguments: Mapping[str, Any], **options: Any) -> CapturedStep:
    """Capture the step; name plans inside the model where they are in the way."""
    try:
        return capture_step(model, arguments, **options)
    except CaptureError as error:
        refuse_plans_inside(model, error)
        raise
