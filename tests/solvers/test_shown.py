"""Results and replays as a console shows them."""

from __future__ import annotations

from graph_capture.cost_graph import CostGraph, Operator, Storage
from solvers.replay import replay
from solvers.result import Ending, SolveResult, SolveStatus
from solvers.schedule import Schedule
from solvers.scopes import BoundScope


def _graph(count: int) -> CostGraph:
    """A chain of forward operators."""
    operators = tuple(
        Operator(
            name=f"op{v}",
            target="aten.relu.default",
            inputs=(v - 1,) if v else (),
            outputs=(v,),
            cost_ns=1000,
            phase="forward",
        )
        for v in range(count)
    )
    storages = tuple(
        Storage(name=f"s{v}", size_bytes=4, producer=v, category="activation") for v in range(count)
    )
    return CostGraph(operators, storages)


def test_a_schedule_is_not_spelled_out() -> None:
    """The repr of a result and of a replay is a line of figures, however long the schedule is."""
    graph = _graph(200)
    schedule = Schedule.keep_all(graph)
    outcome = replay(graph, schedule)
    result = SolveResult(
        status=SolveStatus.FEASIBLE,
        ending=Ending.TIME_LIMIT,
        schedule=schedule,
        cost_ns=outcome.cost_ns,
        lower_bound_ns=160_000,
        bound_scope=BoundScope.BASE_ORDER,
        global_bound_ns=160_000,
        staged_infeasible=False,
        peak_bytes=outcome.peak_bytes,
        solver="keep_all",
        solve_s=0.5,
    )
    assert repr(result) == (
        "<SolveResult feasible by keep_all: 200 runs, peak 8 B, step 200 us, gap 25.00%, 0.50 s>"
    )
    assert repr(outcome) == "<Replay of 200 runs: peak 8 B at run 1, 200 us>"
