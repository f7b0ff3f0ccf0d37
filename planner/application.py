"""Put a plan in the place of a module's forward, and take it away again."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graph_capture.captured_step import CapturedStep

from .call_guard import LiveGuard
from .errors import CallMismatchError, PlanError
from .make_plan import replan
from .recapture import capture_for, on_card_of
from .rewrite import rewrite
from .runtime import PlannedStep
from .structure import Structure

if TYPE_CHECKING:
    from .plan import OnShapeChange, Plan

_POLICIES = ("error", "unplanned", "replan")


def apply_plan(plan: Plan, model: nn.Module, on_shape_change: OnShapeChange) -> nn.Module:
    """See :meth:`planner.Plan.apply`."""
    if on_shape_change not in _POLICIES:
        raise ValueError(f"on_shape_change is one of {_POLICIES}, got {on_shape_change!r}")
    forward = original_forward(model)
    plan = on_card_of(plan, model)
    captured = capture_for(plan, model, forward)
    if isinstance(model.__dict__.get("forward"), PlannedForward):
        remove_plan(model)
    model.__dict__["forward"] = PlannedForward(model, plan, captured, on_shape_change)
    return model


def remove_plan(model: nn.Module) -> nn.Module:
    """See :meth:`planner.Plan.remove`."""
    planned = model.__dict__.get("forward")
    if not isinstance(planned, PlannedForward):
        raise PlanError(f"no plan is applied to this {type(model).__name__}")
    if planned.own_forward is None:
        del model.__dict__["forward"]
    else:
        model.__dict__["forward"] = planned.own_forward
    return model


def applied_plan(model: nn.Module) -> Plan | None:
    """The plan that is applied to a module."""
    forward = model.__dict__.get("forward")
    return forward.plan if isinstance(forward, PlannedForward) else None


def original_forward(model: nn.Module) -> Callable[..., Any]:
    """The module's forward without a plan."""
    forward = model.forward
    return forward.unplanned if isinstance(forward, PlannedForward) else forward


@contextmanager
def forward_set(model: nn.Module, forward: Callable[..., Any] | None) -> Iterator[None]:
    """Let a module run another forward for a while; ``None`` stands for its class' own."""
    before = model.__dict__.get("forward")
    _set_forward(model, forward)
    try:
        yield
    finally:
        _set_forward(model, before)


def _set_forward(model: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        model.__dict__.pop("forward", None)
    else:
        model.__dict__["forward"] = forward


def own_forward(model: nn.Module) -> Callable[..., Any] | None:
    """What stands in the module for its class' forward when no plan is applied."""
    forward = model.__dict__.get("forward")
    return forward.own_forward if isinstance(forward, PlannedForward) else forward


class PlannedForward:
    """Stands in for a module's ``forward`` while a plan is applied.

    A copy of the module takes a copy of it along, bound to the copy.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, captured: CapturedStep | None, on_shape_change: str
    ) -> None:
        self.model = model
        self.plan = plan
        self.on_shape_change = on_shape_change
        self.own_forward = model.__dict__.get("forward")
        self._captured = captured
        self._structure = None if captured is None else Structure.of(model)
        self._step: PlannedStep | None = None
        self._guard: LiveGuard | None = None
        self._others: list[PlannedForward] = []
        self._signature: inspect.Signature | None = None
        self._train = torch.compiler.disable(self._call)  # torch.compile: one opaque call

    @property
    def unplanned(self) -> Callable[..., Any]:
        """The forward that the plan stands in for."""
        if self.own_forward is not None:
            return self.own_forward
        return type(self.model).forward.__get__(self.model)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.unplanned)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.model.training or not torch.is_grad_enabled():
            return self.unplanned(*args, **kwargs)
        return self._train(args, kwargs)

    def _call(self, args: tuple, kwargs: dict) -> Any:
        if self._signature is None:
            self._signature = self.__signature__
        arguments = self._signature.bind(*args, **kwargs).arguments
        different = self._prepare().difference(arguments)
        if different is None:
            assert self._step is not None
            return self._step(arguments)
        if self.on_shape_change == "unplanned":
            return self.unplanned(*args, **kwargs)
        if self.on_shape_change == "replan":
            return self._replanned(arguments, args, kwargs)
        raise _mismatch(different)

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Make the graphs if they are not made yet, and see whether a call is the planned one.

        Raises
        ------
        CallMismatchError
            Names the first difference.
        """
        different = self._prepare().difference(arguments)
        if different is not None:
            raise _mismatch(different)

    def _prepare(self) -> LiveGuard:
        """The graphs and their guard, made anew after a part of the model was replaced."""
        if self._structure is None or not self._structure.holds():
            self._guard = self._structure = None
            self._captured = capture_for(self.plan, self.model, self.unplanned)
            self._structure = Structure.of(self.model)
        if self._guard is None:
            assert self._captured is not None
            graphs = rewrite(self._captured, self.plan.schedule)
            self._step = PlannedStep(self.model, self._captured, graphs, self.plan)
            self._guard = LiveGuard(
                self.plan.guard, self.model, self.plan.device_type, self.__signature__
            )
        return self._guard

    def _replanned(self, arguments: Mapping[str, Any], args: tuple, kwargs: dict) -> Any:
        for other in self._others:
            if other._prepare().difference(arguments) is None:
                return other(*args, **kwargs)
        plan = replan(self.plan, self.model, arguments, self.unplanned)
        other = PlannedForward(self.model, plan, plan._captured, "error")
        other.own_forward = self.own_forward
        self._others.append(other)
        return other(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> PlannedForward:
        model = copy.deepcopy(self.model, memo)
        twin = PlannedForward(model, self.plan, None, self.on_shape_change)
        twin.own_forward = copy.deepcopy(self.own_forward, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle keeps: the graphs are made again on the first call."""
        return {
            **self.__dict__,
            "_train": None,
            "_captured": None,
            "_structure": None,
            "_step": None,
            "_guard": None,
            "_signature": None,
            "_others": [],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._train = torch.compiler.disable(self._call)


def _mismatch(different: str) -> CallMismatchError:
    return CallMismatchError(
        f"this call is not the planned one: {different}. Make a plan for it, or apply the "
        "plan with on_shape_change='unplanned' or 'replan'"
    )
