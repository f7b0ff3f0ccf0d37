from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.instances import layered
from graph_capture.cost_graph import CostGraph
from solvers.arrays import graph_arrays
from solvers.incumbent import Incumbent
from solvers.instances import budget_of, keep_all_peak_bytes, load_instance
from solvers.local_search import local_search
from solvers.parallel_search import ParallelSearch
from solvers.path_relinking import Pool
from solvers.portfolio import solve
from solvers.progress import ProgressEvent
from solvers.replay import replay
from solvers.retention_plan import (
    find_gaps,
    plan_from_schedule,
    schedule_from_plan,
)
from solvers.schedule import Schedule
from solvers.slices.refinement import slice_refinement
from solvers.slices.slicing import Slicing
from solvers.uniform import uniform_under_budget

from .graphs import INSTANCES, cost_graphs, exhaustive_optimum, training_chain

REPAIRED = "path_relinking after slice_refinement"


@settings(max_examples=60, deadline=None)
@given(graph=cost_graphs(), share=st.integers(40, 100))
def test_fits_and_is_never_below_the_optimum(graph: CostGraph, share: int) -> None:
    """Of whatever is put together, what comes out fits and is no cheaper than possible."""
    budget_bytes = keep_all_peak_bytes(graph) * share // 100
    pool = Pool(graph, budget_bytes, most=4)
    for other in (0, budget_bytes, 2 * budget_bytes):
        found = local_search(graph, other, num_moves=500).schedule
        if found is not None:
            pool.add(found)
    linked = pool.relink(Schedule.keep_all(graph), num_tries=200, time_limit_s=60)
    if linked is None:
        return
    outcome = replay(graph, linked)
    assert outcome.peak_bytes <= budget_bytes
    optimum = exhaustive_optimum(graph, budget_bytes)
    assert optimum is not None
    assert outcome.cost_ns >= optimum


def test_two_schedules_make_one_that_neither_is() -> None:
    """Between one that is too dear and one that is too large lies the optimum of the chain."""
    graph = training_chain(6)
    tight = solve(graph, 40).schedule
    assert tight is not None
    loose = Schedule.keep_all(graph)
    for budget_bytes in (50, 60):
        optimum = exhaustive_optimum(graph, budget_bytes)
        assert replay(graph, loose).peak_bytes > budget_bytes
        assert optimum is not None
        assert optimum < replay(graph, tight).cost_ns
        for start, other in ((tight, loose), (loose, tight)):
            pool = Pool(graph, budget_bytes, most=2)
            pool.add(other)
            linked = pool.relink(start, num_tries=500, time_limit_s=60)
            assert linked is not None
            outcome = replay(graph, linked)
            assert outcome.peak_bytes <= budget_bytes
            assert outcome.cost_ns == optimum


def test_is_better_than_all_that_it_is_made_of() -> None:
    """From a schedule that fits, among four others of a real network's graph."""
    graph = load_instance(INSTANCES / "chain32h.json")
    budget_bytes = budget_of(graph, 0.5)
    pool = Pool(graph, budget_bytes, most=8)
    found = [
        local_search(graph, budget_bytes, num_moves=3000, time_limit_s=60, seed=s) for s in range(5)
    ]
    costs = [outcome.cost_ns for outcome in found if outcome.cost_ns is not None]
    assert len(costs) == 5
    for outcome in found:
        assert outcome.schedule is not None
        pool.add(outcome.schedule)
    start = found[costs.index(min(costs))].schedule
    assert start is not None
    linked = pool.relink(start, num_tries=3000, time_limit_s=60)
    assert linked is not None
    assert replay(graph, linked).peak_bytes <= budget_bytes
    assert replay(graph, linked).cost_ns < min(costs)


@pytest.mark.parametrize(
    ("seed", "num_operators", "share", "order"),
    [
        (6, 14, 70, [0, 1, 2, 3, 4, 5, 6, 5, 7, 2, 6, 8, 2, 9, 1, 10, 11, 12, 13]),
        (4, 18, 80, [*range(15), 1, 15, 4, 16, 17]),
    ],
)
def test_where_the_plan_is_inexact_it_is_no_dearer_either(
    seed: int, num_operators: int, share: int, order: list[int]
) -> None:
    """What a retention plan makes of a schedule may be dearer than that, or too large."""
    graph = layered(num_operators, seed)
    budget_bytes = keep_all_peak_bytes(graph) * share // 100
    start = Schedule(tuple(order))
    before = replay(graph, start)
    assert before.peak_bytes <= budget_bytes
    g = graph_arrays(graph)
    gaps = find_gaps(g)
    planned = schedule_from_plan(g, gaps, plan_from_schedule(graph, gaps, start))
    assert planned is not None
    assert replay(graph, planned).cost_ns > before.cost_ns
    pool = Pool(graph, budget_bytes, most=2)
    pool.add(Schedule.keep_all(graph))
    for num_tries in (0, 50):
        linked = pool.relink(start, num_tries=num_tries, time_limit_s=60)
        assert linked is not None
        assert replay(graph, linked).peak_bytes <= budget_bytes
        assert replay(graph, linked).cost_ns <= before.cost_ns


