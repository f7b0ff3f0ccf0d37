"""The replacement for a module's forward while a plan is applied."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import NoneType
from typing import Any, Protocol

import torch
from torch import nn

from graph_capture.call_spec import describe, difference
from graph_capture.captured_step import CapturedStep
from graph_capture.errors import CaptureError
from graph_capture.private_torch.modules import active_data_parallel, bucketed_parameters_of
from graph_capture.units import format_bytes

from ..base.forward_slot import StandIn
from ..base.live_state import LiveState
from ..base.module_structure import (
    LiveStructure,
    Structure,
)
from ..errors import (
    OutcomeChangedError,
    PlanError,
    PlanMismatchError,
)
from ..plan_record import PlanRecord
from .another_call import (
    hint_at,
    mismatch,
)
from .live_guard import (
    LiveGuard,
    described_defaults,
)
from .planned_step import PlannedStep
from .recapture import (
    as_captured,
    capture_for,
)
from .rewrite import rewrite
from .surroundings import foreign_surroundings
from .tally import Tally
from .unplanned_backward import UnplannedBackward

MAX_VARIANTS = 4
"""Captures of one plan that are kept: a factor that goes back and forth is captured once each."""

MAX_REPLANS = 16
"""Plans for other calls that are kept, the ones used last."""

_MANY_CAPTURES = 3
_NUM_REMEMBERED = 64


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A captured step of a module, its two graphs, and what must not change.

    Parameters
    ----------
    captured
        The step.
    step
        The step's graphs, bound to the module.
    structure, guard
        The module's structure, and the planned call.
    """

    captured: CapturedStep
    step: PlannedStep
    structure: LiveStructure
    guard: LiveGuard

    def changed(self) -> str | None:
        """Describe what has changed on the module since the step was captured.

        This is its structure, or something that its forward or backward reads.
        """
        return self.structure.difference() or self.captured.step.reads.difference()


class Replan(Protocol):
    """Makes another plan for another call of a planned model."""

    def __call__(
        self,
        plan: PlanRecord,
        live: LiveState | None,
        model: nn.Module,
        arguments: Mapping[str, Any],
        forward: Callable[..., Any],
    ) -> tuple[PlanRecord, LiveState]:
        """Return the plan, and what is known besides it."""


