"""Capture again the step that a plan was made for, on the model that it is applied to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graph_capture.autocast import autocast_as
from graph_capture.call_spec import TensorSpec, difference, moved, parse_dtype
from graph_capture.captured_step import CapturedStep, capture_step
from graph_capture.cost_graph import CostGraph
from graph_capture.outcomes import OutcomeMismatchError
from graph_capture.policies import apply_policies
from graph_capture.trace import TakenPath

from .call_guard import CallGuard
from .errors import PlanMismatchError

if TYPE_CHECKING:
    from .plan import Plan


def on_card_of(plan: Plan, model: nn.Module) -> Plan:
    """The plan for the card that ``model`` lies on: each rank of a job has one of its own."""
    cards = {t.device for t in model.parameters() if t.device.type == "cuda"}
    planned = {torch.device(spec.device) for spec in plan.guard.state.values()}
    if plan.device_type != "cuda" or len(cards) != 1 or cards <= planned:
        return plan
    (card,) = cards

    def place(device: torch.device) -> torch.device:
        return card if device.type == "cuda" else device

    guard, loss = plan.guard, plan.loss
    return replace(
        plan,
        guard=replace(
            guard, arguments=moved(guard.arguments, place), state=moved(guard.state, place)
        ),
        loss=replace(loss, tangents=moved(loss.tangents, place)),
        _captured=None,
        _structure=None,
    )


def capture_for(plan: Plan, model: nn.Module, forward: Callable[..., Any]) -> CapturedStep:
    """The captured step of ``model`` for ``plan``, checked to be the one that was planned.

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
    found = CallGuard.of(model, {}, plan.device_type).state
    _refuse_elsewhere(plan.guard.state, found)
    different = difference(plan.guard.state, found, "state")
    if different is not None:
        raise _another_model(different)
    captured, structure = plan._captured, plan._structure
    # What was captured without the device is captured again on it, to see that it holds there.
    known = captured is not None and not captured.target.elsewhere and captured.model() is model
    if known and structure and structure.holds():
        assert captured is not None
        return captured
    with _as_planned(model, plan):
        captured = _capture_again(plan, model, forward)
    if captured.graph.fingerprint != plan.fingerprint:
        different = _first_difference(plan.graph, captured.graph)
        raise _another_model(different)
    return captured


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
    """A torch version without its build: a plan made with a CPU build serves a CUDA build."""
    return version.partition("+")[0]


def _capture_again(plan: Plan, model: nn.Module, forward: Callable[..., Any]) -> CapturedStep:
    taken = None  # an older file does not say which way the plan takes
    if plan.outcomes is not None:
        taken = TakenPath(branch_free=plan.branch_free, outcomes=plan.outcomes)
    try:
        captured = capture_step(
            model,
            plan.guard.arguments,
            loss=plan.loss,
            optimizer=plan.optimizer,
            forward=forward,
            measure_scratch=False,
            taken=taken,
        )
    except OutcomeMismatchError as error:
        raise _another_model(str(error)) from error
    return apply_policies(captured, plan.never_recompute, plan.always_recompute)


@contextmanager
def _as_planned(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Autocast and the modules' training flags as they were when the plan was made."""
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
        if (a.target, a.inputs, a.outputs, a.pinned) != (b.target, b.inputs, b.outputs, b.pinned):
            return (
                f"operator {v} is {b.target} ({b.module_path or b.phase}), "
                f"planned was {a.target} ({a.module_path or a.phase})"
            )
    if len(planned.operators) != len(found.operators):
        return f"{len(found.operators)} operators, planned were {len(planned.operators)}"
    for a_storage, b_storage in zip(planned.storages, found.storages, strict=False):
        if a_storage.size_bytes != b_storage.size_bytes:
            return (
                f"{b_storage.name} has {b_storage.size_bytes} bytes, "
                f"planned were {a_storage.size_bytes}"
            )
    return f"{len(found.storages)} storages, planned were {len(planned.storages)}"
