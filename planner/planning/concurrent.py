"""Plan a step of which several calls are alive before the first is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from graph_capture.calls.storage_id import storage_id
from graph_capture.captured_step import CapturedStep
from graph_capture.cost_graph import CostGraph
from solvers.concurrent_calls import (
    Calls,
    Search,
    beside,
    least_for_calls,
    limited,
    peak_of_calls,
    solve_calls,
)
from solvers.least_memory import LeastMemory
from solvers.replay import replay
from solvers.result import SolveResult
from solvers.schedule import Schedule


def calls_of(captured: CapturedStep) -> Calls | None:
    """Return the calls of a step that are alive at once; ``None`` where it is one."""
    number = captured.holds.concurrent_calls
    if number == 1:
        return None
    place = captured.storage_of_memory
    of_parameters = {
        place[storage_id(gradient.meta["val"])]
        for leaf, gradient in captured.step.gradients
        if leaf.meta["role"] == "parameter" and storage_id(gradient.meta["val"]) in place
    }
    sizes = {k: captured.graph.storages[k].size_bytes for k in of_parameters}
    kept_bytes = sum(size for k, size in sizes.items() if captured.graph.storages[k].kept)
    return Calls(
        number=number,
        gradient_bytes=kept_bytes,
        summed_bytes=sum(sizes.values()) - kept_bytes,
    )


def with_unplanned_calls(captured: CapturedStep) -> CapturedStep:
    """Count in the unplanned step what its other calls hold."""
    calls, unplanned = calls_of(captured), captured.unplanned
    if calls is None or unplanned is None:
        return captured
    everything = Schedule.keep_all(unplanned)
    waiting_bytes = calls.waiting_bytes(unplanned, calls.held_bytes(unplanned, everything))
    return replace(captured, unplanned=beside(unplanned, waiting_bytes))


def with_waiting(captured: CapturedStep, calls: Calls, schedule: Schedule) -> CapturedStep:
    """Count what other calls hold under a schedule, here and in plans for other shapes."""
    held_bytes = calls.held_bytes(captured.graph, schedule)
    waiting_bytes = calls.waiting_bytes(captured.graph, held_bytes)
    return replace(
        captured,
        graph=beside(captured.graph, waiting_bytes),
        holds=replace(captured.holds, waiting_bytes=waiting_bytes),
    )


def within_waiting(captured: CapturedStep, budget_bytes: int) -> CostGraph:
    """Return the graph in which a schedule within the budget also leaves other calls their part.

    That part was decided by an earlier plan, and is ``holds.waiting_bytes``.
    """
    calls = calls_of(captured)
    if calls is None:
        return captured.graph
    most_bytes = calls.most_held_bytes(captured.graph, captured.holds.waiting_bytes)
    return limited(captured.graph, budget_bytes, most_bytes)


def solve_for_calls(
    captured: CapturedStep,
    calls: Calls,
    budget_bytes: int,
    search: Search,
    *,
    time_limit_s: float,
    gap: float,
    least: Callable[[CostGraph], LeastMemory],
) -> tuple[SolveResult, LeastMemory | None]:
    """Solve for all calls together.

    Parameters
    ----------
    search, time_limit_s, gap
        As of :func:`solvers.concurrent_calls.solve_calls`.
    least
        Finds the least memory of a graph; asked where keeping everything does not fit.

    Returns
    -------
    tuple
        The result, and the least memory where it is more than the budget or was searched for.
    """
    graph = captured.graph
    fitting: LeastMemory | None = None
    if peak_of_calls(graph, calls, Schedule.keep_all(graph)) > budget_bytes:
        fitting = least_of_calls(graph, calls, least)
    result = solve_calls(
        graph,
        budget_bytes,
        calls,
        search,
        time_limit_s=time_limit_s,
        gap=gap,
        known=None if fitting is None else fitting.schedule,
    )
    return result, fitting


def least_of_calls(
    graph: CostGraph, calls: Calls, least: Callable[[CostGraph], LeastMemory]
) -> LeastMemory:
    """Return the least memory that was found for all calls together."""
    schedule = least_for_calls(graph, calls, lambda g: least(g).schedule)
    peak_bytes = peak_of_calls(graph, calls, schedule)
    outcome = replay(graph, schedule)
    return LeastMemory(
        schedule=schedule,
        peak_bytes=peak_bytes,
        lower_bound_bytes=least(beside(graph, 0)).lower_bound_bytes,
        holding=(schedule.order[outcome.peak_step],),
    )
