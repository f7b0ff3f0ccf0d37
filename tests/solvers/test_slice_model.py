from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import highspy
import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from graph_capture.cost_graph import CostGraph
from solvers.arrays import graph_arrays
from solvers.highs import OBJECTIVE_SCALE, quiet_highs, rounded_bound
from solvers.instances import keep_all_peak_bytes
from solvers.replay import replay
from solvers.schedule import Schedule
from solvers.slices.model import SliceModel, build_slice_model
from solvers.slices.schedule import schedule_of, solution_of
from solvers.slices.slicing import Slicing

from .brute_force import cheapest_order, least_cost, least_memory_exact
from .graphs import budget_within, random_dag, random_order, random_step

Family = Callable[[int], CostGraph]

families = st.sampled_from([random_dag, random_step])
seeds = st.integers(0, 10**6)
phases = (Phase.explicit, Phase.reuse, Phase.generate)


def random_slicing(graph: CostGraph, seed: int, *, staged: bool) -> Slicing:
    """Some slices, some transients, some events if ``staged``; all of a small graph's, at times."""
    rng = Random(seed)
    share = rng.choice([0.0, 0.3, 0.6, 1.0])
    positions = range(graph.num_operators)
    pairs = [(f, x) for x in positions for f in range(x)]
    slices = {x for x in positions if rng.random() < share}
    transients = {pair for pair in pairs if rng.random() < share / 2}
    events = {pair for pair in pairs if staged and rng.random() < share}
    slices |= {y for _, x in events for y in (x - 1, x)}
    return Slicing(frozenset(slices), frozenset(transients), frozenset(events))


def check_rows(graph: CostGraph, slicing: Slicing, budget_bytes: int, order: list[int]) -> None:
    """The schedule, written as a solution, breaks no row and costs no more than it does."""
    g = graph_arrays(graph)
    schedule = Schedule(tuple(order))
    outcome = replay(graph, schedule)
    assert outcome.peak_bytes <= budget_bytes
    model = build_slice_model(g, slicing, budget_bytes)
    assert not model.infeasible
    values = solution_of(graph, g, model, schedule)
    lp = model.lp
    assert np.all(values >= np.array(lp.col_lower_) - 1e-9)
    assert np.all(values <= np.array(lp.col_upper_) + 1e-9)
    rows = csr_array(
        (
            np.array(lp.a_matrix_.value_),
            np.array(lp.a_matrix_.index_),
            np.array(lp.a_matrix_.start_),
        ),
        shape=(lp.num_row_, lp.num_col_),
    )
    activity = rows @ values
    broken = (activity < np.array(lp.row_lower_) - 1e-9) | (
        activity > np.array(lp.row_upper_) + 1e-9
    )
    assert not broken.any(), f"rows {np.flatnonzero(broken).tolist()}"
    added = float(np.dot(lp.col_cost_, values)) * graph.base_cost_ns / OBJECTIVE_SCALE
    assert graph.base_cost_ns + added <= outcome.cost_ns + 1e-6


def optimum_of(model: SliceModel) -> float:
    """Of the objective; infinite where there is no solution."""
    if model.infeasible:
        return math.inf
    if model.num_cols == 0:
        return 0.0
    h = quiet_highs(time_limit_s=20)
    h.setOptionValue("mip_rel_gap", 1e-9)
    h.passModel(model.lp)
    h.run()
    if h.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return math.inf
    assert h.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return float(h.getInfo().mip_dual_bound)


@settings(max_examples=25, deadline=None, phases=phases)
@given(family=families, seed=seeds, staged=st.booleans())
def test_no_slicing_bounds_above_the_optimum(family: Family, seed: int, staged: bool) -> None:
    """Whatever moments are chosen, the relaxation is no higher than the optimum of its scope."""
    graph = family(seed)
    budget_bytes = budget_within(graph, seed)
    slicing = random_slicing(graph, seed, staged=staged)
    optimum = least_cost(graph, budget_bytes, checkmate_class=slicing.staged)
    bound = optimum_of(build_slice_model(graph_arrays(graph), slicing, budget_bytes))
    if optimum is not None:
        assert bound < math.inf
        assert graph.base_cost_ns + rounded_bound(bound, graph.base_cost_ns) <= optimum


@settings(max_examples=25, deadline=None, phases=phases)
@given(family=families, seed=seeds)
def test_all_slices_and_events_are_exact_for_staged_schedules(family: Family, seed: int) -> None:
    """With every moment enforced the relaxation's optimum is that of staged schedules."""
    graph = family(seed)
    budget_bytes = budget_within(graph, seed)
    positions = range(graph.num_operators)
    everything = frozenset((f, x) for x in positions for f in range(x))
    slicing = Slicing(frozenset(positions), everything, everything)
    bound = optimum_of(build_slice_model(graph_arrays(graph), slicing, budget_bytes))
    optimum = least_cost(graph, budget_bytes, checkmate_class=True)
    if optimum is None:
        assert bound == math.inf
    else:
        assert graph.base_cost_ns + rounded_bound(bound, graph.base_cost_ns) == optimum


@settings(max_examples=25, deadline=None, phases=phases)
@given(family=families, seed=seeds)
def test_more_moments_bound_no_lower(family: Family, seed: int) -> None:
    """A slice at every operator has no lower optimum than a slice at some."""
    graph = family(seed)
    g = graph_arrays(graph)
    budget_bytes = budget_within(graph, seed)
    some = Slicing(random_slicing(graph, seed, staged=False).slices)
    every = Slicing(frozenset(range(graph.num_operators)))
    coarse, fine = (
        optimum_of(build_slice_model(g, slicing, budget_bytes)) for slicing in (some, every)
    )
    assert coarse <= fine + 1e-3


@settings(max_examples=150, deadline=None, phases=phases)
@given(family=families, seed=seeds, staged=st.booleans())
def test_every_order_satisfies_every_relaxation(family: Family, seed: int, staged: bool) -> None:
    """Any order of its scope, useless recomputations too, breaks no row at its own peak."""
    graph = family(seed)
    slicing = random_slicing(graph, seed + 1, staged=staged)
    order = random_order(graph, seed, staged=slicing.staged)
    budget_bytes = replay(graph, Schedule(tuple(order))).peak_bytes
    check_rows(graph, slicing, budget_bytes, order)


@settings(max_examples=25, deadline=None, phases=phases)
@given(family=families, seed=seeds, staged=st.booleans())
def test_optimal_orders_satisfy_every_relaxation(family: Family, seed: int, staged: bool) -> None:
    """The exact optimum of a tight budget breaks no row, and comes back no dearer."""
    graph = family(seed)
    lowest, peak = least_memory_exact(graph), keep_all_peak_bytes(graph)
    budget_bytes = lowest + (peak - lowest) * (seed % 3) // 3
    slicing = random_slicing(graph, seed + 1, staged=staged)
    order = cheapest_order(graph, budget_bytes, checkmate_class=slicing.staged)
    if order is None:
        assert slicing.staged
        return
    check_rows(graph, slicing, budget_bytes, list(order))
    g = graph_arrays(graph)
    model = build_slice_model(g, slicing, budget_bytes)
    back = schedule_of(g, model, solution_of(graph, g, model, Schedule(order)))
    assert back is not None
    assert replay(graph, back).cost_ns <= sum(graph.operators[v].cost_ns for v in order)
