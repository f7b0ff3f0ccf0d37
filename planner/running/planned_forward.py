"""The replacement for a module's forward while a plan is applied."""

from __future__ import annotations

import copy
import gc
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from types import NoneType
from typing import Any, Protocol

import torch
from torch import nn

from graph_capture.calls.call_spec import describe, specs_of
from graph_capture.capture_lock import CAPTURE_LOCK
from graph_capture.captured_step import CapturedStep
from graph_capture.errors import CaptureError
from graph_capture.loop.loss import LossFn
from graph_capture.private_torch.modules import active_data_parallel
from graph_capture.units import format_bytes, format_us
from solvers import transfer

from ..base.call_guard import autocast_dtype
from ..base.forward_slot import StandIn
from ..base.live_state import LiveState
from ..base.module_structure import LiveStructure
from ..errors import (
    CallMismatchError,
    InfeasibleBudgetError,
    OutcomeChangedError,
    PlanError,
    PlanMismatchError,
)
from ..plan_record import OnShapeChange, PlanRecord
from .another_call import (
    another_way,
    hint_at,
    in_block,
    mismatch,
)
from .compiled_calls import CompiledCalls, PlanCompiler
from .live_guard import looks_of
from .planned_call import PlannedCall
from .surroundings import foreign_surroundings
from .tally import Tally
from .uncounted_memory import say_buckets, say_gradients, say_kept
from .unplanned_backward import UnplannedBackward

MAX_CALLS = 64
"""Plans made in the loop for other calls that are kept, the ones used last."""

_NUM_REMEMBERED = 64


class Look(Protocol):
    """Looks at a module that is about to run by its plan."""

    def __call__(self, model: nn.Module, /, *, again: bool) -> bool:
        """Return whether to look again."""
        ...


class Replan(Protocol):
    """Makes another plan for another call of a planned model."""

    def __call__(
        self,
        plan: PlanRecord,
        live: LiveState | None,
        model: nn.Module,
        arguments: Mapping[str, Any],
        forward: Callable[..., Any],
        *,
        loss_fn: LossFn | None = None,
    ) -> tuple[PlanRecord, LiveState]:
        """Return the plan, and what is known besides it."""


