"""What more memory would buy: the same step, solved again with a larger budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from solvers.any_order.solve import solve_in_any_order
from solvers.concurrent_calls import limited
from solvers.portfolio import solve
from solvers.progress import ProgressEvent
from solvers.result import Ending, SolveStatus
from solvers.scopes import BoundScope

from ..base.solve_options import DEFAULT_GAP
from ..plan_record import PlanRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class MoreMemory:
    """A solve with a larger budget, beside the plan.

    Parameters
    ----------
    extra_bytes
        How much larger than the plan's.
    budget_bytes
        The larger budget, with the same headroom in bytes.
    peak_bytes, step_us, num_recomputed
        Of the best schedule that was found there: the plan's own at worst.
    saved_us
        By how much its step is shorter than the plan's.
    at_most_us
        No schedule of ``bound_scope`` in the larger budget saves more.
    bound_scope
        What that bound covers.
    status, ending, solve_s
        How the solve ended.
    """

    extra_bytes: int
    budget_bytes: int
    peak_bytes: int
    step_us: float
    num_recomputed: int
    saved_us: float
    at_most_us: float
    bound_scope: BoundScope
    status: SolveStatus
    ending: Ending
    solve_s: float


def with_more_memory(
    plan: PlanRecord,
    extra_bytes: int,
    *,
    time_limit_s: float,
    progress: Callable[[ProgressEvent], None] | None = None,
) -> MoreMemory:
    """Solve a plan's step again with a larger budget, from the plan's own schedule.

    Parameters
    ----------
    extra_bytes
        How much larger.
    time_limit_s
        For the solve.
    progress
        As for :func:`planner.optimize`.
    """
    search = solve_in_any_order if plan.reorder else solve
    graph, budget_bytes = plan.graph, plan.budget_bytes - plan.headroom_bytes + extra_bytes
    others = plan.holds.concurrent_calls - 1
    if others:  # which go on holding no more than now, so more than this may be gained
        graph = limited(graph, budget_bytes, plan.holds.waiting_bytes // others)
    result = search(
        graph,
        budget_bytes,
        time_limit_s=time_limit_s,
        seed=plan.seed,
        hint=plan.schedule,
        progress=progress,
        gap=DEFAULT_GAP,
    )
    assert result.schedule is not None  # the plan's own fits
    assert result.cost_ns is not None
    assert result.peak_bytes is not None
    step_us = result.cost_ns / 1e3
    bound_ns = graph.base_cost_ns if others else result.lower_bound_ns
    return MoreMemory(
        extra_bytes=extra_bytes,
        budget_bytes=plan.budget_bytes + extra_bytes,
        peak_bytes=result.peak_bytes,
        step_us=step_us,
        num_recomputed=sum(result.schedule.recomputed().values()),
        saved_us=plan.predicted_step_us - step_us,
        at_most_us=plan.predicted_step_us - bound_ns / 1e3,
        bound_scope=result.bound_scope,
        status=result.status,
        ending=result.ending,
        solve_s=result.solve_s,
    )
