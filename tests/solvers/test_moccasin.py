from __future__ import annotations

import functools
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

from graph_capture.cost_graph import CostGraph
from solvers.arrays import graph_arrays
from solvers.incumbent import Incumbent
from solvers.instances import budget_of, keep_all_peak_bytes, load_instance
from solvers.reference import moccasin as module
from solvers.reference.checkmate_model import CheckmateModel, build_checkmate_model
from solvers.reference.moccasin import moccasin
from solvers.reference.moccasin_model import build_moccasin_model, schedule_of
from solvers.reference.ortools_process import run_ortools
from solvers.reference.ortools_programs import MixedIntegerProgram
from solvers.replay import replay
from solvers.result import Ending, SolveStatus
from solvers.schedule import Schedule
from solvers.stages import is_staged

from .graphs import INSTANCES, budget_within, random_dag, random_step, training_chain
from .solved_here import solve_here


def run_at_most(model: CheckmateModel, num_runs: int) -> MixedIntegerProgram:
    """Checkmate's program with a row for each operator: Σ_t R[t,i] ≤ C - 1."""
    program = model.program
    cols = [column[column >= 0] for column in model.r_col.T]
    cols = [c for c in cols if len(c)]
    first = len(program.row_lower)
    rows = [np.full(len(c), first + i) for i, c in enumerate(cols)]
    all_cols = np.concatenate([program.cols, *cols])
    return replace(
        program,
        rows=np.concatenate([program.rows, *rows]),
        cols=all_cols,
        values=np.concatenate([program.values, np.ones(len(all_cols) - len(program.cols))]),
        row_lower=np.concatenate([program.row_lower, np.full(len(cols), -np.inf)]),
        row_upper=np.concatenate([program.row_upper, np.full(len(cols), num_runs - 1.0)]),
    )


def agrees_with_checkmate(graph: CostGraph, budget_bytes: int, num_runs: int) -> None:
    model = build_checkmate_model(graph_arrays(graph), budget_bytes)
    solved = solve_here(run_at_most(model, num_runs))
    outcome = moccasin(Incumbent(graph, budget_bytes, 30.0), num_runs=num_runs)
    if solved is None:
        assert outcome.infeasible
        assert outcome.schedule is None
        return
    optimum = graph.base_cost_ns * (1 + solved[0] / 1e4)
    assert outcome.cost_ns == outcome.class_bound_ns == pytest.approx(optimum, abs=1e-3)
    assert outcome.schedule is not None
    assert is_staged(outcome.schedule)
    assert replay(graph, outcome.schedule).peak_bytes <= budget_bytes


@pytest.mark.parametrize("seed", [1, 3, 5, 7])
def test_equals_checkmate_with_as_few_runs_on_small_steps(seed: int) -> None:
    """Checkmate's program, allowed C runs of an operator, is solved by HiGHS to the same cost."""
    graph = random_step(seed)
    agrees_with_checkmate(graph, budget_within(graph, seed), num_runs=2 + seed % 3 // 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_equals_checkmate_with_as_few_runs(seed: int) -> None:
    """The same on more graphs, of another shape too."""
    graph = random_step(seed) if seed % 2 else random_dag(seed)
    agrees_with_checkmate(graph, budget_within(graph, seed), num_runs=2 + seed % 3 // 2)


@pytest.mark.parametrize(("num_runs", "overhead_percent"), [(2, 14.815), (3, 13.426)])
def test_proves_a_chain(num_runs: int, overhead_percent: float) -> None:
    """On chain8h at half its memory two intervals cost 14.815 %, three the staged optimum."""
    graph = load_instance(INSTANCES / "chain8h.json")
    state = Incumbent(graph, budget_of(graph, 0.5), 30.0)
    outcome = moccasin(state, workers=2, num_runs=num_runs)
    assert outcome.proven
    assert outcome.cost_ns == state.cost_ns
    assert 100 * (outcome.cost_ns / graph.base_cost_ns - 1) == pytest.approx(
        overhead_percent, abs=5e-4
    )
    assert state.result().status is SolveStatus.FEASIBLE  # for schedules with more runs


@pytest.mark.slow
def test_proves_a_random_graph() -> None:
    """G1 at 90 % is proven to cost 0.789 %, which is the optimum of all schedules too."""
    graph = load_instance(INSTANCES / "G1.json")
    outcome = moccasin(Incumbent(graph, budget_of(graph, 0.9), 120.0), workers=2)
    assert outcome.proven
    assert outcome.cost_ns is not None
    assert outcome.cost_ns / graph.base_cost_ns == pytest.approx(1.00789, abs=5e-6)


@pytest.mark.parametrize("seed", range(10))
def test_hints_name_every_column(seed: int) -> None:
    """A staged schedule gives each column a value of its domain, and they stand for it."""
    graph = random_dag(seed) if seed % 2 else random_step(seed)
    g = graph_arrays(graph)
    start = Schedule.keep_all(graph)
    for least_peak in (False, True):
        model = build_moccasin_model(
            g, keep_all_peak_bytes(graph), least_peak=least_peak, hint=start, graph=graph
        )
        hint = model.program.hint
        assert sorted(hint) == list(range(len(model.program.domains)))
        for column, domain in enumerate(model.program.domains):
            stretches = zip(domain[::2], domain[1::2], strict=True)
            assert any(low <= hint[column] <= high for low, high in stretches)
        assert schedule_of(g, model, [hint[i] for i in range(len(hint))]) == start


def test_a_killed_solver_leaves_the_incumbent(monkeypatch: pytest.MonkeyPatch) -> None:
    """When memory ends the result says so, and what was known before stays."""

    def kill(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(module, "run_ortools", functools.partial(run_ortools, on_start=kill))
    graph = training_chain(4)
    state = Incumbent(graph, keep_all_peak_bytes(graph), 30.0)
    state.offer(Schedule.keep_all(graph), "keep_all")
    outcome = moccasin(state)
    assert outcome.schedule == state.schedule == Schedule.keep_all(graph)
    assert state.gave_up is Ending.FAILED


def test_stops_at_the_time_limit() -> None:
    """An instance that is too hard for two seconds is left all the same."""
    graph = load_instance(INSTANCES / "G1.json")
    begin_s = time.monotonic()
    moccasin(Incumbent(graph, budget_of(graph, 0.7), 2.0))
    assert time.monotonic() - begin_s <= 20, "it would not have stopped by itself for long"


def test_refuses_no_run_at_all() -> None:
    """Every operator runs at least once."""
    with pytest.raises(ValueError, match="at least once, not 0 times"):
        moccasin(Incumbent(training_chain(2), 100, 5.0), num_runs=0)
