from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph
from solvers.instances import budget_of, keep_all_peak_bytes, load_instance
from solvers.portfolio import SOLVERS, solve
from solvers.progress import ProgressEvent
from solvers.reference.ortools_process import RunOutcome, RunStatus
from solvers.replay import replay
from solvers.result import Ending, SolveStatus
from solvers.schedule import Schedule

from .graphs import INSTANCES, cost_graphs, exhaustive_optimum, training_chain


@settings(max_examples=25, deadline=None)
@given(graph=cost_graphs(), share=st.integers(30, 100), solver=st.sampled_from(sorted(SOLVERS)))
def test_no_solver_claims_what_is_not_so(graph: CostGraph, share: int, solver: str) -> None:
    """Bounds lie below the exhaustive optimum and schedules fit, whichever solver runs."""
    budget_bytes = keep_all_peak_bytes(graph) * share // 100
    optimum = exhaustive_optimum(graph, budget_bytes)
    result = solve(graph, budget_bytes, solver=solver, time_limit_s=0.5)
    if optimum is None:
        assert result.schedule is None
        assert result.status in (SolveStatus.INFEASIBLE, SolveStatus.UNKNOWN)
        return
    assert result.status is not SolveStatus.INFEASIBLE
    assert result.lower_bound_ns <= optimum
    if result.schedule is not None:
        outcome = replay(graph, result.schedule)
        assert outcome.peak_bytes <= budget_bytes
        assert outcome.cost_ns == result.cost_ns
        assert outcome.cost_ns >= optimum
    if result.status is SolveStatus.OPTIMAL:
        assert result.cost_ns == optimum


def test_keeps_all_where_that_fits() -> None:
    """At the keep-all peak nothing is recomputed, and that is optimal."""
    graph = training_chain(6)
    result = solve(graph, keep_all_peak_bytes(graph))
    assert result.status is SolveStatus.OPTIMAL
    assert result.solver == "keep_all"
    assert result.schedule == Schedule.keep_all(graph)


def test_a_gpt2_step_within_the_time_limit() -> None:
    """Two layers of GPT-2 at 80 % of activations: 13.523 % is proven."""
    graph = load_instance(INSTANCES / "gpt2_L2.json")
    activations = keep_all_peak_bytes(graph) - graph.resident_bytes
    budget_bytes = int(0.8 * activations) + graph.resident_bytes
    result = solve(graph, budget_bytes, time_limit_s=30)
    assert result.status is SolveStatus.OPTIMAL
    assert result.cost_ns is not None
    assert result.cost_ns / graph.base_cost_ns == pytest.approx(1.13523, abs=5e-6)


def test_stops_near_the_time_limit() -> None:
    """A hard instance is left near its two seconds, with a schedule and a bound."""
    graph = load_instance(INSTANCES / "G1.json")
    begin_s = time.monotonic()
    result = solve(graph, budget_of(graph, 0.7), time_limit_s=2.0)
    assert time.monotonic() - begin_s <= 20, "it would not have stopped by itself for long"
    assert result.status is SolveStatus.FEASIBLE
    assert result.lower_bound_ns > graph.base_cost_ns


def test_says_when_nothing_fits() -> None:
    """Less than one operator's own bytes is proven infeasible, in any class."""
    graph = training_chain(6)
    result = solve(graph, 29)
    assert result.status is SolveStatus.INFEASIBLE
    assert result.schedule is None
    assert result.ending is Ending.SOLVED


def test_proves_that_nothing_fits_in_half_of_a_random_graph() -> None:
    """G1 needs 54.1 % of its keep-all peak: 50 % is excluded, not merely not found."""
    graph = load_instance(INSTANCES / "G1.json")
    result = solve(graph, budget_of(graph, 0.5), time_limit_s=80)
    assert result.status is SolveStatus.INFEASIBLE


def test_reports_progress() -> None:
    """Every event reaches the caller, with bounds that never fall."""
    graph = load_instance(INSTANCES / "chain32h.json")
    events: list[ProgressEvent] = []
    solve(graph, budget_of(graph, 0.5), time_limit_s=20, progress=events.append)
    bounds = [event.bound_ns for event in events]
    assert bounds
    assert bounds == sorted(bounds)
    assert events[-1].gap is not None


