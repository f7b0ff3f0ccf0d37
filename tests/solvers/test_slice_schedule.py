from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from graph_capture.cost_graph import CostGraph
from solvers.arrays import graph_arrays
from solvers.expand import RetentionPlan, expand, find_gaps
from solvers.highs import OBJECTIVE_SCALE
from solvers.replay import replay
from solvers.slice_model import Slicing, build_slice_model
from solvers.slice_schedule import schedule_of, solution_of

from .graphs import cost_graphs


@settings(max_examples=300, deadline=None)
@given(graph=cost_graphs(), data=st.data())
def test_every_schedule_satisfies_every_relaxation(graph: CostGraph, data: st.DataObject) -> None:
    """A schedule written as a solution breaks no row at its own peak, and costs no more there."""
    g = graph_arrays(graph)
    gaps = find_gaps(g)
    until = [data.draw(st.integers(int(a), int(b))) for a, b in zip(gaps.begin, gaps.end)]
    since = [data.draw(st.integers(int(a) + 1, int(b))) for a, b in zip(gaps.begin, gaps.end)]
    schedule = expand(g, gaps, RetentionPlan(np.array(until, int), np.array(since, int)))
    if schedule is None:
        return
    operators = st.integers(0, graph.num_operators - 1)
    slicing = Slicing(
        frozenset(data.draw(st.sets(operators))),
        tuple(sorted(data.draw(st.dictionaries(operators, st.integers(1, 3))).items())),
        frozenset(data.draw(st.sets(st.tuples(operators, operators), max_size=6))),
    )
    outcome = replay(graph, schedule)
    model = build_slice_model(g, slicing, outcome.peak_bytes)
    assert not model.infeasible
    values = solution_of(graph, g, model, schedule)
    matrix = model.lp.a_matrix_
    rows = csr_array(
        (np.array(matrix.value_), np.array(matrix.index_), np.array(matrix.start_)),
        shape=(model.lp.num_row_, model.num_cols),
    )
    activity = rows @ values
    assert np.all(activity >= np.array(model.lp.row_lower_) - 1e-9)
    assert np.all(activity <= np.array(model.lp.row_upper_) + 1e-9)
    cost = float(np.dot(model.lp.col_cost_, values)) * graph.base_cost_ns / OBJECTIVE_SCALE
    assert graph.base_cost_ns + cost <= outcome.cost_ns + 1e-6

    back = schedule_of(g, model, values)
    assert back is not None
    assert replay(graph, back).cost_ns <= outcome.cost_ns
