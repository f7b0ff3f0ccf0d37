"""One schedule for several calls that are alive at once."""

from __future__ import annotations

import pytest

from graph_capture.cost_graph import CostGraph, Operator, Storage
from solvers.concurrent_calls import (
    Calls,
    beside,
    least_for_calls,
    limited,
    peak_of_calls,
    solve_calls,
)
from solvers.least_memory import least_memory
from solvers.portfolio import solve
from solvers.replay import replay
from solvers.result import SolveResult, SolveStatus
from solvers.schedule import Schedule

from .brute_force import least_cost


def _step(sizes: tuple[int, ...] = (5, 3, 6, 4), gradient: int = 2) -> CostGraph:
    """A chain of layers forward and back, with an input, a loss and gradients that stay."""
    storages = [
        Storage(name="weights", size_bytes=3, producer=None, category="parameter"),
        Storage(name="x", size_bytes=2, producer=None, category="input"),
        Storage(name="others", size_bytes=0, producer=None, category="waiting"),
    ]
    operators: list[Operator] = []

    def run(name: str, inputs: tuple[int, ...], size: int, **words: object) -> int:
        made = words.pop("category", "activation")
        storages.append(
            Storage(
                name=name,
                size_bytes=size,
                producer=len(operators),
                category=made,  # type: ignore[arg-type]
                kept=made in ("gradient", "output"),
            )
        )
        operators.append(
            Operator(name=name, inputs=inputs, outputs=(len(storages) - 1,), **words)  # type: ignore[arg-type]
        )
        return len(storages) - 1

    last, saved = 1, []
    for i, size in enumerate(sizes):
        saved.append(last)
        last = run(f"f{i}", (last,), size, cost_ns=i + 2)
    at = run("loss", (last,), 1, cost_ns=1, phase="loss", pinned="the loop's", ordered=True)
    for i in reversed(range(len(sizes))):
        at = run(f"b{i}", (at, saved[i]), sizes[i], cost_ns=3, phase="backward")
        run(f"g{i}", (at, saved[i]), gradient, cost_ns=1, phase="backward", category="gradient")
    return CostGraph(tuple(operators), tuple(storages))


def _search(
    graph: CostGraph, budget_bytes: int, *, time_limit_s: float, hint: Schedule | None
) -> SolveResult:
    return solve(graph, budget_bytes, time_limit_s=time_limit_s, hint=hint, workers=1)


def _calls(graph: CostGraph, number: int) -> Calls:
    of_gradients = sum(s.size_bytes for s in graph.storages if s.category == "gradient")
    return Calls(number=number, gradient_bytes=of_gradients)


def _exact(graph: CostGraph, budget_bytes: int, calls: Calls) -> int | None:
    """The least cost over every amount that a call may hold."""
    costs = [
        least_cost(
            limited(
                beside(graph, calls.waiting_bytes(graph, held_bytes)), budget_bytes, held_bytes
            ),
            budget_bytes,
        )
        for held_bytes in range(calls.held_bytes(graph, Schedule.keep_all(graph)) + 1)
    ]
    return min((cost for cost in costs if cost is not None), default=None)


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("share", [0.97, 0.85, 0.7, 0.6])
def test_the_result_is_the_exact_optimum(number: int, share: float) -> None:
    """Of all schedules that all calls run by, and its peak is that of all calls."""
    graph = _step((5, 3, 6))
    calls = _calls(graph, number)
    budget_bytes = int(share * peak_of_calls(graph, calls, Schedule.keep_all(graph)))
    found = solve_calls(graph, budget_bytes, calls, _search, time_limit_s=20)
    exact = _exact(graph, budget_bytes, calls)
    assert found.cost_ns == exact
    if exact is None:
        assert found.status is SolveStatus.INFEASIBLE
        return
    assert found.status is SolveStatus.OPTIMAL
    assert found.lower_bound_ns == exact
    assert found.schedule is not None
    assert found.peak_bytes == peak_of_calls(graph, calls, found.schedule) <= budget_bytes


def test_a_schedule_within_the_limited_graph_holds_no_more() -> None:
    """The loss gets so much scratch that a call holding more would leave the budget."""
    graph, budget_bytes = _step(), 40
    everything = Schedule.keep_all(graph)
    held_bytes = _calls(graph, 2).held_bytes(graph, everything)
    assert replay(limited(graph, budget_bytes, held_bytes), everything).peak_bytes <= budget_bytes
    less = limited(graph, budget_bytes, held_bytes - 1)
    assert replay(less, everything).peak_bytes == budget_bytes + 1


def test_what_waits_counts_the_gradients_of_a_finished_call() -> None:
    """Where they outweigh what it held before: input 2, gradients 4 x 9, against 2 + 18 + 1."""
    graph = _step(gradient=9)
    calls = _calls(graph, 2)
    held_bytes = calls.held_bytes(graph, Schedule.keep_all(graph))
    assert held_bytes == 21
    assert calls.waiting_bytes(graph, held_bytes) == 38
    assert calls.most_held_bytes(graph, 38) == 38
    assert calls.most_held_bytes(graph, 37) == -1


def test_the_least_memory_of_all_calls_is_no_more_than_by_the_least_of_one() -> None:
    """A schedule that lowers what waits may have a higher peak alone."""
    graph = _step((5, 9, 2, 4, 7))
    calls = _calls(graph, 4)

    def least(of: CostGraph) -> Schedule:
        return least_memory(of, time_limit_s=0.5).schedule

    found = peak_of_calls(graph, calls, least_for_calls(graph, calls, least))
    assert found <= peak_of_calls(graph, calls, least(graph))
    assert _exact(graph, found, calls) is not None
