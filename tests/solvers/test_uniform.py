from __future__ import annotations

from graph_capture.cost_graph import CostGraph, Operator
from solvers.replay import replay
from solvers.schedule import Schedule
from solvers.uniform import turning_point, uniform, uniform_under_budget

from .graphs import training_chain


def test_recomputes_each_segment_but_the_last() -> None:
    """Nine layers in three segments: f3, f4 and f0, f1 run again; f2 and f5 cross cuts."""
    graph = training_chain(9)
    schedule = uniform(graph, num_segments=3)
    assert schedule is not None
    forward = (0, 1, 2, 3, 4, 5, 6, 7, 8)
    last_segment = (9, 10, 11)  # b8, b7, b6
    middle = (12, 3, 4, 13, 14)  # b5 reads f5's output, which was kept
    first = (15, 0, 1, 16, 17)
    assert schedule.order == forward + last_segment + middle + first
    outcome = replay(graph, schedule)
    assert outcome.cost_ns == 10 * (18 + 4)
    # Under b8: x2, x5, x6, x7, x8 and its own gradient; keeping all needs ten blocks there.
    assert outcome.peak_bytes == 60


def test_takes_less_memory_and_more_time_than_keeping_all() -> None:
    """On sixteen equal layers the square root of them needs under 60 % of keep-all's peak."""
    graph = training_chain(16)
    schedule = uniform(graph)
    assert schedule is not None
    kept = replay(graph, Schedule.keep_all(graph))
    outcome = replay(graph, schedule)
    assert outcome.cost_ns > kept.cost_ns
    assert outcome.cost_ns <= 1.5 * kept.cost_ns
    assert outcome.peak_bytes <= 0.6 * kept.peak_bytes


def test_turns_where_phases_or_memory_say() -> None:
    """The backward pass begins after the last layer, whether phases are given or not."""
    assert turning_point(training_chain(5)) == 5
    assert turning_point(training_chain(5, with_phases=False)) in (5, 6)


def test_finds_the_cheapest_number_of_segments_that_fits() -> None:
    """With room for everything it recomputes nothing; with none it gives up."""
    graph = training_chain(9)
    peak = replay(graph, Schedule.keep_all(graph)).peak_bytes
    assert uniform_under_budget(graph, peak) == Schedule.keep_all(graph)
    assert uniform_under_budget(graph, 10) is None


def test_graphs_without_a_forward_part() -> None:
    """One operator, and operators that allocate nothing, are cut nowhere."""
    one = training_chain(1, with_phases=False)
    assert uniform_under_budget(one, 1000) == Schedule.keep_all(one)
    silent = CostGraph(tuple(Operator(name=f"o{v}", cost_ns=1) for v in range(6)), ())
    assert uniform(silent, num_segments=2) == Schedule.keep_all(silent)
