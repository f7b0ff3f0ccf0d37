"""Put a plan in the place of a module's forward, and take it away again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from graph_capture.captured_step import CapturedStep

from ..base.wrapped import (
    find_wrapped,
    is_reached,
)
from ..errors import PlanError
from .planned_forward import PlannedForward
from .recapture import (
    as_captured,
    capture_for,
    on_card_of,
)

if TYPE_CHECKING:
    from ..plan import (
        OnShapeChange,
        Plan,
    )

# Where a module keeps it: what stands in its ``forward`` may be wrapped or replaced by others.
_KEPT = "_remat_planned_forward"

_POLICIES = ("error", "unplanned", "replan")


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedPlan:
    """How a module has trained by a plan so far.

    Parameters
    ----------
    plan
        The plan that was applied.
    on_shape_change
        What a call does that is not the planned one.
    planned_steps
        Training calls that ran by the plan, or by one that was made for another
        call under ``"replan"``.
    unplanned_steps
        Training steps that ran the model's own forward, or another that was put in
        its place.
    last_mismatch
        Why the last of those, or of the calls that were refused, was not the planned
        one; ``None`` when there was none.
    """

    plan: Plan
    on_shape_change: str
    planned_steps: int
    unplanned_steps: int
    last_mismatch: str | None


def apply_plan(plan: Plan, model: nn.Module, on_shape_change: OnShapeChange) -> nn.Module:
    """See :meth:`planner.Plan.apply`."""
    if on_shape_change not in _POLICIES:
        raise ValueError(f"on_shape_change is one of {_POLICIES}, got {on_shape_change!r}")
    forward = original_forward(model)
    plan = on_card_of(plan, model)
    captured = capture_for(plan, model, forward)
    plan = as_captured(plan, captured)
    if on_shape_change == "error":
        _refuse_passing_way(captured)
    planned = planned_forward(model)
    if planned is not None and _is_wrapped(model, planned):
        planned.renew(plan, captured, on_shape_change)  # whoever put something around it keeps it
    else:
        if planned is not None:
            remove_plan(model)
        planned = PlannedForward(model, plan, captured, on_shape_change)
        model.__dict__["forward"] = model.__dict__[_KEPT] = planned
    planned.watch_backward(captured)
    return model


def _refuse_passing_way(captured: CapturedStep) -> None:
    """A step that is known to take another way should not be the first to say so."""
    for check in captured.step.checks:
        if check.next_step:
            module = f" in module {check.module_path!r}" if check.module_path else ""
            raise PlanError(
                f"the next steps take another way through the model than the planned one: at "
                f"{check.source}{module} forward asks for {check.what}; {check.next_step}. Or "
                "apply the plan with on_shape_change='replan', which plans for each way that "
                "comes up, or 'unplanned'"
            )


def _is_wrapped(model: nn.Module, planned: PlannedForward) -> bool:
    """Whether calls come to a planned forward through a function that somebody put around it."""
    forward: Any = model.__dict__.get("forward")
    bare = planned in (forward, getattr(forward, "__func__", None))
    return not bare and is_reached(model, planned)


def remove_plan(model: nn.Module) -> nn.Module:
    """See :meth:`planner.Plan.remove`."""
    planned = planned_forward(model)
    if planned is None:
        raise PlanError(f"no plan is applied to this {type(model).__name__}")
    planned.stop()
    del model.__dict__[_KEPT]
    forward: Any = model.__dict__.get("forward")
    if planned in (forward, getattr(forward, "__func__", None)):
        _set_forward(model, planned.own_forward)
    return model


def applied_plan(model: nn.Module) -> AppliedPlan | None:
    """The plan that is applied to a module, and how many steps it has run.

    Also where something else was put in the place of the module's forward since.

    Returns
    -------
    AppliedPlan or None
        ``None`` where no plan is applied.
    """
    planned = planned_forward(model)
    if planned is None:
        return None
    return AppliedPlan(
        plan=planned.plan,
        on_shape_change=planned.on_shape_change,
        planned_steps=planned.tally.num_planned,
        unplanned_steps=planned.tally.num_unplanned,
        last_mismatch=planned.tally.last_mismatch,
    )


@contextmanager
def unplanned(model: nn.Module) -> Iterator[None]:
    """Let a planned module run its own forward for a while, outside its budget.

    For calls that a plan does not hold, such as one whose gradient is
    differentiated again. Without a plan this changes nothing.

    Examples
    --------
    >>> import torch
    >>> layer = nn.Linear(2, 1)
    >>> with unplanned(layer):
    ...     penalty = layer(torch.ones(1, 2)).square().sum()
    """
    planned = planned_forward(model)
    if planned is not None:
        planned.suspended += 1
    try:
        yield
    finally:
        if planned is not None:
            planned.suspended -= 1


def planned_forward(model: nn.Module) -> PlannedForward | None:
    """What runs the plan of a module, whatever was put around it or in its place."""
    found = model.__dict__.get(_KEPT)
    return found if isinstance(found, PlannedForward) else None


def original_forward(model: nn.Module) -> Callable[..., Any]:
    """The module's forward without a plan."""
    planned = find_wrapped(model.__dict__.get("forward"), PlannedForward)
    return model.forward if planned is None else planned.unplanned


@contextmanager
def forward_set(model: nn.Module, forward: Callable[..., Any] | None) -> Iterator[None]:
    """Let a module run another forward for a while; ``None`` stands for its class' own."""
    before = model.__dict__.get("forward")
    planned = planned_forward(model)
    _set_forward(model, forward)
    if planned is not None:
        planned.unwatched += 1
    try:
        yield
    finally:
        if planned is not None:
            planned.unwatched -= 1
        _set_forward(model, before)


def _set_forward(model: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        model.__dict__.pop("forward", None)
    else:
        model.__dict__["forward"] = forward


def own_forward(model: nn.Module) -> Callable[..., Any] | None:
    """What stands in the module for its class' forward when no plan is applied."""
    forward: Any = model.__dict__.get("forward")
    return forward.own_forward if isinstance(forward, PlannedForward) else forward
