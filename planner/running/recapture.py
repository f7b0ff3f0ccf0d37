"""Capture a plan's step again, on the model that the plan is applied to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from graph_capture.calls.autocast import autocast_as
from graph_capture.calls.call_spec import (
    TensorSpec,
    difference,
    moved,
    parse_dtype,
    specs_of,
    tensors_of,
)
from graph_capture.calls.spread_out import refuse_spread_out
from graph_capture.captured_step import CapturedStep
from graph_capture.cost_graph import CostGraph, Operator
from graph_capture.costs.target import target_of
from graph_capture.costs.workspace import SCRATCH_NOT_COUNTED
from graph_capture.errors import CaptureError, NotFittingError
from graph_capture.folding.leaving import CONSUME
from graph_capture.loop.loss import LossSource
from graph_capture.policies import apply_policies
from graph_capture.step_capture import capture_step
from graph_capture.tracing.traced_step import TakenPath
from graph_capture.values.outcomes import OutcomeMismatchError
from solvers.replay import InvalidScheduleError, replay

from ..base.call_guard import CallGuard
from ..base.live_state import LiveState
from ..base.module_structure import Structure
from ..errors import PlanMismatchError
from ..plan_record import PlanRecord


def on_card_of(
    plan: PlanRecord, live: LiveState | None, model: nn.Module
) -> tuple[PlanRecord, LiveState | None]:
    """Return the plan for the GPU that ``model`` is on: each rank of a job has its own."""
    cards = {t.device for t in model.parameters() if t.device.type == "cuda"}
    planned = {torch.device(spec.device) for spec in plan.guard.state.values()}
    if plan.device_type != "cuda" or len(cards) != 1 or cards <= planned:
        return plan, live
    (card,) = cards

    def place(device: torch.device) -> torch.device:
        return card if device.type == "cuda" else device

    guard, loss = plan.guard, plan.loss
    placed = replace(
        plan,
        guard=replace(
            guard, arguments=moved(guard.arguments, place), state=moved(guard.state, place)
        ),
        loss=replace(loss, tangents=moved(loss.tangents, place)),
    )
    return placed, None


def capture_for(
    plan: PlanRecord,
    live: LiveState | None,
    model: nn.Module,
    forward: Callable[..., Any],
    *,
    in_loop: bool = False,
) -> CapturedStep:
    """Capture the step of ``model`` for ``plan``, and check that it is the planned one.

    From a plan file, only the order of its runs, its times, and the costs of the
    training loop's own loss and optimizer are used. Sizes, pins, the order of draws and
    the kernels' scratch are found here, and the order is checked against them.

    Parameters
    ----------
    in_loop
        Whether a step of the training loop waits for this, in which measuring scratch would
        take memory that no budget counts. Else it is measured again under other settings.

    Raises
    ------
    PlanMismatchError
        Names the first difference.
    """
    if _release(plan.torch_version) != _release(torch.__version__):
        raise PlanMismatchError(
            f"the plan was made with torch {plan.torch_version}, this is {torch.__version__}: "
            "what a model dispatches may differ; make the plan again"
        )
    try:
        refuse_spread_out(model)
    except NotFittingError as error:
        raise PlanMismatchError(f"no plan can be applied here: {error}") from error
    found = CallGuard.of(model, {}, plan.device_type).state
    _refuse_elsewhere(plan.guard.state, found)
    different = difference(plan.guard.state, found, "state")
    if different is not None:
        raise _another_model(different)
    _refuse_absent_devices(plan)
    captured = None if live is None else live.captured
    own = captured is not None and captured.graph is plan.graph
    # A step captured without the device is captured again on it, to check that it is the same.
    if own and live is not None and captured is not None and not captured.target.elsewhere:
        unchanged = captured.model() is model and live.structure.holds()
        if unchanged and captured.step.reads.difference() is None:
            return captured
        measured = in_loop or captured.step.reads.settings_difference() is None
    else:
        measured = False
    _refuse_another_call(plan, model, forward)
    try:
        with _as_planned(model, plan):
            captured = _capture_again(plan, model, forward, measure_scratch=not measured)
    except OutcomeMismatchError as error:
        raise _another_model(str(error)) from error
    except CaptureError as error:
        raise PlanMismatchError(
            f"the planned step cannot be captured on this model: {error}"
        ) from error
    if captured.device_type != plan.device_type:
        raise PlanMismatchError(
            f"the plan is for {plan.device_type}, and its step would run on {captured.device_type}"
        )
    if captured.graph.fingerprint != plan.fingerprint:
        raise _another_model(_first_difference(plan.graph, captured.graph))
    captured = replace(captured, graph=_priced_as_planned(plan.graph, captured.graph, measured))
    _judge(plan, captured.graph)
    return captured


def as_captured(
    plan: PlanRecord, live: LiveState | None, captured: CapturedStep
) -> tuple[PlanRecord, LiveState | None]:
    """Return the plan with the figures of the step that :func:`capture_for` found for it."""
    if captured.graph == plan.graph:
        return plan, live
    step, model = captured.step, captured.model()
    found = replace(
        plan,
        graph=captured.graph,
        detached=tuple(dict.fromkeys(step.template.names[i] for i in step.detached)),
        branch_free=step.branch_free,
        outcomes=step.outcomes,
    )
    if model is None:
        return found, None
    request = None if live is None else live.request
    return found, LiveState(captured=captured, structure=Structure.of(model), request=request)


def _priced_as_planned(planned: CostGraph, found: CostGraph, measured: bool) -> CostGraph:
    """Return the graph found here with the plan's times, and its scratch if that was measured.

    The time and memory of the loop's loss and optimizer cannot be found here.
    """
    operators = []
    for there, here in zip(planned.operators, found.operators, strict=True):
        workspace_bytes = here.workspace_bytes
        if here.target == CONSUME:  # a file has only the most that any parameter's step takes
            workspace_bytes = there.workspace_bytes
        elif measured or here.phase in ("loss", "optimizer"):
            workspace_bytes = max(workspace_bytes, there.workspace_bytes)
        operators.append(
            replace(
                here,
                cost_ns=there.cost_ns,
                workspace_bytes=workspace_bytes,
                rewrites=_priced_rewrites(there, here),
            )
        )
    return CostGraph(tuple(operators), found.storages)


def _priced_rewrites(there: Operator, here: Operator) -> tuple[tuple[int, int, int], ...]:
    """Copies at the plan's times; older plans include them in the operator's own time."""
    known = {new: ns for _, new, ns in there.rewrites}
    return tuple((old, new, known.get(new, 0)) for old, new, _ in here.rewrites)


def _judge(plan: PlanRecord, graph: CostGraph) -> None:
    """Check that the plan's order computes this graph within its budget.

    A plan made without the device did not count scratch; its headroom is meant for that.
    """
    try:
        outcome = replay(graph, plan.schedule)
    except InvalidScheduleError as error:
        raise PlanMismatchError(
            f"the plan's order of runs does not compute this model's step: {error}; make the plan "
            "again with optimize()"
        ) from error
    counted = SCRATCH_NOT_COUNTED not in plan.costs.notes
    headroom_bytes = plan.headroom_bytes if counted else 0
    if outcome.peak_bytes <= plan.budget_bytes - headroom_bytes:
        return
    operator = graph.operators[plan.schedule.order[outcome.peak_step]]
    less = f" less a headroom of {headroom_bytes}" if headroom_bytes else ""
    raise PlanMismatchError(
        f"here the plan peaks at {outcome.peak_bytes} bytes, above its budget of "
        f"{plan.budget_bytes}{less} (the plan says {plan.predicted_peak_bytes}): at "
        f"{operator.name!r}, whose kernels take {operator.workspace_bytes} bytes of scratch here; "
        "make the plan again on this machine with optimize()"
    )


def _refuse_absent_devices(plan: PlanRecord) -> None:
    """Refuse absent devices before tensors are made from a specification.

    PyTorch may abort the process otherwise.
    """
    specs = [*specs_of(plan.guard.arguments), *plan.loss.tangents]
    for device in {plan.device_type, *(spec.device for spec in specs)}:
        kind, _, index = device.partition(":")
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if kind == "cuda" and int(index or 0) >= there:
            raise PlanMismatchError(
                f"the plan is for {device}, and this process sees {there} CUDA devices: apply it "
                "where the device is, or make a plan for this one"
            )
        if kind not in ("cpu", "cuda"):
            raise PlanMismatchError(
                f"the plan's call has a tensor on {device!r}, where no step runs; make the plan "
                "again with optimize()"
            )


def _refuse_another_call(plan: PlanRecord, model: nn.Module, forward: Callable[..., Any]) -> None:
    """Refuse a planned call that this module can never receive."""
    unknown = set(plan.guard.arguments) - set(inspect.signature(forward).parameters)
    if unknown:
        raise _another_model(f"forward has no argument {min(unknown)!r}")
    planned = plan.guard.evaluating
    known = tuple(name for name, _ in model.named_modules() if name and name in set(planned))
    if known != planned:
        wrong = next((n for n in planned if n not in known), planned[0])
        raise _another_model(f"module {wrong!r} was in eval mode, which here cannot be")


def _another_model(different: str) -> PlanMismatchError:
    return PlanMismatchError(
        f"the plan was made for another model: {different}; make a plan for this model with "
        "optimize()"
    )


def _refuse_elsewhere(planned: Mapping[str, TensorSpec], found: Mapping[str, TensorSpec]) -> None:
    for name in (n for n in planned if n in found):
        device, here = planned[name].device, found[name].device
        if device != here:
            raise PlanMismatchError(
                f"the plan is for a model on {device}, and {name!r} lies on {here}: move the model "
                f"first (model.to({device!r})), or make a plan for where it lies"
            )


def _release(version: str) -> str:
    """A torch version without its build: a plan from a CPU build also works in a CUDA build."""
    return version.partition("+")[0]


def _capture_again(
    plan: PlanRecord, model: nn.Module, forward: Callable[..., Any], *, measure_scratch: bool
) -> CapturedStep:
    rules = plan.never_recompute, plan.always_recompute

    def check(graph: CostGraph) -> None:
        """Run nothing for a step that differs from the planned one; rules change the graph."""
        if not any(rules) and graph.fingerprint != plan.fingerprint:
            raise _another_model(_first_difference(plan.graph, graph))

    taken = None  # an older file does not say which path the plan takes
    if plan.outcomes is not None:
        taken = TakenPath(branch_free=plan.branch_free, outcomes=plan.outcomes)
    captured = capture_step(
        model,
        plan.guard.arguments,
        # What can be found again without the user's code is not taken from the file.
        loss=plan.loss if plan.loss.region.source is LossSource.LOSS_FN else None,
        optimizer=plan.optimizer,
        forward=forward,
        target=target_of(model, tensors_of(plan.guard.arguments)),
        measure_scratch=measure_scratch,
        taken=taken,
        check=check if measure_scratch else None,
        holds=plan.holds,
        argument_bytes=plan.guard.argument_bytes,
    )
    return apply_policies(captured, *rules)


@contextmanager
def _as_planned(model: nn.Module, plan: PlanRecord) -> Iterator[None]:
    """While active, autocast and the training flags are as they were when the plan was made."""
    evaluating = set(plan.guard.evaluating)
    before = [(module, module.training) for module in model.modules()]
    for name, module in model.named_modules():
        module.training = name not in evaluating
    dtype = plan.guard.autocast
    try:
        with autocast_as(plan.device_type, None if dtype is None else parse_dtype(dtype)):
            yield
    finally:
        for module, training in before:
            module.training = training


def _first_difference(planned: CostGraph, found: CostGraph) -> str:
    for v, (a, b) in enumerate(zip(planned.operators, found.operators, strict=False)):
        here, there = (f"{op.target} ({op.module_path or op.phase})" for op in (b, a))
        if here != there:
            return f"operator {v} is {here}, planned was {there}"
        for what in ("inputs", "outputs", "pinned"):
            if getattr(a, what) != getattr(b, what):
                return f"{what} of operator {v}, {here}, are others than those planned"
    if len(planned.operators) != len(found.operators):
        return f"{len(found.operators)} operators, planned were {len(planned.operators)}"
    for a_storage, b_storage in zip(planned.storages, found.storages, strict=False):
        if a_storage.size_bytes != b_storage.size_bytes:
            return (
                f"{b_storage.name} has {b_storage.size_bytes} bytes, "
                f"planned were {a_storage.size_bytes}"
            )
    return f"{len(found.storages)} storages, planned were {len(planned.storages)}"
