from __future__ import annotations

import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph
from solvers.instances import budget_of, keep_all_peak_bytes, load_instance
from solvers.local_search import local_search
from solvers.path_relinking import Pool
from solvers.portfolio import solve
from solvers.replay import replay
from solvers.schedule import Schedule

from .graphs import INSTANCES, cost_graphs, exhaustive_optimum, training_chain


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


def test_is_no_worse_than_where_it_begins() -> None:
    """From a schedule that fits, among four others of a real network's graph."""
    graph = load_instance(INSTANCES / "chain32h.json")
    budget_bytes = budget_of(graph, 0.5)
    pool = Pool(graph, budget_bytes, most=8)
    found = [local_search(graph, budget_bytes, num_moves=3000, seed=s) for s in range(5)]
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


def test_same_seed_same_schedule() -> None:
    """Cut by tries and not by time, two runs agree run by run."""
    graph = training_chain(6)
    tight = solve(graph, 40).schedule
    assert tight is not None

    def linked(seed: int) -> Schedule | None:
        pool = Pool(graph, 50, most=2)
        pool.add(tight)
        return pool.relink(Schedule.keep_all(graph), num_tries=100, time_limit_s=60, seed=seed)

    assert linked(3) is not None
    assert linked(3) == linked(3)


def test_nothing_fits() -> None:
    """Pieces of schedules that all exceed the budget everywhere make none that fits."""
    graph = training_chain(6)
    pool = Pool(graph, 10, most=2)
    pool.add(Schedule.keep_all(graph))
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
