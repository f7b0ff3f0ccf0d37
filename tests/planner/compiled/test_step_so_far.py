"""What graphs of one step hold for each other."""

from __future__ import annotations

import pytest

from planner import PlanError
from planner.compiled.step_so_far import Part, StepSoFar

FIRST = Part(
    own_bytes=100, peak_bytes=700, saved_bytes=300, gradient_bytes=100, output_bytes=(40, 8)
)
LAST = Part(own_bytes=140, peak_bytes=900, saved_bytes=50, gradient_bytes=140, output_bytes=(4,))


def test_a_later_graph_finds_what_earlier_ones_took_and_saved() -> None:
    """Without what it takes from them, which is among its own inputs."""
    step = StepSoFar(parts=[FIRST])
    assert step.held_bytes([]) == 400
    assert step.held_bytes([40]) == 360
    assert step.held_bytes([40, 40]) == 360


def test_an_earlier_backward_finds_parameters_and_gradients_of_later_graphs() -> None:
    """100 of each here, and a loss; an error says so, and what has to be counted."""
    step = StepSoFar(parts=[FIRST])
    with pytest.raises(PlanError, match=r"graph 0 runs.* later_bytes=204\b"):
        step.add(LAST, [40], 903, 0)
    step.add(LAST, [40], 904, 0)
    assert step.parts == [FIRST, LAST]


def test_what_plans_have_counted_for_later_graphs_is_not_counted_again() -> None:
    """The first part's peak is then with it."""
    StepSoFar(parts=[FIRST]).add(LAST, [40], 800, 104)
    with pytest.raises(PlanError, match=r"\b1 B above"):
        StepSoFar(parts=[FIRST]).add(LAST, [40], 799, 104)