class PlannedForward(StandIn):
    """Replaces a module's ``forward`` while a plan is applied.

    Copying the module copies this, bound to the copy.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: PlanRecord,
        live: LiveState | None,
        captured: CapturedStep | None,
        on_shape_change: str = "error",
        replan: Replan | None = None,
    ) -> None:
        super().__init__(model)
        self._start(plan, live, captured, on_shape_change, replan)

    def _start(
        self,
        plan: PlanRecord,
        live: LiveState | None,
        captured: CapturedStep | None,
        on_shape_change: str,
        replan: Replan | None,
    ) -> None:
        model = self.model
        self.plan = plan
        self._live = live
        self.on_shape_change = on_shape_change
        self._replan = replan
        self.removed = False
        self.suspended = self.unwatched = 0
        self.watching = False
        self.tally = Tally()
        self._num_captures = 0
        self._at_hand: tuple[CapturedStep, Structure] | None
        self._at_hand = None if captured is None else (captured, Structure.of(model))
        self._begin()

    def _begin(self) -> None:
        """Set what neither a copy nor a pickle includes."""
        self._prepared: list[Prepared] = []  # the one used last comes first
        self._others: list[PlannedForward] = []
        self._used_other = False  # by the last call
        self._not_planned: dict[str, str] = {}  # changes that were captured in vain
        self._not_replanned: dict[str, Exception] = {}  # calls that were captured in vain
        self._buckets_said = False
        self._main: PlannedForward | None = None  # of a plan for another call: where it belongs
        self._signature: inspect.Signature | None = None
        self._watch: UnplannedBackward | None = None
        self._lock = threading.RLock()
        self._train = torch.compiler.disable(self._call)  # torch.compile: one opaque call

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.unplanned)

    @property
    def __code__(self) -> Any:  # torch.export looks for it
        return self.unplanned.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.model:  # bound to it as a method, by accelerate for one
            args = args[1:]
        if self.removed or not self.model.training or not torch.is_grad_enabled():
            return self.unplanned(*args, **kwargs)
        return self._train(args, kwargs)

    def _call(self, args: tuple, kwargs: dict) -> Any:
        if self.suspended:
            self.tally.num_unplanned += 1
            return self.unplanned(*args, **kwargs)
        foreign = foreign_surroundings()
        if foreign is not None:
            return self._by_own_forward(foreign, args, kwargs)
        if self._signature is None:
            self._signature = self.__signature__
        arguments = self._signature.bind(*args, **kwargs).arguments
        if self._used_other and self._others and self._others[0]._still_is_for(arguments):
            return self._replanned(arguments, args, kwargs)
        self._used_other = False
        if self.on_shape_change != "error":  # nothing is captured for another call
            different = self._another_call(arguments)
            if different is not None:
                return self._otherwise(mismatch(different), arguments, args, kwargs)
        try:
            prepared = self._current()
        except (PlanMismatchError, CaptureError) as error:
            different = self._another_call(arguments)
            if different is not None:
                different += hint_at(different)
                error = type(error)(f"{error}. This call differs, too: {different}")
            return self._otherwise(error, arguments, args, kwargs)
        different = prepared.guard.difference(arguments)
        if different is not None:
            return self._otherwise(mismatch(different), arguments, args, kwargs)
        self.tally.num_planned += 1
        self._say_gradients_held()
        self._say_buckets()
        if prepared.guard.replaced_bytes:
            self._say_held(
                "parameters replaced",
                prepared.guard.replaced_bytes,
                "parameters are still in memory that others took the place of",
                "Let go of them, or plan with a budget that is lower by these bytes",
            )
        try:
            return prepared.step(arguments)
        except OutcomeChangedError as error:
            changed = error.with_traceback(None)  # which holds what was computed so far
        self.tally.num_planned -= 1
        return self._otherwise(changed, arguments, args, kwargs)

    @property
    def constants(self) -> list[torch.Tensor]:
        """Tensors that do not belong to the model and that its planned steps hold."""
        return [t for p in self._prepared for t in p.captured.step.constants.values()]

    def _another_call(self, arguments: Mapping[str, Any]) -> str | None:
        """Describe how a call differs from the planned one, whatever the model's structure now."""
        if self._prepared:
            return self._prepared[0].guard.another_call(arguments)
        if self._signature is None:
            self._signature = self.__signature__
        defaults = described_defaults(self._signature)
        found = difference(
            {**defaults, **self.plan.guard.arguments}, describe({**defaults, **arguments})
        )
        return found

    def _otherwise(
        self, error: Exception, arguments: Mapping[str, Any], args: tuple, kwargs: dict
    ) -> Any:
        """Handle a call that differs from the planned one, by the requested policy."""
        self.tally.last_mismatch = str(error)
        if self.on_shape_change == "unplanned":
            return self._by_own_forward(str(error), args, kwargs)
        if self.on_shape_change == "replan":
            return self._replanned(arguments, args, kwargs)
        raise error

    def _by_own_forward(self, why: str, args: tuple, kwargs: dict) -> Any:
        self.tally.num_unplanned += 1
        self.tally.last_mismatch = why
        self.tally.say(
            "unplanned",
            f"a training step of a planned {type(self.model).__name__} is not run by its plan, and "
            f"its budget of {format_bytes(self.plan.budget_bytes)} is not kept: {why}",
        )
        return self.unplanned(*args, **kwargs)

    def watch_backward(self, captured: CapturedStep) -> None:
        """From now on, notice training steps that bypass this forward."""
        self.watching = True
        self._watch = UnplannedBackward.of(self, captured)

    def stop(self) -> None:
        """Run the model's own forward from now on, for callers that still hold this."""
        self.removed = True
        if self._watch is not None:
            self._watch.stop()

    def renew(
        self,
        plan: PlanRecord,
        live: LiveState | None,
        captured: CapturedStep,
        on_shape_change: str,
        replan: Replan,
    ) -> None:
        """Continue with another plan, in place of this one."""
        self.stop()
        self._start(plan, live, captured, on_shape_change, replan)

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Make the graphs if necessary, and check that a call is the planned one.

        Raises
        ------
        CallMismatchError
            The message names the first difference.
        """
        different = self._current().guard.difference(arguments)
        if different is not None:
            raise mismatch(different)

    # -- the step of the model as it is now ----------------------------------------

    def _current(self) -> Prepared:
        """Return the step of the model's current structure, captured again if necessary.

        Raises
        ------
        PlanMismatchError, CaptureError
            When the model is no longer the one that was planned.
        """
        if self._prepared and self._prepared[0].changed() is None:
            return self._prepared[0]
        with self._lock:  # several threads may call a module for the first time
            for prepared in self._prepared:
                if prepared.changed() is None:
                    break
            else:
                prepared = self._prepare()
            self._prepared = [prepared, *(p for p in self._prepared if p is not prepared)]
            del self._prepared[MAX_VARIANTS:]
            return prepared

    def _prepare(self) -> Prepared:
        changed = self._prepared[0].changed() if self._prepared else None
        at_hand, self._at_hand = self._at_hand, None
        captured = None
        if at_hand is not None:
            changed = at_hand[1].difference() or at_hand[0].step.reads.difference()
            captured = at_hand[0] if changed is None else None
        if captured is None:
            known = None if changed is None else self._not_planned.get(changed)
            if known is not None and (self.on_shape_change != "error" or self._main is not None):
                raise PlanMismatchError(known)  # a capture in each step would be slow
            try:
                captured = capture_for(self.plan, self._live, self.model, self.unplanned)
                self.plan, self._live = as_captured(self.plan, self._live, captured)
            except PlanMismatchError as error:
                if changed is None:
                    raise
                words = f"{changed}; {error}"
                if len(self._not_planned) < _NUM_REMEMBERED:
                    self._not_planned[changed] = words
                raise PlanMismatchError(words) from error
            if changed is not None:
                self._say_captured_again(changed)
        graphs = rewrite(captured, self.plan.schedule)
        if self.watching and self._watch is None:
            self._watch = UnplannedBackward.of(self, captured)
        structure = LiveStructure(self.model)
        guard = LiveGuard(self.plan.guard, self.model, self.plan.device_type, self.__signature__)

        def changed_now() -> str | None:
            return (
                structure.difference() or captured.step.reads.difference() or guard.difference_now()
            )

        return Prepared(
            captured=captured,
            step=PlannedStep(
                self.model,
                captured,
                graphs,
                self.plan,
                forward=self.unplanned,
                changed=changed_now,
                tally=self.tally,
            ),
            structure=structure,
            guard=guard,
        )

    def _say_captured_again(self, changed: str) -> None:
        self._num_captures += 1
        if self._num_captures == _MANY_CAPTURES:
            self.tally.say(
                "captured often",
                f"the step of a planned {type(self.model).__name__} was captured again "
                f"{_MANY_CAPTURES} times because the model changed ({changed}), which takes the "
                "time of a capture each; a number that changes often is better kept in a buffer",
            )

    def _replanned(self, arguments: Mapping[str, Any], args: tuple, kwargs: dict) -> Any:
        for other in tuple(self._others):
            if not other._is_for(arguments):
                continue
            with suppress(OutcomeChangedError):  # for such a call, but on another way
                output = other(*args, **kwargs)
                self._others = [other, *(o for o in self._others if o is not other)]
                self._used_other = True
                return output
        kind = f"{describe(arguments)}, {self._changed() or ''}"
        if kind in self._not_replanned:
            raise _anew(self._not_replanned[kind])  # a capture in each step would be slow
        assert self._replan is not None  # with "replan" it was handed in
        try:
            plan, live = self._replan(self.plan, self._live, self.model, arguments, self.unplanned)
        except (CaptureError, PlanError) as error:
            cause = error.__cause__
            if isinstance(error, CaptureError) and not isinstance(cause, (CaptureError, NoneType)):
                self.unplanned(*args, **kwargs)  # an assertion fails: raise as eager does
            if len(self._not_replanned) < _NUM_REMEMBERED:
                self._not_replanned[kind] = _anew(error)
            raise
        other = PlannedForward(self.model, plan, live, live.captured)
        other.own_forward, other.tally, other._main = self.own_forward, self.tally, self
        self._others = [other, *self._others][:MAX_REPLANS]
        self._used_other = True
        return other(*args, **kwargs)

    def _changed(self) -> str | None:
        """Describe how the model has changed since the plan that ran last."""
        return self._prepared[0].changed() if self._prepared else None

    def _still_is_for(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the step that ran last is valid for a call; captures nothing."""
        prepared = self._prepared[0] if self._prepared else None
        return (
            prepared is not None
            and prepared.changed() is None
            and prepared.guard.difference(arguments) is None
        )

    def _is_for(self, arguments: Mapping[str, Any]) -> bool:
        if self._another_call(arguments) is not None:
            return False
        try:
            return self._current().guard.difference(arguments) is None
        except (PlanMismatchError, CaptureError):
            return False

    # -- what is said once ----------------------------------------------------------

    def _say_gradients_held(self) -> None:
        """Warn about gradients of an earlier step that still exist when a forward pass begins."""
        main = self if self._main is None else self._main
        if main._watch is None:
            return
        if not main._watch.is_in_place():
            main._watch.stop()
            main._watch = UnplannedBackward.of(main, self._prepared[0].captured)
        watched = None if main._watch is None else main._watch.parameter()
        if watched is None or watched.grad is None:
            return
        held = sum(
            p.grad.untyped_storage().nbytes() for p in self.model.parameters() if p.grad is not None
        )
        self._say_held(
            "gradients held",
            held,
            "gradients are there when a planned step begins",
            "Call zero_grad(set_to_none=True) before forward, or plan with a budget that is lower "
            "by these bytes",
        )

    def _say_buckets(self) -> None:
        """Warn that ``DistributedDataParallel`` accumulates gradients in its own memory."""
        wrapper = active_data_parallel()
        if wrapper is None or self._buckets_said:
            return
        self._buckets_said = True
        self._say_held(
            "buckets",
            sum(p.numel() * p.element_size() for p in bucketed_parameters_of(wrapper)),
            "gradients lie in the buckets of a DistributedDataParallel",
            "Plan with a budget that is lower by these bytes",
        )

    def _say_held(self, kind: str, held_bytes: int, what: str, advice: str) -> None:
        peak = self.plan.predicted_peak_bytes + held_bytes
        if peak > self.plan.budget_bytes:
            self.tally.say(
                kind,
                f"{format_bytes(held_bytes)} of {what}, which the plan does not count: its peak "
                f"may be {format_bytes(peak)}, the budget is "
                f"{format_bytes(self.plan.budget_bytes)}. {advice}",
            )

    # -- copies -----------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> PlannedForward:
        model = copy.deepcopy(self.model, memo)
        twin = PlannedForward(
            model, self.plan, self._live, None, self.on_shape_change, self._replan
        )
        twin.own_forward = copy.deepcopy(self.own_forward, memo)
        twin.watching, twin.removed = self.watching, self.removed
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle keeps; the graphs are made again on the first call."""
        made = {"_prepared", "_others", "_signature", "_watch", "_lock", "_train", "_at_hand"}
        made |= {"_used_other", "_not_planned", "_not_replanned", "_main", "_buckets_said", "_live"}
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._at_hand = self._live = None
        self._begin()


def _anew(error: Exception) -> Exception:
    """Return the same error without its causes, whose frames hold tensors."""
    twin = type(error).__new__(type(error), *error.args)
    twin.__dict__.update(error.__dict__)
    return twin
