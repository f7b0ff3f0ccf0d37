"""Put a plan in place of a module's forward, and remove it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from graph_capture.captured_step import CapturedStep
from graph_capture.suggestions import did_you_mean
from graph_capture.units import format_bytes

from ..base.data_parallel import inside
from ..base.forward_slot import (
    StandIn,
    keep_stand_in,
    original_forward,
    put_stand_in,
    refuse_plans_inside,
    stand_in_of,
    take_stand_in,
)
from ..base.live_state import LiveState
from ..base.unwrap import is_reached
from ..errors import CaptureError, PlanError, PlanMismatchError
from ..plan_record import OnShapeChange, PlanRecord
from .compiled_calls import CompiledCalls, PlanCompiler
from .planned_forward import Look, PlannedForward, Replan
from .recapture import (
    as_captured,
    capture_for,
    on_card_of,
)
from .watching_forward import WatchingForward

_POLICIES = get_args(OnShapeChange)


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedPlan:
    """How a module has trained under a plan so far.

    Parameters
    ----------
    plan
        The plan that was applied.
    on_shape_change
        What a call does when it differs from the planned one.
    planned_steps
        Training calls that ran by the plan, or by one that was made for another
        call under ``"replan"`` or ``"adapt"``.
    unplanned_steps
        Training steps that ran the model's own forward, or another that was put in
        its place.
    last_mismatch
        Why the last of those, or of the refused calls, differed from the planned one;
        ``None`` when there was none.
    peak_bytes
        The highest predicted peak of the planned steps so far; 0 before the first.
    captures, capture_s
        How many plans were made for other calls, and the seconds that the loop waited
        for them.
    other_plans
        Plans for other calls that are kept, the one used last first: those made ahead, and
        at most ``planner.running.planned_forward.MAX_CALLS`` that the loop made.
    compiled
        What of the step that ran last is compiled, where the plan was applied with
        ``compile=True``; ``None`` before the first.

    Notes
    -----
    ``str()`` of it is one line for the end of a training: ``200 of 200 steps by the
    plan, peak 3.91 GB of budget 4.00 GB``.
    """

    plan: PlanRecord
    on_shape_change: str
    planned_steps: int
    unplanned_steps: int
    last_mismatch: str | None
    peak_bytes: int
    captures: int
    capture_s: float
    other_plans: tuple[PlanRecord, ...]
    compiled: CompiledCalls | None = None

    def __str__(self) -> str:
        num_steps = self.planned_steps + self.unplanned_steps
        text = (
            f"{self.planned_steps} of {num_steps} steps by the plan, predicted peak "
            f"{format_bytes(self.peak_bytes)} of budget "
            f"{format_bytes(self.plan.budget_bytes)}"
        )
        if self.unplanned_steps:
            text += f"; the last that was not: {self.last_mismatch}"
        if self.compiled is not None:
            text += f"; {self.compiled}"
        return text


def apply_plan(
    plan: PlanRecord,
    live: LiveState | None,
    model: nn.Module,
    on_shape_change: OnShapeChange,
    replans: Mapping[str, Replan],
    others: Sequence[tuple[PlanRecord, LiveState | None]] = (),
    *,
    compiler: PlanCompiler | None = None,
) -> nn.Module:
    """See :meth:`planner.Plan.apply`.

    Parameters
    ----------
    live
        What this process knows besides the plan.
    replans
        Makers of plans for calls that differ from the planned one, by policy.
    others
        Plans for other calls, made ahead, with what this process knows besides them.
    compiler
        Compiles what it can of the plans' graphs.
    """
    if on_shape_change not in _POLICIES:
        meant = did_you_mean(str(on_shape_change), _POLICIES)
        raise ValueError(
            f"on_shape_change is one of {_POLICIES}, got {on_shape_change!r}; {meant}".rstrip("; ")
        )
    wrapper, model = model, inside(model)
    (plan, live, captured), *more = (
        captured_plan(plan, live, model) for plan, live in ((plan, live), *others)
    )
    if on_shape_change == "error":
        _refuse_passing_way(captured)
    planned = _planned_forward(model)
    if planned is not None and _is_wrapped(model, planned):
        # Whoever put something around it keeps it.
        planned.renew(plan, live, captured, on_shape_change, replans, compiler)
    else:
        if planned is not None:
            remove_plan(model)
        planned = PlannedForward(
            model, plan, live, captured, on_shape_change, replans, compiler=compiler
        )
        _put(model, planned)
    for other in more:
        planned.add(*other)
    planned.watch_backward(captured)
    return wrapper


def apply_unseen(
    plan: PlanRecord,
    model: nn.Module,
    on_shape_change: OnShapeChange,
    *,
    compiler: PlanCompiler | None = None,
) -> None:
    """Apply a plan whose step is captured, and compared with the planned one, at the first call.

    For a module whose parameters are only there while it is called.
    """
    _put(model, PlannedForward(model, plan, None, None, on_shape_change, {}, compiler))


def place_in_model(model: nn.Module, path: str, look: Look) -> None:
    """Tell a planned module that it is a block of a model, which errors then name by its path.

    It is looked at in its planned calls, as long as that is asked for.
    """
    planned = _planned_forward(model)
    assert planned is not None
    planned.block, planned.look, planned.looked = path, look, False


def _put(model: nn.Module, planned: PlannedForward) -> None:
    """Put a plan in the place of a forward, or of one that waits for the first training call."""
    waiting = stand_in_of(model)
    if not isinstance(waiting, WatchingForward):
        put_stand_in(model, planned)
        return
    if not is_reached(model, waiting):  # somebody else's forward, which may call the other
        waiting.stop()
        take_stand_in(model, waiting)
        put_stand_in(model, planned)
        return
    wrapped = _is_wrapped(model, waiting)
    waiting.follow_with(planned)
    if wrapped:
        keep_stand_in(model, planned)  # whoever put something around the other keeps it
    else:
        put_stand_in(model, planned)


def captured_plan(
    plan: PlanRecord, live: LiveState | None, model: nn.Module
) -> tuple[PlanRecord, LiveState | None, CapturedStep]:
    """Capture a plan's step on the model, and return the plan with what was found."""
    plan, live = on_card_of(plan, live, model)
    try:
        captured = capture_for(plan, live, model, original_forward(model))
    except (PlanMismatchError, CaptureError) as error:
        refuse_plans_inside(model, error)
        raise
    return *as_captured(plan, live, captured), captured


