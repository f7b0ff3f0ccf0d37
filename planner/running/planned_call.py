"""One plan on one module: its step's graphs, made again when the module changes."""

from __future__ import annotations

import gc
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from graph_capture.calls.call_spec import describe, difference
from graph_capture.captured_step import CapturedStep
from graph_capture.errors import CaptureError
from graph_capture.reads.process_wide import NUM_THREADS, PROCESS_WIDE

from ..base.call_guard import autocast_dtype
from ..base.live_state import LiveState
from ..base.module_structure import (
    LiveStructure,
    Structure,
)
from ..errors import PlanMismatchError
from ..plan_record import PlanRecord
from .compiled_calls import PlanCompiler, say_little_compiled
from .live_guard import (
    LiveGuard,
    described_defaults,
)
from .not_consumed import say_not_consumed
from .planned_step import PlannedStep
from .recapture import (
    as_captured,
    capture_for,
)
from .rewrite import rewrite
from .step_warnings import say_settings
from .tally import Tally

MAX_VARIANTS = 4
"""Captures of one plan that are kept: a factor that goes back and forth is captured once each."""

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


class Planned(Protocol):
    """The stand-in for a module's forward that a plan belongs to."""

    model: nn.Module
    tally: Tally
    watching: bool
    compiler: PlanCompiler | None

    @property
    def unplanned(self) -> Callable[..., Any]:
        """The module's own forward."""

    def structure_now(self) -> LiveStructure:
        """The module's structure as it is."""

    @property
    def __signature__(self) -> inspect.Signature: ...


