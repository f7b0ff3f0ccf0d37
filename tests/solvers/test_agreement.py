"""Every solver against the exact reference, on random steps small enough for it.

A graph and its budget are named by a family and a seed, so that a failure
reads ``family='step', seed=41``. Where a solver proves nothing it takes its
whole time limit, so failures are not shrunk.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import Phase, event, example, given, settings
from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph
from solvers.instances import keep_all_peak_bytes
from solvers.least_memory import least_memory
from solvers.portfolio import SOLVERS, solve
from solvers.replay import replay
from solvers.result import SolveResult, SolveStatus
from solvers.scopes import BoundScope
from solvers.stages import is_staged

from .brute_force import least_cost, least_memory_exact
from .graphs import budget_within, random_dag, random_step

FAMILIES: dict[str, Callable[[int], CostGraph]] = {"dag": random_dag, "step": random_step}
IN_CHILD_PROCESSES = {name for name in SOLVERS if name.startswith(("checkmate", "moccasin"))}
"""Solvers that take a second to start."""

families = st.sampled_from(sorted(FAMILIES))
seeds = st.integers(0, 10**6)
phases = (Phase.explicit, Phase.reuse, Phase.generate)


def check_proof(family: str, seed: int) -> None:
    """Slice refinement ends with the exact answer and a proof of it, where it can.

    It can for staged schedules. On some graphs their optimum is above that of
    all schedules, or there are none; then this asks only for what it claims.
    """
    graph = FAMILIES[family](seed)
    budget_bytes = budget_within(graph, seed)
    result = solve(graph, budget_bytes, solver="slice_refinement", time_limit_s=30.0)
    check_claims(graph, budget_bytes, result)
    optimum = least_cost(graph, budget_bytes)
    staged = least_cost(graph, budget_bytes, checkmate_class=True)
    event(f"{result.status}: {result.bound_scope}")
    if staged is None:
        assert result.staged_infeasible or result.status in (
            SolveStatus.INFEASIBLE,
            SolveStatus.OPTIMAL,
        )
    else:
        assert result.status is SolveStatus.OPTIMAL
        assert result.cost_ns is not None
        assert result.cost_ns <= staged
        if staged == optimum:
            assert result.cost_ns == optimum


def check_solver(solver: str, family: str, seed: int) -> None:
    """What ``solver`` claims in a fifth of a second is so."""
    graph = FAMILIES[family](seed)
    budget_bytes = budget_within(graph, seed)
    limit_s = 10.0 if solver in IN_CHILD_PROCESSES else 0.2
    result = solve(graph, budget_bytes, solver=solver, time_limit_s=limit_s)
    check_claims(graph, budget_bytes, result)
    event(str(result.status))


def check_claims(graph: CostGraph, budget_bytes: int, result: SolveResult) -> None:
    """The schedule is valid and fits, and nothing claimed contradicts the reference."""
    optimum = least_cost(graph, budget_bytes)
    keeps_order = False
    if result.schedule is not None:
        keeps_order = list(dict.fromkeys(result.schedule.order)) == list(range(graph.num_operators))
        outcome = replay(graph, result.schedule)
        assert outcome.peak_bytes == result.peak_bytes
        assert outcome.peak_bytes <= budget_bytes
        assert outcome.cost_ns == result.cost_ns
        if keeps_order:
            assert optimum is not None
            assert outcome.cost_ns >= optimum
        assert result.lower_bound_ns <= outcome.cost_ns
    if result.status is SolveStatus.INFEASIBLE:
        assert optimum is None
    if optimum is not None:
        assert result.global_bound_ns <= optimum
    if result.bound_scope is BoundScope.BASE_ORDER:
        assert result.lower_bound_ns == result.global_bound_ns
        if result.status is SolveStatus.OPTIMAL and keeps_order:
            assert result.cost_ns == optimum
    elif result.bound_scope is BoundScope.STAGED:
        staged = least_cost(graph, budget_bytes, checkmate_class=True)
        if staged is not None:
            assert result.lower_bound_ns <= staged
        if result.status is SolveStatus.OPTIMAL:
            assert result.cost_ns is not None
            assert result.schedule is not None
            assert staged is None or result.cost_ns <= staged
            assert not is_staged(result.schedule) or result.cost_ns == staged


def check_least_memory(family: str, seed: int) -> None:
    """The least budget lies between the bound and the peak that was found."""
    graph = FAMILIES[family](seed)
    least = least_memory(graph, time_limit_s=0.2)
    assert least.lower_bound_bytes <= least_memory_exact(graph) <= least.peak_bytes
    assert replay(graph, least.schedule).peak_bytes == least.peak_bytes
    assert least.peak_bytes <= keep_all_peak_bytes(graph)


@settings(max_examples=25, deadline=None, phases=phases)
@given(family=families, seed=seeds)
@example(family="dag", seed=41)
@example(family="dag", seed=53)  # no staged schedule fits, another one does
def test_slice_refinement_proves_the_optimum(family: str, seed: int) -> None:
    """On small graphs it ends with the optimum proven, or with a proof that nothing fits."""
    check_proof(family, seed)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, phases=phases)
@given(family=families, seed=seeds)
@example(family="dag", seed=166)
@example(family="dag", seed=185)
@example(family="dag", seed=1501)
@example(family="dag", seed=1551)
@example(family="dag", seed=637_822)
@example(family="step", seed=14)
@example(family="step", seed=1223)
@example(family="step", seed=1509)
def test_slice_refinement_proves_many_optima(family: str, seed: int) -> None:
    """The same on hundreds of graphs."""
    check_proof(family, seed)


@pytest.mark.parametrize("solver", sorted(SOLVERS.keys() - IN_CHILD_PROCESSES))
@settings(max_examples=5, deadline=None, phases=phases)
@given(family=families, seed=seeds)
def test_no_claim_is_wrong(solver: str, family: str, seed: int) -> None:
    """Bounds, costs, schedules and verdicts of every solver agree with the reference."""
    check_solver(solver, family, seed)


@pytest.mark.slow
@pytest.mark.parametrize("solver", sorted(SOLVERS.keys() - IN_CHILD_PROCESSES))
@settings(max_examples=40, deadline=None, phases=phases)
@given(family=families, seed=seeds)
def test_no_claim_of_many_is_wrong(solver: str, family: str, seed: int) -> None:
    """The same on forty graphs each."""
    check_solver(solver, family, seed)


@pytest.mark.slow
@pytest.mark.parametrize("solver", sorted(SOLVERS.keys() & IN_CHILD_PROCESSES))
@settings(max_examples=10, deadline=None, phases=phases)
@given(family=families, seed=seeds)
def test_no_claim_from_a_child_process_is_wrong(solver: str, family: str, seed: int) -> None:
    """The same for solvers that take a second to start."""
    check_solver(solver, family, seed)


@settings(max_examples=8, deadline=None, phases=phases)
@given(family=families, seed=seeds)
def test_least_memory_holds_the_truth(family: str, seed: int) -> None:
    """Its bound is no higher, and its peak no lower, than the exact least budget."""
    check_least_memory(family, seed)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, phases=phases)
@given(family=families, seed=seeds)
def test_least_memory_often_holds_the_truth(family: str, seed: int) -> None:
    """The same on many graphs."""
    check_least_memory(family, seed)
