"""Plan another call of a planned model from its plan, without solving where that will do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from graph_capture.loop.loss import LossFn
from graph_capture.policies import apply_policies
from solvers.replay import replay
from solvers.result import OPTIMAL_GAP, Ending, SolveResult, SolveStatus, relative_gap
from solvers.schedule import Schedule
from solvers.scopes import BoundScope
from solvers.transfer import KEEP_ALL, TRANSFER, transfer

from ..base.live_state import LiveState
from ..base.request import Request
from ..plan_record import PlanRecord
from .concurrent import within_waiting
from .late_reads import late_read
from .make_plan import another_call, budget_of, make_plan, recorded

IN_LOOP_LIMIT_S = 5.0
IN_LOOP_GAP = 0.01
"""Where a call must be solved while a training loop waits for it."""


def adapt(
    plan: PlanRecord,
    live: LiveState | None,
    model: nn.Module,
    arguments: Mapping[str, Any],
    forward: Callable[..., Any],
    *,
    loss_fn: LossFn | None = None,
) -> tuple[PlanRecord, LiveState]:
    """Make a plan with the same budget and rules for another call.

    The call is captured, which takes about as long as ``optimize`` without its solver. If
    the step fits without recomputation, nothing is recomputed; else the plan's schedule
    is transferred (:mod:`solvers.transfer`). Only where that does not fit, the step is
    solved anew, for at most ``IN_LOOP_LIMIT_S``; near the least memory the search for what
    fits comes before that, see ``planner.planning.known_least``.

    Parameters
    ----------
    loss_fn
        Replaces the requested one, which no file holds.

    Raises
    ------
    InfeasibleBudgetError
        When no schedule of this call fits.
    PlanError
        When the plan came from a file and needs a ``loss_fn`` that was not given.
    """
    call, request = another_call(plan, live, model, arguments, forward, loss_fn)
    constrained = apply_policies(call.captured, request.never_recompute, request.always_recompute)
    graph = constrained.graph
    began = time.perf_counter()
    budget_bytes = budget_of(request, constrained).usable_bytes
    graph_to_fit = within_waiting(constrained, budget_bytes)
    schedule = transfer(plan.graph, plan.schedule, graph_to_fit, budget_bytes)
    if schedule is not None and late_read(constrained, schedule) is not None:
        schedule = None
    if schedule is None:
        return make_plan(call, _in_the_loop(request))
    outcome, least_ns = replay(graph, schedule), graph.base_cost_ns
    optimal = relative_gap(outcome.cost_ns, least_ns) <= OPTIMAL_GAP
    keeps_all = schedule == Schedule.keep_all(graph)
    result = SolveResult(
        status=SolveStatus.OPTIMAL if optimal else SolveStatus.FEASIBLE,
        ending=Ending.SOLVED if optimal else Ending.EXHAUSTED,
        schedule=schedule,
        cost_ns=outcome.cost_ns,
        lower_bound_ns=least_ns,  # no schedule takes less than one run of each operator
        bound_scope=BoundScope.BASE_ORDER,
        global_bound_ns=least_ns,
        staged_infeasible=False,
        peak_bytes=outcome.peak_bytes,
        solver=KEEP_ALL if keeps_all else TRANSFER,
        solve_s=time.perf_counter() - began,
    )
    return recorded(call, constrained, request, result)


def _in_the_loop(request: Request) -> Request:
    """The same request, to be solved while a training loop waits."""
    options = request.options
    limited = replace(
        options,
        time_limit_s=min(options.time_limit_s, IN_LOOP_LIMIT_S),
        gap=max(options.gap, IN_LOOP_GAP),
    )
    return replace(request, options=limited)