class PlannedCall:
    """A plan, and the steps that were captured for it as the module changed.

    Parameters
    ----------
    planned
        The stand-in that calls this.
    plan, live
        The plan, and what this process knows besides it.
    captured
        The step of the module as it is now, where that is known.
    recaptures_in_vain
        Whether a change under which no capture was the plan's is captured again in each
        step; else its error is remembered.
    made_ahead
        Whether the plan was made before the loop began, so that the loop may not be able
        to make it again.
    """

    def __init__(
        self,
        planned: Planned,
        plan: PlanRecord,
        live: LiveState | None,
        captured: CapturedStep | None,
        *,
        recaptures_in_vain: bool = False,
        made_ahead: bool = False,
    ) -> None:
        self.plan = plan
        self.made_ahead = made_ahead
        self.live = live
        self.prepared: list[Prepared] = []  # the one used last comes first
        self._planned = planned
        self._recaptures_in_vain = recaptures_in_vain
        self._at_hand: list[tuple[CapturedStep, Structure]] = []  # bound to no module
        if captured is not None:
            self._at_hand.append((captured, Structure.of(planned.model)))
        self._not_planned: dict[str, str] = {}  # changes that were captured in vain
        self._num_captures = 0
        self._peak_bytes = 0
        self._settings = PROCESS_WIDE.settings
        self._lock = threading.RLock()

    @property
    def peak_bytes(self) -> int:
        """The plan's predicted peak."""
        return self._peak_bytes

    def another_call(self, arguments: Mapping[str, Any], looks: Any) -> str | None:
        """Describe how a call differs from the planned one, whatever the model's structure now."""
        if self.prepared:
            return self.prepared[0].guard.another_call(arguments, looks)
        defaults = described_defaults(self._planned.__signature__)
        return difference(
            {**defaults, **self.plan.guard.arguments}, describe({**defaults, **arguments})
        )

    def covers(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a call is the planned one at a smaller shape that the plan is for, too.

        Under another autocast, or with other training flags, it is another call.
        """
        if self.prepared:
            if self.prepared[0].guard.another_state() is not None:
                return False
        elif autocast_dtype(self.plan.device_type) != self.plan.guard.autocast:
            return False
        defaults = described_defaults(self._planned.__signature__)
        planned = {**defaults, **self.plan.guard.arguments}
        return self.plan.shapes.covers(planned, {**defaults, **describe(arguments)})

    def knows(self, looks: Any) -> bool:
        """Whether such a call was found to be the planned one before."""
        return bool(self.prepared) and self.prepared[0].guard.knows(looks)

    def changed(self) -> str | None:
        """Describe how the model has changed since this ran last."""
        return self.prepared[0].changed() if self.prepared else None

    def still_is_for(self, arguments: Mapping[str, Any], looks: Any) -> bool:
        """Whether the step that ran last is valid for a call; captures nothing."""
        prepared = self.prepared[0] if self.prepared else None
        return (
            prepared is not None
            and prepared.changed() is None
            and prepared.guard.difference(arguments, looks) is None
        )

    def is_for(self, arguments: Mapping[str, Any], looks: Any) -> bool:
        """Whether a call of the model as it is now is the planned one."""
        if self.another_call(arguments, looks) is not None:
            return False
        try:
            return self.current().guard.difference(arguments, looks) is None
        except (PlanMismatchError, CaptureError):
            return False

    def current(self) -> Prepared:
        """Return the step of the model's current structure, captured again if necessary.

        Raises
        ------
        PlanMismatchError, CaptureError
            When the model is no longer the one that was planned.
        """
        if self.prepared and self.prepared[0].changed() is None:
            return self.prepared[0]
        with self._lock:  # several threads may call a module for the first time
            for prepared in self.prepared:
                if prepared.changed() is None:
                    break
            else:
                prepared = self._prepare()
            self.prepared = [prepared, *(p for p in self.prepared if p is not prepared)]
            del self.prepared[MAX_VARIANTS:]
            return prepared

    def let_go(self) -> None:
        """Unbind the steps of another structure, whose modules the loop may have let go of."""
        with self._lock:
            bound: list[Prepared] = []
            unbound: list[tuple[CapturedStep, Structure]] = []
            for p in self.prepared:
                if p.structure.difference() is None:
                    bound.append(p)
                else:
                    unbound.append((p.captured, p.structure.recorded))
            self.prepared = bound
            self._at_hand = [*unbound, *self._at_hand][:MAX_VARIANTS]

    def _prepare(self) -> Prepared:
        model = self._planned.model
        changed = self.changed()
        captured = None
        for i, (unbound, structure) in enumerate(self._at_hand):
            different = structure.difference() or unbound.step.reads.difference()
            if different is None:
                captured = unbound
                del self._at_hand[i]
                break
            changed = changed or different
        if captured is None:
            known = None if changed is None else self._not_planned.get(changed)
            if known is not None and not self._recaptures_in_vain:
                raise PlanMismatchError(known)  # a capture in each step would be slow
            try:
                captured = capture_for(
                    self.plan, self.live, model, self._planned.unplanned, in_loop=True
                )
                gc.collect()  # cycles of what was captured hold memory
            except PlanMismatchError as error:
                if changed is None:
                    raise
                words = f"{changed}; {error}"
                if len(self._not_planned) < _NUM_REMEMBERED:
                    self._not_planned[changed] = words
                raise PlanMismatchError(words) from error
            if changed is not None:
                self._say_captured_again(changed)
                self._say_other_settings()
        self.plan, self.live = as_captured(self.plan, self.live, captured)
        return self._bound(captured)

    def _bound(self, captured: CapturedStep) -> Prepared:
        """Bind a captured step's graphs to the module as it is now."""
        self._peak_bytes = self.plan.predicted_peak_bytes
        self._settings = PROCESS_WIDE.settings
        planned, model = self._planned, self._planned.model
        structure = planned.structure_now()
        guard = LiveGuard(self.plan.guard, model, self.plan.device_type, planned.__signature__)

        def changed_now() -> str | None:
            return (
                structure.difference() or captured.step.reads.difference() or guard.difference_now()
            )

        step = PlannedStep(
            model,
            captured,
            rewrite(captured, self.plan.schedule),
            self.plan,
            forward=planned.unplanned,
            changed=changed_now,
            tally=planned.tally,
            after_backward=self._look_for_gradients if self.plan.holds.consumes else None,
            compiler=planned.compiler,
        )
        if step.compiled is not None:
            say_little_compiled(planned.tally, model, step.compiled)
        return Prepared(captured=captured, step=step, structure=structure, guard=guard)

    def _look_for_gradients(self) -> None:
        if self._planned.watching:  # a trial step collects gradients as it likes
            say_not_consumed(self._planned.model, self.plan, self._planned.tally)

    def _say_other_settings(self) -> None:
        now = PROCESS_WIDE.settings
        changed = {name for name, value in now.items() if value != self._settings[name]}
        if self.plan.device_type != "cpu":
            changed.discard(NUM_THREADS)
        if changed:
            say_settings(self._planned.tally, self._planned.model, changed)

    def _say_captured_again(self, changed: str) -> None:
        self._num_captures += 1
        if self._num_captures == _MANY_CAPTURES:
            self._planned.tally.say(
                "captured often",
                f"the step of a planned {type(self._planned.model).__name__} was captured again "
                f"{_MANY_CAPTURES} times because the model changed ({changed}), which takes the "
                "time of a capture each; a number that changes often is better kept in a buffer",
            )