def test_takes_a_hint() -> None:
    """A schedule that fits is taken as it is when there is no time for another."""
    graph = training_chain(6)
    hint = solve(graph, 60).schedule
    assert hint is not None
    result = solve(graph, 60, solver="gap_cover", hint=hint)
    assert result.schedule == hint
    assert result.solver == "hint"


def test_refuses_an_unknown_solver() -> None:
    """The message names what there is."""
    with pytest.raises(ValueError, match="unknown solver 'magic'; known are auto"):
        solve(training_chain(2), 100, solver="magic")


def test_refuses_a_hint_in_another_order() -> None:
    """A bound for the base order says nothing of a hint that leaves it."""
    graph = training_chain(3)
    with pytest.raises(ValueError, match="not in base order"):
        solve(graph, 1000, hint=Schedule((1, 0, 2, 3, 4, 5)))


@pytest.mark.parametrize("solver", ["auto", "slice_refinement", "local_search", "moccasin"])
def test_can_be_stopped_at_any_moment(solver: str) -> None:
    """Another thread ends a long solve; what was found by then is returned."""
    graph = load_instance(INSTANCES / "G1.json")
    stop = threading.Event()
    timer = threading.Timer(1.0, stop.set)
    timer.start()
    begin_s = time.monotonic()
    budget_bytes = budget_of(graph, 0.7)
    result = solve(graph, budget_bytes, solver=solver, time_limit_s=100, stop=stop)
    timer.cancel()
    assert time.monotonic() - begin_s < 50, "far from the limit, however slow the machine"
    assert result.status in (SolveStatus.FEASIBLE, SolveStatus.UNKNOWN)
    if solver in ("auto", "local_search"):
        assert result.schedule is not None or solver == "local_search"


def test_the_incumbent_survives_a_solver_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child process that is killed leaves the hint, a status and how it ended."""
    graph = training_chain(6)
    hint = solve(graph, 60, solver="local_search", time_limit_s=5).schedule
    assert hint is not None

    def killed(*args: object, **kwargs: object) -> RunOutcome:
        return RunOutcome(
            status=RunStatus.DIED,
            values=None,
            objective=None,
            bound=None,
            message="killed by signal 9",
        )

    monkeypatch.setattr("solvers.reference.checkmate.run_ortools", killed)
    result = solve(graph, 60, solver="checkmate_milp", hint=hint, time_limit_s=5)
    assert result.schedule == hint
    assert result.status is SolveStatus.FEASIBLE
    assert result.ending is Ending.FAILED


def test_ends_once_a_strategy_of_the_field_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gap that was asked for and is reached by then needs no further search."""

    def needless(*_: object, **__: object) -> None:
        raise AssertionError("searched on")

    for name in ("local_search", "chain_dp", "slice_refinement"):
        monkeypatch.setattr(f"solvers.portfolio.{name}", needless)
    monkeypatch.setattr("solvers.portfolio.uniform_under_budget", lambda *_: None)
    result = solve(training_chain(6), 60, gap=10.0, workers=1)
    assert result.schedule is not None


def test_the_overtime_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the field's strategies have is tried after the limit, but not for ever."""
    num_ended = 0

    def endless(_: object, give_up: Callable[[], bool]) -> Iterator[tuple[Schedule, str]]:
        nonlocal num_ended
        begin_s = time.monotonic()
        while not give_up():
            if time.monotonic() - begin_s > 5:
                raise AssertionError("never told to give up")
            time.sleep(0.01)
        num_ended += 1
        yield from ()

    nothing = SimpleNamespace(lower_bound_ns=0, infeasible=False)
    monkeypatch.setattr("solvers.portfolio.gap_cover", lambda *_, **__: nothing)
    monkeypatch.setattr("solvers.portfolio.BaselineSchedules.families", endless)
    monkeypatch.setattr("solvers.portfolio.OVERTIME_S", 0.2)
    monkeypatch.setattr("solvers.portfolio.slice_refinement", lambda *_, **__: None)
    solve(training_chain(6), 60, time_limit_s=0.5, workers=1)
    assert num_ended == 2, "within the limit, and beyond"
