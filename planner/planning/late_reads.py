"""Whether a schedule reads a parameter after its gradient has left.

Gradients that are accumulated or consumed leave a planned backward pass in groups, so that
one group of new gradients is in memory instead of a whole set. A gradient waits for the last
operator that reads its parameter. In the base order the groups take care of that; a schedule
that recomputes such an operator later, or that has another order, would hold a gradient
longer than its replay says. The step is then solved again with that operator run once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from graph_capture.calls.storage_id import storage_id
from graph_capture.captured_step import CapturedStep
from graph_capture.cost_graph import CostGraph
from graph_capture.folding.leaving import HANDED_ON
from solvers.result import OPTIMAL_GAP, SolveResult, SolveStatus
from solvers.schedule import Schedule

MOST_PINNED = 8
"""Times that a step is solved again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LateRead:
    """An operator that reads a parameter too late."""

    operator: int
    parameter: int  # its storage
    text: str

    def __str__(self) -> str:
        return self.text


def solve_in_time(
    captured: CapturedStep, solve: Callable[[CapturedStep], SolveResult]
) -> tuple[SolveResult, LateRead | None]:
    """Solve a step so that its schedule reads no parameter too late.

    Parameters
    ----------
    solve
        Returns a result with a schedule, or raises.

    Returns
    -------
    tuple
        The result, whose bounds are those of the first solve and hold for all schedules;
        and what is read too late nevertheless.
    """
    first = result = solve(captured)
    late = _late(captured, first)
    for _ in range(MOST_PINNED):
        if late is None or captured.graph.operators[late.operator].pinned is not None:
            break
        captured = _once(captured, late)
        result = solve(captured)
        late = _late(captured, result)
    if result is first:
        return first, late
    assert result.cost_ns is not None
    bound_ns = min(first.lower_bound_ns, result.cost_ns)
    near = result.cost_ns <= bound_ns * (1 + OPTIMAL_GAP)
    status = SolveStatus.OPTIMAL if near else SolveStatus.FEASIBLE
    bounded = replace(
        result,
        status=status,
        lower_bound_ns=bound_ns,
        bound_scope=first.bound_scope,
        global_bound_ns=min(first.global_bound_ns, bound_ns),
    )
    return bounded, late


def _late(captured: CapturedStep, result: SolveResult) -> LateRead | None:
    assert result.schedule is not None
    return late_read(captured, result.schedule)


def _once(captured: CapturedStep, late: LateRead) -> CapturedStep:
    """Let the operator, and what else in backward reads its parameter, run once."""
    operators = tuple(
        replace(op, pinned="it reads a parameter whose gradient leaves")
        if op.pinned is None
        and (v == late.operator or (op.phase == "backward" and late.parameter in op.inputs))
        else op
        for v, op in enumerate(captured.graph.operators)
    )
    return replace(captured, graph=CostGraph(operators, captured.graph.storages))


def late_read(captured: CapturedStep, schedule: Schedule) -> LateRead | None:
    """Return the first run that reads a parameter too late; ``None`` for none.

    Only where gradients leave while the step runs does it matter.
    """
    if not captured.holds.hands_on:
        return None
    graph, order = captured.graph, schedule.order
    last_read: dict[int, int] = {}
    for i, v in enumerate(order):
        last_read.update((k, i) for k in graph.operators[v].inputs)
    owners = _owners(captured)
    for i, v in enumerate(order):
        if graph.operators[v].target not in HANDED_ON:
            continue
        for k in graph.operators[v].inputs:
            owner = owners.get(k)
            if owner is not None and last_read.get(owner, -1) > i:
                late = order[last_read[owner]]
                name = graph.operators[late].name
                text = f"{name!r} reads {graph.storages[owner].name!r}"
                return LateRead(operator=late, parameter=owner, text=text)
    return None


def _owners(captured: CapturedStep) -> dict[int, int]:
    """The storage that each gradient's storage is for."""
    storage_of = captured.storage_of_memory
    return {
        storage_of[storage_id(gradient.meta["val"])]: storage_of[storage_id(leaf.meta["val"])]
        for leaf, gradient in captured.step.gradients
        if storage_id(gradient.meta["val"]) in storage_of
        and storage_id(leaf.meta["val"]) in storage_of
    }