def _refuse_passing_way(captured: CapturedStep) -> None:
    """Refuse a plan whose next steps are known to take another path through the model."""
    for check in captured.step.checks:
        if check.next_step:
            module = f" in module {check.module_path!r}" if check.module_path else ""
            raise PlanError(
                f"the next steps take another way through the model than the planned one: at "
                f"{check.source}{module} forward asks for {check.what}; {check.next_step}. Or "
                "apply the plan with on_shape_change='replan', which plans for each way that "
                "comes up, or 'unplanned'"
            )


def _is_wrapped(model: nn.Module, planned: StandIn) -> bool:
    """Whether calls reach a stand-in through someone else's wrapper."""
    forward: Any = model.__dict__.get("forward")
    bare = planned in (forward, getattr(forward, "__func__", None))
    return not bare and is_reached(model, planned)


def remove_plan(model: nn.Module) -> nn.Module:
    """See :meth:`planner.Plan.remove`."""
    planned = _planned_forward(model)
    if planned is None:
        raise PlanError(f"no plan is applied to this {type(model).__name__}")
    planned.stop()
    take_stand_in(inside(model), planned)
    return model


def applied_plan(model: nn.Module) -> AppliedPlan | None:
    """Return the plan applied to a module, and how many steps it has run.

    This also works where something else has replaced the module's forward since.

    Returns
    -------
    AppliedPlan or None
        ``None`` where no plan is applied.
    """
    planned = _planned_forward(model)
    if planned is None:
        return None
    return AppliedPlan(
        plan=planned.plan,
        on_shape_change=planned.on_shape_change,
        planned_steps=planned.tally.num_planned,
        unplanned_steps=planned.tally.num_unplanned,
        last_mismatch=planned.tally.last_mismatch,
        peak_bytes=planned.tally.peak_bytes,
        captures=planned.tally.num_captures,
        capture_s=planned.tally.capture_s,
        other_plans=planned.other_plans,
        compiled=planned.compiled,
    )


def _planned_forward(model: nn.Module) -> PlannedForward | None:
    found = stand_in_of(inside(model))
    return found if isinstance(found, PlannedForward) else None
