from __future__ import annotations

import functools
import os
import signal
import time

import numpy as np
import pytest

from graph_capture.cost_graph import CostGraph
from solvers.arrays import graph_arrays
from solvers.incumbent import Incumbent
from solvers.instances import budget_of, keep_all_peak_bytes, load_instance
from solvers.reference import checkmate, checkmate_rounding
from solvers.reference.checkmate import checkmate_lp_rounding, checkmate_milp
from solvers.reference.checkmate_model import build_checkmate_model, count_columns, schedule_of
from solvers.reference.checkmate_rounding import complete
from solvers.reference.ortools_process import RunStatus, run_ortools
from solvers.replay import replay
from solvers.result import Ending, SolveStatus
from solvers.schedule import Schedule
from solvers.scopes import BoundScope
from solvers.slices.schedule import trim
from solvers.stages import is_staged, order_of, stages_of

from .brute_force import least_cost
from .graphs import INSTANCES, budget_within, random_dag, random_order, random_step, training_chain
from .solved_here import solve_here


def agrees_with_brute_force(graph: CostGraph, budget_bytes: int) -> None:
    optimum = least_cost(graph, budget_bytes, checkmate_class=True)
    g = graph_arrays(graph)
    for whole_bytes in (False, True):
        model = build_checkmate_model(g, budget_bytes, whole_bytes=whole_bytes)
        solved = solve_here(model.program)
        if solved is None:
            assert optimum is None
            continue
        objective, values = solved
        schedule = schedule_of(g, model, values)
        outcome = replay(graph, schedule)
        assert is_staged(schedule)
        assert outcome.peak_bytes <= budget_bytes
        assert outcome.cost_ns == optimum
        base_cost_ns = graph.base_cost_ns
        assert base_cost_ns + objective * base_cost_ns / 1e4 == pytest.approx(optimum, abs=1e-3)