def test_same_seed_same_schedule() -> None:
    """Cut by tries and not by time, two runs agree run by run; another seed is another run."""
    graph = load_instance(INSTANCES / "chain32h.json")
    budget_bytes = budget_of(graph, 0.5)
    start = uniform_under_budget(graph, budget_bytes)
    assert start is not None
    others = [
        outcome.schedule
        for share in (0.5, 0.6)
        if (outcome := local_search(graph, budget_of(graph, share), time_limit_s=60)).schedule
    ]

    def linked(seed: int) -> Schedule | None:
        pool = Pool(graph, budget_bytes, most=4)
        for other in others:
            pool.add(other)
        return pool.relink(start, num_tries=5, time_limit_s=60, seed=seed)

    results = [linked(seed) for seed in range(8)]
    assert results == [linked(seed) for seed in range(8)]
    assert len(set(results)) > 3


def test_nothing_fits() -> None:
    """Pieces of schedules that all exceed the budget everywhere make none that fits."""
    graph = training_chain(6)
    tight = solve(graph, 40).schedule
    assert tight is not None
    pool = Pool(graph, 10, most=3)
    pool.add(tight)
    assert pool.relink(Schedule.keep_all(graph), num_tries=100, time_limit_s=60) is None


def test_forgets_the_oldest() -> None:
    """A schedule that comes again is a new one."""
    graph = training_chain(6)
    schedules = [solve(graph, budget).schedule for budget in (40, 50, 60)]
    a, b, c = (s for s in schedules if s is not None)
    pool = Pool(graph, 50, most=2)
    for schedule in (a, b, a, c):
        pool.add(schedule)
    assert list(pool) == [a, c]


def test_ends_when_told() -> None:
    """Neither a billion tries nor an hour are waited for."""
    graph = training_chain(6)
    stop = threading.Event()
    stop.set()
    pool = Pool(graph, 10**6, most=2)
    start = Schedule.keep_all(graph)
    assert pool.relink(start, num_tries=10**9, time_limit_s=3600, stop=stop) == start
    assert pool.relink(start, num_tries=10**9, time_limit_s=0.0) == start


class _Listener:
    """A companion that only writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[Schedule] = []
        self.suggested: list[Slicing] = []

    def hear(self, schedule: Schedule) -> None:
        self.heard.append(schedule)

    def suggest(self, slicing: Slicing) -> None:
        self.suggested.append(slicing)

    def collect(self) -> None:
        pass


def _refined(
    *, candidates: NDArray[np.bool_] | None
) -> tuple[Incumbent, _Listener, set[str | None]]:
    """A chain at a low budget from a poor schedule, to the first repair or the end; who spoke."""
    graph = load_instance(INSTANCES / "chain64h.json")
    budget_bytes = budget_of(graph, 0.4)
    stop = threading.Event()
    listener = _Listener()

    spoke: set[str | None] = set()

    def end(event: ProgressEvent) -> None:
        spoke.add(event.solver)
        if event.solver == REPAIRED:
            stop.set()

    state = Incumbent(graph, budget_bytes, 50, end, stop)
    state.offer(uniform_under_budget(graph, budget_bytes), "hint")
    slice_refinement(state, companion=listener, candidates=candidates)
    return state, listener, spoke


def test_slice_refinement_repairs_its_solutions() -> None:
    """What fits is made of relaxed solutions that do not, and companions hear of those."""
    state, listener, spoke = _refined(candidates=None)
    assert listener.heard
    assert state.solver == REPAIRED
    assert REPAIRED in spoke


@pytest.mark.slow
def test_a_restricted_search_repairs_nothing() -> None:
    """Its bounds speak of its candidates only, and pieces of others would cross them."""
    graph = load_instance(INSTANCES / "chain64h.json")
    everything = np.ones(graph.num_operators, dtype=bool)
    _, listener, spoke = _refined(candidates=everything)
    assert listener.heard
    assert "slice_refinement" in spoke
    assert REPAIRED not in spoke


def test_the_second_thread_relinks_what_it_hears() -> None:
    """A solution that does not fit makes the best schedule better."""
    graph = training_chain(6)
    budget_bytes = 50
    tight = solve(graph, 40).schedule
    state = Incumbent(graph, budget_bytes, 60)
    assert state.offer(tight, "hint")
    parallel = ParallelSearch(state, seed=0, wanted=False)
    parallel.hear(Schedule.keep_all(graph))
    parallel._relink(0)
    parallel.collect()
    assert state.solver == "path_relinking"
    assert state.cost_ns == exhaustive_optimum(graph, budget_bytes)
