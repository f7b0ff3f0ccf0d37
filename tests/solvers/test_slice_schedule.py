from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse import csr_array

from graph_capture.cost_graph import CostGraph
from solvers.arrays import graph_arrays
from solvers.highs import OBJECTIVE_SCALE
from solvers.least_memory import needs_bytes
from solvers.replay import replay
from solvers.retention_plan import (
    RetentionPlan,
    find_gaps,
    schedule_from_plan,
)
from solvers.schedule import Schedule
from solvers.slices.model import SliceModel, build_slice_model
from solvers.slices.schedule import schedule_of, solution_of, trim
from solvers.slices.slicing import Slicing
from solvers.stages import is_staged, order_of, stages_of

from .graphs import cost_graphs


def draw_schedule(graph: CostGraph, data: st.DataObject) -> Schedule | None:
    g = graph_arrays(graph)
    gaps = find_gaps(g)
    until = [data.draw(st.integers(int(a), int(b))) for a, b in zip(gaps.begin, gaps.end)]
    since = [data.draw(st.integers(int(a) + 1, int(b))) for a, b in zip(gaps.begin, gaps.end)]
    return schedule_from_plan(g, gaps, RetentionPlan(np.array(until, int), np.array(since, int)))


def satisfies(model: SliceModel, values: NDArray[np.float64]) -> bool:
    matrix = model.lp.a_matrix_
    rows = csr_array(
        (np.array(matrix.value_), np.array(matrix.index_), np.array(matrix.start_)),
        shape=(model.lp.num_row_, model.num_cols),
    )
    activity = rows @ values
    return bool(
        np.all(values <= 1.0)
        and np.all(activity >= np.array(model.lp.row_lower_) - 1e-9)
        and np.all(activity <= np.array(model.lp.row_upper_) + 1e-9)
    )


def check_solution(graph: CostGraph, model: SliceModel, schedule: Schedule) -> None:
    """``schedule`` as a solution breaks no row, and comes back costing no more."""
    g = graph_arrays(graph)
    outcome = replay(graph, schedule)
    assert not model.infeasible
    values = solution_of(graph, g, model, schedule)
    assert satisfies(model, values)
    cost = float(np.dot(model.lp.col_cost_, values)) * graph.base_cost_ns / OBJECTIVE_SCALE
    assert graph.base_cost_ns + cost <= outcome.cost_ns + 1e-6

    for staged in (False, True):
        back = schedule_of(g, model, values, staged=staged)
        assert back is not None
        assert replay(graph, back).cost_ns <= outcome.cost_ns
        assert is_staged(back) or not staged


@settings(max_examples=300, deadline=None)
@given(graph=cost_graphs(), data=st.data())
def test_every_schedule_satisfies_every_relaxation(graph: CostGraph, data: st.DataObject) -> None:
    """A schedule written as a solution breaks no row at its own peak, and costs no more there."""
    schedule = draw_schedule(graph, data)
    if schedule is None:
        return
    operators = st.integers(0, graph.num_operators - 1)
    slicing = Slicing(
        frozenset(data.draw(st.sets(operators))),
        frozenset(data.draw(st.sets(st.tuples(operators, operators), max_size=6))),
    )
    peak_bytes = replay(graph, schedule).peak_bytes
    check_solution(graph, build_slice_model(graph_arrays(graph), slicing, peak_bytes), schedule)


@settings(max_examples=300, deadline=None)
@given(graph=cost_graphs(), data=st.data())
def test_every_staged_schedule_satisfies_all_events(graph: CostGraph, data: st.DataObject) -> None:
    """The same for staged schedules, with a slice everywhere and every event."""
    drawn = draw_schedule(graph, data)
    if drawn is None:
        return
    g = graph_arrays(graph)
    schedule = trim(g, order_of(stages_of(drawn)))
    assert is_staged(schedule)
    n = graph.num_operators
    slicing = Slicing(
        frozenset(range(n)), events=frozenset((f, x) for x in range(n) for f in range(x))
    )
    peak_bytes = replay(graph, schedule).peak_bytes
    check_solution(graph, build_slice_model(g, slicing, peak_bytes), schedule)
    if peak_bytes > needs_bytes(g).max():
        model = build_slice_model(g, slicing, peak_bytes - 1)
        values = solution_of(graph, g, model, schedule)
        assert not satisfies(model, values), "the model does not see the peak"
