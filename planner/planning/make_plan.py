"""Solve a captured step and make the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from graph_capture.calls.argument_memory import argument_bytes, beside_slices
from graph_capture.calls.call_spec import describe, specs_of, tensors_of
from graph_capture.captured_step import CapturedStep
from graph_capture.cost_graph import CostGraph
from graph_capture.costs.devices import DEVICES, Device
from graph_capture.costs.target import target_of
from graph_capture.folding.leaving import CONSUME
from graph_capture.loop.loss import LossFn, LossSource
from graph_capture.loop.optimizer_step import OptimizerStep
from graph_capture.policies import apply_policies
from graph_capture.step_capture import capture_step
from solvers.concurrent_calls import SEARCHES_FOR_LEAST, Calls
from solvers.least_memory import LeastMemory
from solvers.replay import replay
from solvers.result import SolveResult
from solvers.schedule import Schedule

from ..base.budget import (
    Budget,
    RequestedBudget,
    nothing_fits,
    parse_headroom,
)
from ..base.call_guard import CallGuard
from ..base.live_state import LiveState
from ..base.module_structure import Structure
from ..base.progress import (
    showing,
    showing_timing,
)
from ..base.request import Request
from ..base.solve_options import SolveOptions
from ..errors import PlanError
from ..plan_record import PlanRecord
from .captured_call import CapturedCall
from .concurrent import (
    calls_of,
    solve_for_calls,
    with_waiting,
    within_waiting,
)
from .known_least import LEAST_MEMORY_LIMIT_S, fits_easily, known_least_memory
from .late_reads import LateRead, solve_in_time
from .search import search, search_from_easy


def make_plan(
    call: CapturedCall, request: Request, hint: Schedule | None = None
) -> tuple[PlanRecord, LiveState]:
    """Solve a captured step under the user's rules, and record the decision.

    Parameters
    ----------
    hint
        A schedule that is known to fit, as a start.

    Raises
    ------
    InfeasibleBudgetError
        When no schedule fits.
    """
    constrained = apply_policies(call.captured, request.never_recompute, request.always_recompute)
    budget = budget_of(request, constrained)
    calls = calls_of(constrained)
    if calls is not None and not constrained.holds.waiting_bytes:
        result, late = solve_in_time(
            constrained, lambda step: _solve_together(step, calls, budget, request)
        )
        _refuse_late(late)
        assert result.schedule is not None
        constrained = with_waiting(constrained, calls, result.schedule)
        return recorded(call, constrained, request, result)

    def solved(step: CapturedStep) -> SolveResult:
        graph = within_waiting(step, budget.usable_bytes)
        known = hint if step is constrained else None  # which may repeat what is to run once
        return _solve(graph, budget, request, known)

    result, late = solve_in_time(constrained, solved)
    if late is not None and request.options.reorder:
        request = replace(request, options=replace(request.options, reorder=False))
        result, late = solve_in_time(constrained, solved)
    _refuse_late(late)
    return recorded(call, constrained, request, result)


def _refuse_late(late: LateRead | None) -> None:
    if late is not None:
        raise PlanError(
            f"in the schedule that was found {late} after the parameter's gradient was added to "
            "earlier ones or consumed, which would hold the gradient longer than planned: solve "
            "with another seed or more time"
        )


def budget_of(request: Request, captured: CapturedStep) -> Budget:
    """Return the requested budget and its headroom on the step's device."""
    return parse_headroom(request.headroom, request.budget_bytes, captured.target.torch_type)


