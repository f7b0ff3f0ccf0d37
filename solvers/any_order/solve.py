"""Solve a step without keeping first runs in eager's order.

Eager's own order comes first, as :func:`solvers.portfolio.solve` does it, with
``FIRST_SHARE`` of the time. Then rounds of three: move the runs of the best schedule so
that less is in memory where it is tight (``any_order/reorder.py``, at no cost); make
the order of its first runs the new base order; solve there, beginning from that
schedule. The order of the hint, and the one in which keeping everything fits best, are
also tried once each.

Guarantee: never worse than that first solve, since another order is taken only where it
costs less. Given the whole time, the plain solve may do better.

Three bounds, never mixed up:

- one that holds in every order (``any_order/order_free_bound.py``);
- one for the order of the schedule that is returned, for this order alone;
- one for eager's order, which a schedule in another order may well beat.

The result carries the first where it proves the schedule optimal, and else the
bound for the schedule's own order; ``bound_scope`` says which, and the log has
the others. ``global_bound_ns`` holds in eager's order and in every other one,
unless the schedule is in eager's: then it speaks of that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from graph_capture.cost_graph import CostGraph

from ..checked import check_time_limit, checked_budget
from ..portfolio import solve
from ..progress import Progress
from ..replay import replay
from ..result import OPTIMAL_GAP, Ending, SolveResult, SolveStatus
from ..schedule import Schedule
from ..scopes import BoundScope
from .order_free_bound import OrderFreeBound, order_free_bound
from .permutation import first_runs, permuted, relabelled, unpermuted
from .reorder import reorder, reorder_runs

FIRST_SHARE = 0.6
"""Of the time limit, for eager's own order."""

BOUND_SHARE = 0.15
"""Of the time limit, for the bound that holds in every order."""

MAX_ROUNDS = 6
MOVING_LIMIT_S = 2.0
"""For moving the runs of one schedule; half of what is left, where that is less."""


@dataclass(frozen=True)
class _Found:
    """A result in terms of the original graph, and the base order that it was found in."""

    result: SolveResult
    order: tuple[int, ...]


def solve_in_any_order(
    graph: CostGraph,
    budget_bytes: int,
    *,
    solver: str = "auto",
    time_limit_s: float = 60.0,
    seed: int = 0,
    workers: int = 2,
    hint: Schedule | None = None,
    progress: Progress | None = None,
    gap: float = 0.0,
) -> SolveResult:
    """Find the fastest schedule within ``budget_bytes``, with first runs in any order.

    Parameters
    ----------
    solver, time_limit_s, seed, workers, hint, progress, gap
        As for :func:`solvers.portfolio.solve`; the hint's first runs may be in
        any order, and it is used in its own. ``progress`` hears of costs and
        bounds in the order that is being solved.

    Returns
    -------
    SolveResult
        No worse than what :func:`solvers.portfolio.solve` finds in eager's
        order within ``FIRST_SHARE`` of the time. ``status`` speaks of
        ``bound_scope``, but is infeasible only when nothing fits in any order.
    """
    budget_bytes = checked_budget(budget_bytes)
    check_time_limit(time_limit_s)
    begin_s = time.monotonic()
    deadline_s = begin_s + time_limit_s
    log: list[str] = []

    def solve_in(order: tuple[int, ...], hint: Schedule | None, limit_s: float) -> _Found:
        found = solve(
            permuted(graph, order),
            budget_bytes,
            solver=solver,
            time_limit_s=max(0.0, limit_s),
            seed=seed,
            workers=workers,
            hint=None if hint is None else relabelled(hint, order),
            progress=progress,
            gap=gap,
        )
        log.extend(found.log)
        schedule = found.schedule
        if schedule is not None:
            found = replace(found, schedule=unpermuted(schedule, order))
        return _Found(found, order)

    eager = tuple(range(graph.num_operators))
    own = eager if hint is None else first_runs(hint)
    base = best = solve_in(eager, hint if own == eager else None, FIRST_SHARE * time_limit_s)
    if own != eager:
        left_s = deadline_s - time.monotonic()
        best = min(best, solve_in(own, hint, left_s / 4), key=_cost)
    anywhere = OrderFreeBound(graph.base_cost_ns, False)
    if not _proven(best, anywhere, gap):
        anywhere = order_free_bound(
            graph, budget_bytes, time_limit_s=BOUND_SHARE * time_limit_s, seed=seed
        )
        log.append(f"in any order: at least {anywhere.lower_bound_ns} ns")
    for turn in range(MAX_ROUNDS):
        if anywhere.infeasible or _proven(best, anywhere, gap) or time.monotonic() >= deadline_s:
            break
        improved = False
        for order, schedule in _other_orders(graph, budget_bytes, best, turn, seed, deadline_s):
            left_s = deadline_s - time.monotonic()
            log.append(f"round {turn + 1}: another order, {_num_moved(order, best.order)} moved")
            found = solve_in(order, schedule, left_s / 2)
            if _cost(found) < _cost(best):
                best, improved = found, True
        if not improved:
            break
    log.append(f"in eager's order: at least {base.result.lower_bound_ns} ns")
    if anywhere.infeasible or _proven(best, anywhere, 0.0):
        ending = Ending.SOLVED
    elif _proven(best, anywhere, gap):
        ending = Ending.GAP
    else:
        ending = Ending.TIME_LIMIT if time.monotonic() >= deadline_s else Ending.EXHAUSTED
    solve_s = time.monotonic() - begin_s
    best = replace(
        best, result=replace(best.result, ending=ending, log=tuple(log), solve_s=solve_s)
    )
    return _claim(graph, budget_bytes, best, eager, anywhere)


