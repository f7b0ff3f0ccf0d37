from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph
from solvers.arrays import graph_arrays
from solvers.replay import replay
from solvers.retention_plan import (
    RetentionPlan,
    find_gaps,
    keep_all_plan,
    plan_from_schedule,
    schedule_from_plan,
)
from solvers.schedule import Schedule

from .graphs import cost_graphs, training_chain


@settings(max_examples=200, deadline=None)
@given(graph=cost_graphs(), data=st.data())
def test_every_plan_gives_a_valid_schedule(graph: CostGraph, data: st.DataObject) -> None:
    """Whatever a plan drops and catches, its schedule passes the replay."""
    g = graph_arrays(graph)
    gaps = find_gaps(g)
    until = [data.draw(st.integers(int(a), int(b))) for a, b in zip(gaps.begin, gaps.end)]
    since = [data.draw(st.integers(int(a) + 1, int(b))) for a, b in zip(gaps.begin, gaps.end)]
    schedule = schedule_from_plan(
        g, gaps, RetentionPlan(np.array(until, int), np.array(since, int))
    )
    if schedule is not None:
        replay(graph, schedule)


@settings(max_examples=50, deadline=None)
@given(graph=cost_graphs())
def test_dropping_nothing_recomputes_nothing(graph: CostGraph) -> None:
    """The plan that keeps everything expands to the base order."""
    g = graph_arrays(graph)
    gaps = find_gaps(g)
    assert schedule_from_plan(g, gaps, keep_all_plan(gaps)) == Schedule.keep_all(graph)


def test_recomputes_just_in_time() -> None:
    """A dropped activation is made again right before the operator that reads it."""
    graph = training_chain(3)
    g = graph_arrays(graph)
    gaps = find_gaps(g)
    plan = keep_all_plan(gaps)
    h = gaps.ptr[1] + 1  # from f2, which reads x1, to b1
    plan.until[h] = gaps.begin[h]
    assert schedule_from_plan(g, gaps, plan) == Schedule((0, 1, 2, 3, 1, 4, 5))


def test_recomputes_what_a_recomputation_misses() -> None:
    """When x0 is gone too, it comes back first, and is caught for its own later use."""
    graph = training_chain(3)
    g = graph_arrays(graph)
    gaps = find_gaps(g)
    plan = keep_all_plan(gaps)
    for k in (0, 1):
        h = gaps.ptr[k] + 1
        plan.until[h] = gaps.begin[h]
    assert schedule_from_plan(g, gaps, plan) == Schedule((0, 1, 2, 3, 0, 1, 4, 0, 5))
    plan.since[gaps.ptr[0] + 1] = 4
    assert schedule_from_plan(g, gaps, plan) == Schedule((0, 1, 2, 3, 0, 1, 4, 5))


def test_a_plan_read_off_a_schedule_gives_it_back() -> None:
    """The plan of an expanded schedule expands to the same schedule."""
    graph = training_chain(3)
    g = graph_arrays(graph)
    gaps = find_gaps(g)
    schedule = Schedule((0, 1, 2, 3, 0, 1, 4, 5))
    assert schedule_from_plan(g, gaps, plan_from_schedule(graph, gaps, schedule)) == schedule
