"""Schedules across batch sizes, and what they say of the next one."""

from __future__ import annotations

import math

import pytest

from graph_capture import capture
from planner.sizing.fitting import MemoryLines, find_fit, quick_plan, wiring_of
from solvers.least_memory import least_memory
from solvers.replay import replay
from solvers.schedule import Schedule
from tests.planner.small import make, sample, square


@pytest.fixture(scope="module")
def graphs():
    """The same step at three batch sizes."""
    model = make()
    return {rows: capture(model, sample(rows=rows), loss_fn=square) for rows in (64, 96, 200)}


def test_a_schedule_is_valid_at_other_batches(graphs):
    """Wiring is the same, sizes are not, and replay takes the schedule of one for the other."""
    assert wiring_of(graphs[64]) == wiring_of(graphs[96])
    assert graphs[64].fingerprint != graphs[96].fingerprint
    least = least_memory(graphs[64], time_limit_s=2)
    assert replay(graphs[96], least.schedule).peak_bytes > least.peak_bytes


def test_lines_meet_a_third_batch(graphs):
    """A limit that just holds 200 rows is extrapolated from 64 and 96 rows, for any schedule."""
    for schedule in (
        Schedule.keep_all(graphs[64]),
        least_memory(graphs[64], time_limit_s=2).schedule,
    ):
        lines = MemoryLines.through(schedule, (64, graphs[64]), (96, graphs[96]))
        limit = replay(graphs[200], schedule).peak_bytes
        assert math.floor(lines.largest_within(limit)) == 200
        assert math.floor(lines.largest_within(limit - 1)) == 199


def test_a_limit_below_what_never_grows(graphs):
    """No batch fits; and where nothing grows, every batch does."""
    lines = MemoryLines.through(Schedule.keep_all(graphs[64]), (64, graphs[64]), (96, graphs[96]))
    assert lines.largest_within(graphs[64].resident_bytes // 100) < 1
    flat = MemoryLines(
        at_batch=4, memory_bytes=lines.memory_bytes, slope_bytes=0 * lines.slope_bytes
    )
    assert flat.largest_within(10**12) == math.inf
    assert flat.largest_within(1) == 0


def test_known_schedules_are_tried_before_any_search(graphs):
    """What fits at one batch fits at another without a search."""
    least = least_memory(graphs[64], time_limit_s=2)
    limit = replay(graphs[96], least.schedule).peak_bytes
    fit = find_fit(graphs[96], limit, known=[least.schedule], thrifty=True, time_limit_s=2)
    assert fit.schedule == least.schedule
    assert fit.least is None


def test_nothing_fits(graphs):
    """The search says the least it found and what is proven."""
    fit = find_fit(graphs[64], 1, time_limit_s=1)
    assert fit.schedule is None
    assert fit.least is not None
    assert fit.least.lower_bound_bytes > 1


def test_a_quick_plan_fits(graphs):
    """It starts from what is known to fit and stays within the limit."""
    graph = graphs[200]
    least = least_memory(graph, time_limit_s=2)
    limit = (least.peak_bytes + replay(graph, Schedule.keep_all(graph)).peak_bytes) // 2
    plan = quick_plan(graph, limit, least.schedule, time_limit_s=1)
    assert replay(graph, plan.schedule).peak_bytes == plan.peak_bytes <= limit
    assert graph.base_cost_ns < plan.cost_ns <= replay(graph, least.schedule).cost_ns