def recorded(
    call: CapturedCall, constrained: CapturedStep, request: Request, result: SolveResult
) -> tuple[PlanRecord, LiveState]:
    """Record the decision for a captured step.

    Parameters
    ----------
    constrained
        The step under the user's rules.
    result
        Must have a schedule.
    """
    model, captured = call.model, constrained
    assert result.schedule is not None
    assert captured.costs is not None
    assert captured.unplanned is not None
    baseline = replay(captured.unplanned, Schedule.keep_all(captured.unplanned))
    step, optimizer = captured.step, captured.optimizer
    record = PlanRecord(
        graph=constrained.graph,
        schedule=result.schedule,
        guard=CallGuard.of(
            model,
            call.arguments,
            captured.device_type,
            captured.target.place,
            argument_bytes=call.argument_bytes,
        ),
        budget_bytes=request.budget_bytes,
        budget_share=request.budget.share,
        headroom_bytes=budget_of(request, captured).headroom_bytes,
        baseline_peak_bytes=baseline.peak_bytes,
        baseline_step_us=baseline.cost_ns / 1e3,
        lower_bound_us=result.lower_bound_ns / 1e3,
        bound_scope=result.bound_scope,
        status=result.status,
        solver=result.solver,
        solve_s=result.solve_s,
        seed=request.options.seed,
        log=result.log,
        optimizer=None if optimizer is None else _priced(optimizer, constrained.graph),
        loss=step.loss_spec,
        never_recompute=request.never_recompute,
        always_recompute=request.always_recompute,
        reorder=request.options.reorder,
        detached=tuple(dict.fromkeys(step.template.names[i] for i in step.detached)),
        device_type=captured.device_type,
        costs=captured.costs,
        device_name=_table_name(request.device),
        branch_free=step.branch_free,
        outcomes=step.outcomes,
        holds=captured.holds,
        torch_version=torch.__version__,
        shapes=call.shapes,
    )
    structure = Structure.of(model)
    live = LiveState(captured=constrained, structure=structure, request=request.for_other_calls)
    return record, live


def request_again(plan: PlanRecord) -> Request:
    """Return the request of a plan from a file, as far as the file says; without its ``loss_fn``.

    Raises
    ------
    PlanError
        When its times come from the user's own function, which no file stores.
    """
    if plan.costs.model not in ("roofline", "profile"):
        raise PlanError(
            f"the times of this plan from a file come from {plan.costs.model!r}, which is not in "
            "the file: call optimize() or max_batch() with cost_model="
        )
    return Request(
        budget=RequestedBudget(num_bytes=plan.budget_bytes),
        never_recompute=plan.never_recompute,
        always_recompute=plan.always_recompute,
        options=SolveOptions(seed=plan.seed, reorder=plan.reorder),
        device=plan.device_name,
        cost_model=plan.costs.model,
        headroom=f"{plan.headroom_bytes}B" if plan.headroom_bytes else 0,
    )


def _table_name(device: str | Device | None) -> str | None:
    """Return the name by which another process finds the requested device."""
    name = device.name if isinstance(device, Device) else device
    if name is None or name not in DEVICES:
        return None  # "cuda", too: the card at hand
    return name if device in (name, DEVICES[name]) else None


def _priced(optimizer: OptimizerStep, graph: CostGraph) -> OptimizerStep:
    """Return an optimizer without its calls, with their estimated time."""
    step_ns = sum(
        op.cost_ns for op in graph.operators if op.phase == "optimizer" or op.target == CONSUME
    )
    return replace(optimizer, calls=(), for_parameter={}, step_ns=step_ns)


def replan(
    plan: PlanRecord,
    live: LiveState | None,
    model: nn.Module,
    arguments: Mapping[str, Any],
    forward: Callable[..., Any],
    *,
    loss_fn: LossFn | None = None,
) -> tuple[PlanRecord, LiveState]:
    """Make a plan with the same budget and rules for another call.

    Parameters
    ----------
    loss_fn
        Replaces the requested one, which no file holds.

    Raises
    ------
    PlanError
        When the plan came from a file and needs a ``loss_fn`` that was not given.
    """
    return make_plan(*another_call(plan, live, model, arguments, forward, loss_fn))