@pytest.mark.parametrize("seed", range(30))
def test_equals_brute_force_on_small_steps(seed: int) -> None:
    """Over staged schedules optimum, objective and feasibility are those of Dijkstra's search."""
    graph = random_step(seed, max_layers=3)
    agrees_with_brute_force(graph, budget_within(graph, seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_equals_brute_force(seed: int) -> None:
    """The same on larger steps, and on graphs that have not the shape of training."""
    graph = random_step(seed) if seed % 2 else random_dag(seed)
    agrees_with_brute_force(graph, budget_within(graph, seed))


@pytest.mark.parametrize("seed", range(40))
def test_counts_memory_as_replay_does(seed: int) -> None:
    """R and S of a staged schedule satisfy the program from its peak on, and not a byte below."""
    graph = random_dag(seed) if seed % 2 else random_step(seed)
    g = graph_arrays(graph)
    stages = stages_of(Schedule(tuple(random_order(graph, seed))))
    schedule = trim(g, order_of(stages))  # the program has no R for some idle repetitions
    peak_bytes = replay(graph, schedule).peak_bytes
    for budget_bytes, fits in ((peak_bytes, True), (peak_bytes - 1, False)):
        model = build_checkmate_model(g, budget_bytes, hint=schedule, graph=graph)
        pairs = zip(model.program.hint_cols, model.program.hint_values, strict=True)
        solved = solve_here(model.program, {int(col): float(value) for col, value in pairs})
        assert (solved is not None) == fits


@pytest.mark.parametrize("backend", ["highs", "scip", "cp_sat"])
def test_proves_a_chain(backend: str) -> None:
    """Each backend proves 13.426 % for chain8h at half its memory, and the claim is staged."""
    graph = load_instance(INSTANCES / "chain8h.json")
    state = Incumbent(graph, budget_of(graph, 0.5), 30.0)
    outcome = checkmate_milp(state, backend=backend)
    assert outcome.proven
    assert outcome.cost_ns == state.cost_ns == outcome.class_bound_ns
    assert outcome.cost_ns / graph.base_cost_ns == pytest.approx(1.13426, abs=5e-6)
    assert state.global_bound_ns == graph.base_cost_ns
    assert state.result().status is SolveStatus.OPTIMAL
    assert state.result().bound_scope is BoundScope.STAGED


def test_excludes_staged_schedules_only() -> None:
    """Less than the largest working set is infeasible for its class; of others it says nothing."""
    state = Incumbent(training_chain(4), 29, 30.0)
    outcome = checkmate_milp(state)
    assert outcome.infeasible
    assert outcome.schedule is None
    assert state.staged_infeasible
    assert not state.infeasible


def test_starts_from_the_incumbent() -> None:
    """R and S of the incumbent are complete hints, and cost what it costs."""
    graph = training_chain(6)
    schedule = Schedule((0, 1, 2, 3, 4, 5, 6, 3, 7, 8, 1, 2, 9, 10, 11))
    g = graph_arrays(graph)
    model = build_checkmate_model(g, 60, hint=schedule, graph=graph)
    assert len(model.program.hint_cols) == count_columns(g)
    values = np.zeros(len(model.program.cost))
    values[model.program.hint_cols] = model.program.hint_values
    assert schedule_of(g, model, values) == schedule


def test_a_killed_solver_leaves_the_incumbent(monkeypatch: pytest.MonkeyPatch) -> None:
    """When memory ends the result says so, and what was known before stays."""

    def kill(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(checkmate, "run_ortools", functools.partial(run_ortools, on_start=kill))
    graph = training_chain(4)
    state = Incumbent(graph, keep_all_peak_bytes(graph), 30.0)
    state.offer(Schedule.keep_all(graph), "keep_all")
    outcome = checkmate_milp(state)
    assert outcome.schedule is None
    assert state.schedule == Schedule.keep_all(graph)
    assert state.gave_up is Ending.FAILED


def test_stops_at_the_time_limit() -> None:
    """An instance that is too hard for two seconds is left all the same."""
    graph = load_instance(INSTANCES / "G1.json")
    begin_s = time.monotonic()
    checkmate_milp(Incumbent(graph, budget_of(graph, 0.7), 2.0))
    assert time.monotonic() - begin_s <= 20, "it would not have stopped by itself for long"


def test_says_when_a_graph_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of too many binaries is refused, and not built."""
    monkeypatch.setattr(checkmate, "MAX_COLUMNS", 10)
    state = Incumbent(training_chain(6), 60, 30.0)
    assert checkmate_milp(state).schedule is None
    assert state.result().ending is Ending.TOO_LARGE


def test_refuses_an_unknown_backend() -> None:
    """The message names what there is."""
    state = Incumbent(training_chain(2), 100, 5.0)
    with pytest.raises(ValueError, match="unknown backend 'magic'; known are highs"):
        checkmate_milp(state, backend="magic")


def test_rounds_a_relaxation() -> None:
    """What is rounded fits, costs no less than the relaxation, and is the same for a seed."""
    graph = load_instance(INSTANCES / "chain8h.json")
    outcomes = [
        checkmate_lp_rounding(Incumbent(graph, budget_of(graph, 0.5), 30.0), seed=3)
        for _ in range(2)
    ]
    assert outcomes[0] == outcomes[1]
    schedule, cost_ns = outcomes[0].schedule, outcomes[0].cost_ns
    assert schedule is not None
    assert cost_ns is not None
    assert replay(graph, schedule).peak_bytes <= budget_of(graph, 0.5)
    assert graph.base_cost_ns < outcomes[0].class_bound_ns <= 1.13426 * graph.base_cost_ns
    assert cost_ns >= 1.13425 * graph.base_cost_ns


def test_the_cheapest_of_all_allowances_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded at thresholds alone, chain8h at 60 %: 490 with no room left free, 481 with 0.1."""
    graph = load_instance(INSTANCES / "chain8h.json")
    monkeypatch.setattr(checkmate_rounding, "NUM_RANDOM", 0)

    def cost_ns(*allowances: float) -> int | None:
        monkeypatch.setattr(checkmate, "ALLOWANCES", allowances)
        return checkmate_lp_rounding(Incumbent(graph, budget_of(graph, 0.6), 30.0)).cost_ns

    assert cost_ns(0.0) == 490
    assert cost_ns(0.1) == 481
    assert cost_ns(0.0, 0.1) == cost_ns(0.1, 0.0) == 481


def test_rounds_at_more_than_one_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one half makes too large at 60 % of chain8h, another threshold does not."""
    graph = load_instance(INSTANCES / "chain8h.json")
    monkeypatch.setattr(checkmate, "ALLOWANCES", (0.0,))
    monkeypatch.setattr(checkmate_rounding, "NUM_RANDOM", 0)
    state = Incumbent(graph, budget_of(graph, 0.6), 30.0)
    assert checkmate_lp_rounding(state).cost_ns is not None
    monkeypatch.setattr(checkmate_rounding, "THRESHOLDS", (0.5,))
    state = Incumbent(graph, budget_of(graph, 0.6), 30.0)
    assert checkmate_lp_rounding(state).schedule is None


def test_the_papers_room_is_tried_and_less_where_that_has_no_solution() -> None:
    """Three layers of 10 in 31 bytes: a tenth less is below the largest working set."""
    graph = training_chain(8)
    state = Incumbent(graph, 31, 30.0)
    assert checkmate.ALLOWANCES[0] == 0.1
    outcome = checkmate_lp_rounding(state)
    assert outcome.relaxations[0.1] is RunStatus.INFEASIBLE
    assert outcome.relaxations[0.0] is RunStatus.OPTIMAL
    assert not outcome.infeasible
    assert outcome.class_bound_ns > graph.base_cost_ns


def test_says_when_nothing_rounded_fits() -> None:
    """Below the largest working set even the relaxation is infeasible, and is tried once more."""
    state = Incumbent(training_chain(8), 29, 30.0)
    outcome = checkmate_lp_rounding(state)
    assert outcome.infeasible
    assert outcome.schedule is None
    assert set(outcome.relaxations.values()) == {RunStatus.INFEASIBLE}


@pytest.mark.parametrize("seed", range(30))
def test_any_rounding_can_be_completed(seed: int) -> None:
    """Whatever stays, the runs that are added make a valid schedule."""
    graph = random_dag(seed) if seed % 2 else random_step(seed)
    g = graph_arrays(graph)
    stays = np.random.default_rng(seed).random((g.num_operators + 1, g.num_storages)) < 0.5
    stays &= (g.producer >= 0) & (g.producer < np.arange(g.num_operators + 1)[:, None])
    schedule = complete(g, stays)
    replay(graph, schedule)
    assert is_staged(schedule)


@pytest.mark.slow
def test_proves_a_known_optimum() -> None:
    """chain32h at 50 % costs 7.435 %, what slice refinement proves for all schedules."""
    graph = load_instance(INSTANCES / "chain32h.json")
    outcome = checkmate_milp(Incumbent(graph, budget_of(graph, 0.5), 300.0), workers=2)
    assert outcome.proven
    assert outcome.cost_ns is not None
    assert outcome.cost_ns / graph.base_cost_ns == pytest.approx(1.07435, abs=5e-6)
