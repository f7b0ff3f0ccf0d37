"""Axes of a mesh, stages and traffic, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from planner.mesh.communication import all_reduced, gathered, rates, traffic
from planner.mesh.mesh import Mesh


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"ep": 8}, "not 'ep'"),
        ({"tp": 0}, "axis 'tp' has a whole number of ranks, got 0"),
        ({"dp": True}, "axis 'dp' has a whole number of ranks, got True"),
        (8, "mesh is such as"),
    ],
)
def test_other_axes_are_refused_by_name(axes: Any, words: str) -> None:
    """Experts, nothing, a boolean, a number."""
    with pytest.raises(ValueError, match=words):
        Mesh.of(axes)


def test_a_ring_sends_each_part_but_one() -> None:
    """Eight ranks, 800 bytes: 700 to gather, twice that to sum; one rank sends nothing."""
    assert (gathered(800, 8), all_reduced(800, 8), all_reduced(800, 1)) == (700, 1400, 0)


def test_bandwidths_come_from_the_caller_then_from_data_sheets() -> None:
    """Sixteen ranks leave a machine of eight; an unknown device has none."""
    assert rates("h100", 8, None)[0] == {"dp": 50e9, "tp": 450e9, "pp": 50e9}
    assert rates("h100", 16, None)[0]["tp"] == 50e9
    assert rates("cpu", 1, None) == ({}, "")
    assert rates("cpu", 1, {"tp": 2})[0] == {"tp": 2e9}
    for given, words in (({"ep": 1}, "got 'ep'"), ({"tp": 0}, "above 0, got 0")):
        with pytest.raises(ValueError, match=words):
            rates("h100", 8, given)


def test_what_computation_hides_is_not_exposed() -> None:
    """1000 bytes at 1 GB/s are a microsecond; 0.4 of it are hidden, or all."""
    sent = traffic("dp", "sums", count=1, sent_bytes=1000, rate=1e9, hidden_us=0.4)
    assert (sent.time_us, sent.exposed_us) == (1.0, pytest.approx(0.6))
    assert traffic("dp", "sums", count=1, sent_bytes=1000, rate=1e9, hidden_us=9).exposed_us == 0
    unknown = traffic("dp", "sums", count=1, sent_bytes=1000, rate=None)
    assert (unknown.time_us, unknown.exposed_us) == (None, None)
