from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest

from solvers.instances import budget_of, load_instance
from solvers.portfolio import solve
from solvers.progress import ProgressEvent

from .graphs import INSTANCES, training_chain


def events_of_a_solve() -> list[ProgressEvent]:
    graph = load_instance(INSTANCES / "chain8h.json")
    events: list[ProgressEvent] = []
    result = solve(graph, budget_of(graph, 0.6), time_limit_s=20, progress=events.append)
    assert events
    assert events[-1].incumbent_ns == result.cost_ns
    assert events[-1].bound_ns == result.lower_bound_ns
    assert events[-1].gap == result.gap
    return events


def test_events_only_get_better() -> None:
    """Time goes on, schedules get no slower and bounds no lower; the last event is the result."""
    for before, after in pairwise(events_of_a_solve()):
        assert before.elapsed_s <= after.elapsed_s
        assert before.bound_ns <= after.bound_ns
        if before.incumbent_ns is not None:
            assert after.incumbent_ns is not None
            assert after.incumbent_ns <= before.incumbent_ns


def test_the_gap_is_relative_to_the_bound() -> None:
    """Each event's gap follows from its own two figures, and there is none without a schedule."""
    for event in events_of_a_solve():
        if event.incumbent_ns is None:
            assert event.gap is None
        else:
            assert event.gap == (event.incumbent_ns - event.bound_ns) / event.bound_ns


def test_every_event_is_a_line_of_the_log() -> None:
    """What the listener hears is what the result's log says, in the same order."""
    events: list[ProgressEvent] = []
    result = solve(training_chain(6), 50, time_limit_s=20, progress=events.append)
    assert [line.split("s  ", 1)[1] for line in result.log] == [e.message for e in events]


def test_events_cannot_be_changed() -> None:
    """A listener cannot tamper with what the next one hears."""
    event = events_of_a_solve()[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.bound_ns = 0  # type: ignore[misc]