def _other_orders(
    graph: CostGraph, budget_bytes: int, best: _Found, turn: int, seed: int, deadline_s: float
) -> Iterator[tuple[tuple[int, ...], Schedule | None]]:
    """Return the orders to try next, with a schedule to start from where there is one."""

    def limit_s() -> float:
        return min(MOVING_LIMIT_S, max(0.0, deadline_s - time.monotonic()) / 2)

    schedule = best.result.schedule
    if schedule is not None:
        moved = reorder_runs(
            graph, schedule, budget_bytes=budget_bytes, time_limit_s=limit_s(), seed=seed + turn
        )
        if first_runs(moved) != best.order:
            yield first_runs(moved), moved
    if turn == 0:
        order = reorder(graph, budget_bytes=budget_bytes, time_limit_s=limit_s(), seed=seed)
        if order != best.order and list(order) != sorted(order):  # eager's has been tried
            yield order, None


def _claim(
    graph: CostGraph,
    budget_bytes: int,
    best: _Found,
    eager: tuple[int, ...],
    anywhere: OrderFreeBound,
) -> SolveResult:
    """Return what is proven about the best schedule."""
    result = replace(best.result, global_bound_ns=anywhere.lower_bound_ns)
    if result.schedule is None:
        return replace(
            result,
            status=SolveStatus.INFEASIBLE if anywhere.infeasible else SolveStatus.UNKNOWN,
            lower_bound_ns=anywhere.lower_bound_ns,
            bound_scope=BoundScope.ANY_ORDER,
        )
    outcome = replay(graph, result.schedule)
    if (outcome.cost_ns, outcome.peak_bytes) != (result.cost_ns, result.peak_bytes):
        raise RuntimeError("a schedule is worth something else in another order of its graph")
    if anywhere.infeasible:
        raise RuntimeError(f"excludes a budget that a schedule fits in: {budget_bytes}")
    if outcome.cost_ns < anywhere.lower_bound_ns:
        raise RuntimeError(
            f"a schedule of {outcome.cost_ns} below the bound {anywhere.lower_bound_ns}"
        )
    if _proven(best, anywhere, 0.0):
        return replace(
            result,
            status=SolveStatus.OPTIMAL,
            lower_bound_ns=anywhere.lower_bound_ns,
            bound_scope=BoundScope.ANY_ORDER,
        )
    if best.order == eager:
        global_bound_ns = max(best.result.global_bound_ns, anywhere.lower_bound_ns)
        result = replace(result, global_bound_ns=global_bound_ns)
    else:
        result = replace(result, bound_scope=result.bound_scope.in_own_order)
    return replace(result, lower_bound_ns=max(result.lower_bound_ns, anywhere.lower_bound_ns))


def _proven(found: _Found, anywhere: OrderFreeBound, gap: float) -> bool:
    """Whether no order can do better by more than the requested gap."""
    return _cost(found) <= (1 + max(gap, OPTIMAL_GAP)) * anywhere.lower_bound_ns


def _cost(found: _Found) -> float:
    return float("inf") if found.result.cost_ns is None else found.result.cost_ns


def _num_moved(order: tuple[int, ...], before: tuple[int, ...]) -> int:
    return sum(a != b for a, b in zip(order, before, strict=True))
