"""Lookups beyond a table, which stand-ins do not notice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graph_capture.errors import CaptureError
from planner.sizing.position_tables import refuse_short_tables
from tests.capturing import capture_step


class Positions(nn.Module):
    """A learned vector for each place, counted from ``first``."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first
        self.table = nn.Embedding(8, 4)

    def forward(self, x):
        places = torch.arange(0, x.shape[1]).unsqueeze(0) + self.first
        return (x + self.table(places.expand(len(x), -1))).sum()


@pytest.mark.parametrize("first", [0, 3])
def test_a_table_is_refused_where_eager_fails(first):
    """The longest sequence that eager takes is captured, one more place is not."""
    for length in (8 - first, 9 - first):
        model, sample = Positions(first), torch.zeros(2, length, 4)
        captured = capture_step(model, {"x": sample})
        if length + first <= 8:
            model(sample)
            refuse_short_tables(captured)
            continue
        with pytest.raises(IndexError):
            model(sample)
        with pytest.raises(CaptureError, match=r"'table' looks up position 8 in a table of 8 rows"):
            refuse_short_tables(captured)


def test_positions_from_outside_are_not_judged():
    """Values of an input are not known."""
    captured = capture_step(nn.Embedding(8, 4), {"input": torch.full((2, 3), 99)})
    refuse_short_tables(captured)