def another_call(
    plan: PlanRecord,
    live: LiveState | None,
    model: nn.Module,
    arguments: Mapping[str, Any],
    forward: Callable[..., Any],
    loss_fn: LossFn | None,
) -> tuple[CapturedCall, Request]:
    """Capture another call of a planned model; see :func:`replan`."""
    request = None if live is None else live.request
    if request is None:
        if plan.loss.region.source is LossSource.LOSS_FN and loss_fn is None:
            raise PlanError(
                "a plan from a file cannot be made again for another shape: its loss_fn is not in "
                "the file; call apply(model, loss_fn=...) or optimize() with it"
            )
        request = request_again(plan)
    if loss_fn is not None:
        request = replace(request, loss_fn=loss_fn)
    held = beside_slices(
        plan.guard.argument_bytes,
        [spec.extent_bytes for spec in specs_of(plan.guard.arguments)],
        argument_bytes(model, arguments),
        [spec.extent_bytes for spec in specs_of(describe(arguments))],
    )
    with showing_timing(request.progress) as timing:
        captured = capture_step(
            model,
            arguments,
            loss=request.loss_fn,
            optimizer=plan.optimizer if live is None else live.captured.optimizer,
            forward=forward,
            target=target_of(model, tensors_of(arguments), request.device),
            cost_model=request.cost_model,
            progress=timing,
            holds=plan.holds,
            argument_bytes=held,
        )
    call = CapturedCall(model=model, arguments=arguments, captured=captured, argument_bytes=held)
    return call, request


def _solve(
    graph: CostGraph,
    budget: Budget,
    request: Request,
    hint: Schedule | None,
) -> SolveResult:
    budget_bytes, options = budget.usable_bytes, request.options

    def least() -> LeastMemory:
        """Return the least memory in eager's order where that fits, else in every allowed order."""
        found = known_least_memory(graph, options.seed)
        if options.reorder and found.peak_bytes > budget_bytes:
            return known_least_memory(graph, options.seed, any_order=True)
        return found

    if hint is None and options.solver == "auto" and not fits_easily(graph, budget_bytes):
        fitting = least()
        if fitting.peak_bytes > budget_bytes:
            raise nothing_fits(graph, budget, fitting)
        hint = fitting.schedule
    with showing(request.progress) as progress:
        result = search(graph, budget_bytes, options, hint=hint, progress=progress)
    if result.schedule is None and hint is None and options.solver == "auto":
        result = search_from_easy(graph, budget_bytes, options)
    if result.schedule is not None:
        return result
    raise _no_schedule(graph, budget, least(), options)


def _solve_together(
    captured: CapturedStep, calls: Calls, budget: Budget, request: Request
) -> SolveResult:
    """Solve for several calls that are alive at once."""
    options = request.options
    with showing(request.progress) as progress:

        def search_for_calls(
            graph: CostGraph, budget_bytes: int, *, time_limit_s: float, hint: Schedule | None
        ) -> SolveResult:
            limited = replace(options, time_limit_s=time_limit_s, reorder=False)
            return search(graph, budget_bytes, limited, hint=hint, progress=progress)

        result, fitting = solve_for_calls(
            captured,
            calls,
            budget.usable_bytes,
            search_for_calls,
            time_limit_s=options.time_limit_s,
            gap=options.gap,
            least=lambda graph: known_least_memory(
                graph, options.seed, time_limit_s=LEAST_MEMORY_LIMIT_S / SEARCHES_FOR_LEAST
            ),
        )
    if result.schedule is not None:
        return result
    assert fitting is not None
    raise _no_schedule(
        with_waiting(captured, calls, fitting.schedule).graph, budget, fitting, options
    )


def _no_schedule(
    graph: CostGraph, budget: Budget, least: LeastMemory, options: SolveOptions
) -> PlanError:
    """Build the error for a search without a result, whether or not a schedule exists."""
    if least.peak_bytes > budget.usable_bytes:
        return nothing_fits(graph, budget, least)
    return PlanError(
        f"solver {options.solver!r} found no schedule within {options.time_limit_s} s, though one "
        f"for {least.peak_bytes} bytes exists; use solver='auto' or more time"
    )
