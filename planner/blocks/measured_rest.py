"""The rest of a step that was run for real, because it cannot be captured.

One training step runs, forward, loss and backward, as eager runs it, with the blocks
computing their values apart (``graph_capture/apart/computed_calls.py``). It begins with no
gradients, or with those that the loop is said to accumulate. The model is left as it was.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.fx import Graph

from graph_capture.apart.computed_calls import Computing
from graph_capture.apart.opaque_calls import BACKWARD, FORWARD, OpaqueCalls, SeenCall
from graph_capture.apart.real_calls import RealCalls
from graph_capture.apart.real_step import RealStep, real_step
from graph_capture.calls.spread_out import refuse_spread_out
from graph_capture.capture_lock import holds_capture_lock
from graph_capture.captured_step import CapturedStep
from graph_capture.cost_graph import CostGraph, Storage
from graph_capture.costs.cost_model import TimingProgress
from graph_capture.costs.target import Target
from graph_capture.loop.loss import LossRegion, LossSpec
from graph_capture.loop.optimizer_step import OptimizerStep
from graph_capture.recording.outputs import take_apart
from graph_capture.tracing.traced_step import AS_EAGER, TracedStep

from ..base.step_spec import StepSpec
from .real_run import RealRun, failures_told, own_generators_put_back, refuse_unreal
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
    reason = "what lies between the blocks cannot be captured, so one step"
    refuse_unreal(model, arguments, target, reason)
    with own_generators_put_back(model):  # calls that draw run once more for their scratch
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
    running = RealRun(model, arguments, spec, recorded)
    what = "a real step on the sample, in which each block holds its arguments until its backward,"
    try:
        with failures_told(what):
            ending, loss = running.step(calls.around(forward))
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
