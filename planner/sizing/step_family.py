"""One training step at many shapes: captured again for each batch size and sequence length.

The values of a resized call are not known. If forward asks for values (whether a mask is
all true) and the sample's answers are all yes or no, these answers also hold for the
other shapes, so that the path is the one that ``optimize`` takes on such calls. Counts
and sizes that depend on values do not carry over. The path is then the one that
libraries have for compilers, if there is one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from graph_capture.calls.autocast import autocast_as
from graph_capture.calls.call_spec import TensorSpec, bind_call, describe, split_sample, tensors_of
from graph_capture.capture_lock import holds_capture_lock
from graph_capture.captured_step import CapturedStep
from graph_capture.costs.resolve import CostModelChoice
from graph_capture.costs.target import Target, target_of
from graph_capture.errors import CaptureError
from graph_capture.loop.loop_holds import NOTHING_ELSE, LoopHolds
from graph_capture.loop.loss import LossFn
from graph_capture.loop.optimizer_step import OptimizerStep, measure_optimizer
from graph_capture.step_capture import capture_step
from graph_capture.tracing.trace import trace_step
from graph_capture.tracing.traced_step import TakenPath
from solvers.replay import replay
from solvers.schedule import Schedule

from ..base.forward_slot import original_forward
from ..base.step_spec import StepSpec
from .position_tables import refuse_short_tables
from .resized_loss import resized_loss
from .samples import MakeSample, ResizableSample

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFamily:
    """A step whose shapes are open; everything else is settled.

    Parameters
    ----------
    model
        In training mode.
    forward
        The model's function that is captured.
    sample
        The given call.
    given
        Its arguments with their values.
    make_sample
        Makes the sample of another shape, instead of resizing.
    target
        Where the step will run.
    loss_fn, optimizer, autocast, cost_model
        As for :func:`planner.optimize`.
    measure_scratch
        Whether calls may run, if the device is at hand, to measure their scratch
        memory.
    holds
        What the loop around the step holds.
    """

    model: nn.Module
    forward: Callable[..., Any]
    sample: ResizableSample
    given: Mapping[str, Any] = field(repr=False)
    make_sample: MakeSample | None
    target: Target
    loss_fn: LossFn | None
    optimizer: OptimizerStep | None
    autocast: torch.dtype | None
    cost_model: CostModelChoice
    measure_scratch: bool = True
    holds: LoopHolds = NOTHING_ELSE
    # The sample's path, found on first use: most models ask for no values and do not need it.
    _path: list[TakenPath | None] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        spec: StepSpec,
        *,
        batch_dim: int,
        sequence_dim: int,
        make_sample: MakeSample | None,
        measure_scratch: bool = True,
    ) -> StepFamily:
        """The family of a step."""
        if make_sample is not None and not callable(make_sample):
            raise ValueError(f"make_sample must be a function, got {make_sample!r}")
        model = spec.model
        forward = original_forward(model)
        arguments = bind_call(forward, *split_sample(spec.sample_input))
        target = target_of(model, (), spec.device)
        return cls(
            model=model,
            forward=forward,
            sample=ResizableSample(
                arguments=describe(arguments), batch_dim=batch_dim, sequence_dim=sequence_dim
            ),
            given=arguments,
            make_sample=make_sample,
            target=target_of(model, tensors_of(arguments), spec.device),
            loss_fn=spec.loss_fn,
            optimizer=measure_optimizer(
                spec.optimizer, model, target, in_hooks=spec.holds.consumes
            ),
            autocast=spec.autocast,
            cost_model=spec.cost_model,
            measure_scratch=measure_scratch,
            holds=spec.holds,
        )

    def under_autocast(self) -> AbstractContextManager[None]:
        """The given autocast; the active one if none was given."""
        if self.autocast is None:
            return nullcontext()
        return autocast_as(self.target.torch_type, self.autocast)

    def arguments(self, batch: int | None, sequence: int | None) -> Mapping[str, Any]:
        """The call at this shape, with specifications for tensors.

        Raises
        ------
        ValueError
            When the sample has no such dimension.
        TypeError
            When what ``make_sample`` returns does not fit the model's signature.
        """
        if self.make_sample is None:
            return self.sample.resized(batch, sequence)
        # The caller's own tensors are freed before the step is captured.
        made = self.make_sample(batch, sequence)  # type: ignore[arg-type]
        arguments: Mapping[str, Any] = describe(bind_call(self.forward, *split_sample(made)))
        return arguments

    def capture(
        self, arguments: Mapping[str, Any], batch: int | None, sequence: int | None
    ) -> CapturedStep:
        """The step on ``arguments``, which have this shape; none of its tensors is allocated.

        Raises
        ------
        CaptureError
            When it cannot be captured at this shape.
        """

        def resize(spec: TensorSpec) -> TensorSpec:
            return self.sample.resize(spec, batch, sequence)

        loss = resized_loss(self.loss_fn, resize)
        with self.under_autocast():
            try:
                captured = self._captured(arguments, loss)
                refuse_short_tables(captured)
            except CaptureError as error:
                if self.loss_fn is not None:
                    error.add_note(
                        "loss_fn must take outputs of every batch size and sequence length; "
                        "targets that it brings along follow them where they lie in its closure "
                        "and have the sample's own sizes"
                    )
                raise
        return captured

    def unplanned_peak_bytes(self) -> int:
        """Predicted peak of the sample's own step without a plan.

        Raises
        ------
        CaptureError
            When it cannot be captured.
        """
        unplanned = self.capture(self.sample.arguments, None, None).unplanned
        assert unplanned is not None
        return replay(unplanned, Schedule.keep_all(unplanned)).peak_bytes

    def _captured(self, arguments: Mapping[str, Any], loss: LossFn | None) -> CapturedStep:
        """The step on ``arguments``; by the sample's own path if values decide it."""

        def capture(taken: TakenPath | None) -> CapturedStep:
            return capture_step(
                self.model,
                arguments,
                loss=loss,
                optimizer=self.optimizer,
                forward=self.forward,
                # Without the device nothing runs, and only rules give scratch memory.
                measure_scratch=self.measure_scratch or not self.target.at_hand,
                target=self.target,
                cost_model=self.cost_model,
                taken=taken,
                holds=self.holds,
            )

        taken = self._path[0] if self._path else None
        if taken is not None:
            try:
                return capture(taken)
            except CaptureError:  # this shape asks for other values
                logger.debug("not the sample's path", exc_info=True)
                return capture(None)
        try:
            captured = capture(None)
        except CaptureError:
            if self._path or (taken := self._sample_path()) is None:
                raise
            return capture(taken)
        if self._path or not captured.step.branch_free or (taken := self._sample_path()) is None:
            return captured
        try:
            return capture(taken)
        except CaptureError:
            logger.debug("not the sample's path", exc_info=True)
            return captured

    def _sample_path(self) -> TakenPath | None:
        """The sample's path through the model, if only yes-or-no answers decide it."""
        trace = holds_capture_lock(trace_step)
        try:
            step = trace(
                self.model, self.given, self.loss_fn, forward=self.forward, target=self.target
            )
        except CaptureError:
            logger.debug("the sample cannot be captured", exc_info=True)
            self._path.append(None)
            return None
        answers = [isinstance(outcome.number, bool) for outcome in step.outcomes]
        known = bool(answers) and all(answers) and not step.branch_free
        self._path.append(step.taken if known else None)
        return self._path[0]


def reason(error: CaptureError) -> str:
    """What stopped the first attempt of a capture, in one line."""
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else type(error).__name__
    if first.endswith(":") and len(lines) > 1:  # the reasons follow, "  how: reason" each
        first = lines[1].partition(": ")[2] or lines[1].strip()
    return "; ".join([first, *getattr(error, "__notes__", ())])