class PlannedForward(StandIn):
    """Replaces a module's ``forward`` while a plan is applied.

    Copying the module copies this, bound to the copy.

    Parameters
    ----------
    plan, live
        The plan, and what this process knows besides it.
    captured
        The step of the module as it is now, where that is known.
    on_shape_change
        See :meth:`planner.Plan.apply`.
    replans
        Makers of plans for other calls, by the policy that uses them.
    compiler
        Compiles what it can of each plan's graphs; without one all calls are eager.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: PlanRecord,
        live: LiveState | None,
        captured: CapturedStep | None,
        on_shape_change: OnShapeChange = "error",
        replans: Mapping[str, Replan] | None = None,
        compiler: PlanCompiler | None = None,
    ) -> None:
        super().__init__(model)
        self._start(plan, live, captured, on_shape_change, replans or {}, compiler)

    def _start(
        self,
        plan: PlanRecord,
        live: LiveState | None,
        captured: CapturedStep | None,
        on_shape_change: OnShapeChange,
        replans: Mapping[str, Replan],
        compiler: PlanCompiler | None,
    ) -> None:
        self.on_shape_change = on_shape_change
        self._replans = replans
        self.compiler = compiler
        self.removed = False
        self.suspended = self.unwatched = 0
        self.watching = False
        self.tally = Tally()
        self._ahead: list[PlanRecord] = []  # made for other calls before the loop began
        self.block: str | None = None
        self.look: Look | None = None
        self.looked = False
        self._begin(plan, live, captured)

    def _begin(
        self, plan: PlanRecord, live: LiveState | None, captured: CapturedStep | None
    ) -> None:
        """Set what neither a copy nor a pickle includes."""
        # With another policy a capture in each step would only be slow.
        in_vain = self.on_shape_change == "error"
        self._main = PlannedCall(self, plan, live, captured, recaptures_in_vain=in_vain)
        self._others: list[PlannedCall] = []  # the one used last comes first
        self._last = self._main
        self._not_replanned: dict[str, Exception] = {}  # calls that were captured in vain
        self._structure: LiveStructure | None = None
        self._buckets_said = False
        self._signature: inspect.Signature | None = None
        self._watch: UnplannedBackward | None = None
        self._watch_is_due = self.watching  # in a copy or from a pickle, with the first call
        self._train = torch.compiler.disable(self._call)  # torch.compile: one opaque call

    @property
    def plan(self) -> PlanRecord:
        """The plan that was applied."""
        return self._main.plan

    def structure_now(self) -> LiveStructure:
        """The model's structure as it is, one object for all calls until it changes."""
        if self._structure is None or self._structure.difference() is not None:
            self._structure = LiveStructure(self.model)
            for call in self.calls:
                call.let_go()
        return self._structure

    @property
    def other_plans(self) -> tuple[PlanRecord, ...]:
        """Plans for other calls that are kept, the one used last first."""
        return tuple(call.plan for call in self._others)

    @property
    def compiled(self) -> CompiledCalls | None:
        """What of the step that ran last is compiled."""
        return self._last.prepared[0].step.compiled if self._last.prepared else None

    @property
    def calls(self) -> Iterator[PlannedCall]:
        """The planned call and the others that plans are kept for, the one used last first."""
        yield self._last
        yield from (c for c in (self._main, *self._others) if c is not self._last)

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
            self.tally.last_mismatch = "the loop made this call under planner.unplanned()"
            return self.unplanned(*args, **kwargs)
        with CAPTURE_LOCK:  # another thread's capture puts stand-ins into the module
            return self._in_turn(args, kwargs)

    def _in_turn(self, args: tuple, kwargs: dict) -> Any:
        foreign = foreign_surroundings()
        if foreign is not None:
            return self._by_own_forward(foreign, args, kwargs)
        if self._signature is None:
            self._signature = self.__signature__
        arguments = self._signature.bind(*args, **kwargs).arguments
        looks = looks_of(arguments)
        if self._others:
            for call in self.calls:
                known = call.knows(looks) if looks is not None else call is self._last
                if known and call.still_is_for(arguments, looks):
                    try:
                        return self._run(call, arguments)
                    except OutcomeChangedError:  # for such a call, but on another way
                        continue
        main = self._main
        if self.on_shape_change != "error":  # nothing is captured for another call
            different = main.another_call(arguments, looks)
            if different is not None:
                return self._otherwise(self._mismatch(different), arguments, looks, args, kwargs)
        try:
            guard = main.current().guard
        except (PlanMismatchError, CaptureError) as error:
            different = main.another_call(arguments, looks)
            if different is not None:
                different += hint_at(different)
                error = type(error)(f"{error}. This call differs, too: {different}")
            return self._otherwise(error, arguments, looks, args, kwargs)
        different = guard.difference(arguments, looks)
        if different is not None:
            return self._otherwise(self._mismatch(different), arguments, looks, args, kwargs)
        try:
            return self._run(main, arguments)
        except OutcomeChangedError as error:
            changed = error.with_traceback(None)  # which holds what was computed so far
        return self._otherwise(changed, arguments, looks, args, kwargs)

    def _run(self, call: PlannedCall, arguments: Mapping[str, Any]) -> Any:
        """Run a planned step that is known to be for this call.

        Raises
        ------
        OutcomeChangedError
            When a value decides a branch or a size otherwise than planned.
        """
        prepared = call.prepared[0]
        self._say_uncounted(call)
        if self.look is not None:
            looks_again = self.look(self.model, again=self.looked)
            self.look, self.looked = self.look if looks_again else None, True
        say_kept(self.tally, call)
        output = prepared.step(arguments)
        self.tally.ran(call.peak_bytes)
        if call is not self._last:
            self._use(call)
        return output

    def _use(self, call: PlannedCall) -> None:
        """Note the call that ran last."""
        self._last = call
        if call is not self._main:
            self._others = _kept([call, *(c for c in self._others if c is not call)])

    def _otherwise(
        self, error: Exception, arguments: Mapping[str, Any], looks: Any, args: tuple, kwargs: dict
    ) -> Any:
        """Handle a call that differs from the planned one: by its own plan, or by the policy."""
        for call in self._others:
            if call.is_for(arguments, looks):
                try:
                    return self._run(call, arguments)
                except OutcomeChangedError as changed:
                    error = changed.with_traceback(None)
        if isinstance(error, OutcomeChangedError):
            error = another_way(error, inside=self.block is not None)
        if self.block is not None:
            error = in_block(self.block, error)
        self.tally.last_mismatch = str(error)
        # Another way through the model is not another shape, nor is a model that has changed.
        within = type(error) is CallMismatchError and self._main.covers(arguments)
        policy = "adapt" if within else self.on_shape_change
        if policy == "unplanned":
            return self._by_own_forward(str(error), args, kwargs)
        if policy not in self._replans:
            raise error
        return self._by_another_plan(self._replans[policy], arguments, looks, args, kwargs)

    def _mismatch(self, different: str) -> CallMismatchError:
        return mismatch(different, inside=self.block is not None)

    def _by_another_plan(
        self, make: Replan, arguments: Mapping[str, Any], looks: Any, args: tuple, kwargs: dict
    ) -> Any:
        autocast = autocast_dtype(self.plan.device_type)
        kind = f"{describe(arguments)}, {autocast}, {self._last.changed() or ''}"
        if kind in self._not_replanned:
            raise _anew(self._not_replanned[kind])  # a capture in each step would be slow
        began = time.perf_counter()
        try:
            plan, live = make(self.plan, self._main.live, self.model, arguments, self.unplanned)
        except (CaptureError, PlanError) as error:
            if isinstance(error, InfeasibleBudgetError):
                error.add_note(self._about_this_call(arguments))
            cause = error.__cause__
            if isinstance(error, CaptureError) and not isinstance(cause, (CaptureError, NoneType)):
                self.unplanned(*args, **kwargs)  # an assertion fails: raise as eager does
            if len(self._not_replanned) < _NUM_REMEMBERED:
                self._not_replanned[kind] = _anew(error)
            raise
        gc.collect()  # cycles of what was captured hold copies of the call's tensors
        taken_s = time.perf_counter() - began
        self.tally.captured(taken_s)
        if make is self._replans["adapt"]:
            self._say_solved(plan, taken_s)
        call = PlannedCall(self, plan, live, live.captured)
        self._use(call)
        different = call.current().guard.difference(arguments, looks)
        if different is not None:
            raise self._mismatch(different)
        return self._run(call, arguments)

    @property
    def constants(self) -> list[torch.Tensor]:
        """Tensors that do not belong to the model and that its planned steps hold."""
        return [
            t for c in self.calls for p in c.prepared for t in p.captured.step.constants.values()
        ]

    def _about_this_call(self, arguments: Mapping[str, Any]) -> str:
        """Say which call has no plan, and where its budget comes from."""
        plan = self.plan

        def tensors(call: Any) -> str:
            return ", ".join(map(str, specs_of(call)[:3]))

        share = "" if plan.budget_share is None else f", {plan.budget_share:.0%} of its peak"
        return (
            f"The call: {tensors(describe(arguments))}. The budget is that of the first plan, for "
            f"{tensors(plan.guard.arguments)}{share}: begin with the largest call, or raise it"
        )

    def _by_own_forward(self, why: str, args: tuple, kwargs: dict) -> Any:
        self.tally.num_unplanned += 1
        self.tally.last_mismatch = why
        self.tally.say(
            "unplanned",
            f"a training step of a planned {type(self.model).__name__} is not run by its plan, and "
            f"its budget of {format_bytes(self.plan.budget_bytes)} is not kept: {why}",
        )
        with CAPTURE_LOCK.resting():  # it may wait for others: for a collective, for workers
            return self.unplanned(*args, **kwargs)

    def watch_backward(self, captured: CapturedStep) -> None:
        """From now on, notice training steps that bypass this forward."""
        self.watching, self._watch_is_due = True, False
        self._watch = UnplannedBackward.of(self, captured)

    def add(self, plan: PlanRecord, live: LiveState | None, captured: CapturedStep | None) -> None:
        """Keep a plan for another call, made ahead."""
        self._ahead.append(plan)
        self._others.append(PlannedCall(self, plan, live, captured, made_ahead=True))

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
        on_shape_change: OnShapeChange,
        replans: Mapping[str, Replan],
        compiler: PlanCompiler | None = None,
    ) -> None:
        """Continue with another plan, in place of this one."""
        self.stop()
        self._start(plan, live, captured, on_shape_change, replans, compiler)

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Make the graphs if necessary, and check that a call is the planned one.

        Raises
        ------
        CallMismatchError
            The message names the first difference.
        """
        different = self._main.current().guard.difference(arguments, looks_of(arguments))
        if different is not None:
            raise mismatch(different)

    # -- what is said once ----------------------------------------------------------

    def _say_uncounted(self, call: PlannedCall) -> None:
        """Warn about memory beside a planned step that its plan does not count."""
        parameter = self._watched_parameter(call)
        if parameter is not None and parameter.grad is not None and not self.plan.holds.hands_on:
            say_gradients(self.tally, call, self.model)  # others are counted, or were spoken of
        wrapper = active_data_parallel()
        if wrapper is not None and not self._buckets_said and self.block is None:
            self._buckets_said = True  # of a block whoever looks at the loop says it
            say_buckets(self.tally, call, wrapper)

    def _watched_parameter(self, call: PlannedCall) -> torch.Tensor | None:
        """The parameter by which backward passes are noticed, watched anew if it was replaced."""
        captured = call.prepared[0].captured
        if self._watch_is_due:
            self._watch = UnplannedBackward.of(self, captured)
            self._watch_is_due = False
        if self._watch is not None and not self._watch.is_in_place():
            self._watch.stop()
            self._watch = UnplannedBackward.of(self, captured)
        return None if self._watch is None else self._watch.parameter()

    def _say_solved(self, plan: PlanRecord, taken_s: float) -> None:
        """Say that a training loop has waited for a solver, and for how long."""
        if plan.solver not in transfer.NAMES:
            self.tally.say(
                "solved in the loop",
                f"a call of a planned {type(self.model).__name__} could not take over the schedule "
                f"of its plan within {format_bytes(plan.budget_bytes)} and was solved anew, which "
                f"took {format_us(taken_s * 1e6)}: plan with the largest sample of the loop, or "
                "make its plan ahead with plan.for_call()",
            )

    # -- copies -----------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> PlannedForward:
        model = copy.deepcopy(self.model, memo)
        main = self._main
        twin = PlannedForward(
            model, main.plan, main.live, None, self.on_shape_change, self._replans, self.compiler
        )
        twin.own_forward = copy.deepcopy(self.own_forward, memo)
        twin.watching = twin._watch_is_due = self.watching
        twin.removed, twin.block = self.removed, self.block
        twin.look, twin.looked = copy.deepcopy(self.look, memo), self.looked
        for plan in self._ahead:
            twin.add(plan, None, None)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle keeps; the graphs are made again on the first call."""
        made = {"_main", "_others", "_last", "_signature", "_watch", "_train", "_watch_is_due"}
        made |= {"_structure", "_not_replanned", "_buckets_said"}
        kept = {name: value for name, value in self.__dict__.items() if name not in made}
        return {**kept, "plan": self.plan}

    def __setstate__(self, state: dict[str, Any]) -> None:
        plan, ahead = state.pop("plan"), state.pop("_ahead")
        self.__dict__.update({"compiler": None, **state})
        self._ahead = []
        self._begin(plan, None, None)
        for other in ahead:
            self.add(other, None, None)


def _kept(calls: list[PlannedCall]) -> list[PlannedCall]:
    """Those made ahead, which the policy may not make again, and the first of the others."""
    made = [call for call in calls if not call.made_ahead]
    dropped = set(map(id, made[MAX_CALLS:]))
    return [call for call in calls if id(call) not in dropped]


def _anew(error: Exception) -> Exception:
    """Return the same error without its causes, whose frames hold tensors."""
    twin = type(error).__new__(type(error), *error.args)
    twin.__dict__.update(error.__dict__)
    return twin
