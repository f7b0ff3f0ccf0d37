"""Arrays and iterators that forward changes in place are found."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from graph_capture.errors import CaptureError

from ..odd import Three, plan_of


class CountsInArray(Three):
    def prepare(self) -> None:
        self.calls = np.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return self.c(self.a(x))


class Advances(Three):
    def prepare(self) -> None:
        self.gains: Any = self.numbers()

    def numbers(self) -> Any:
        return itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x)) * next(self.gains)


class AdvancesGenerator(Advances):
    def numbers(self) -> Any:
        return (2.0 * i for i in range(100))


class AdvancesCycle(Advances):
    def numbers(self) -> Any:
        return itertools.cycle([1.0, 2.0])


class AdvancesList(Advances):
    def numbers(self) -> Any:
        return enumerate([1.0, 2.0, 3.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x)) * next(self.gains)[1]


@pytest.mark.parametrize(
    "make", [CountsInArray, Advances, AdvancesGenerator, AdvancesCycle, AdvancesList]
)
def test_what_is_written_or_advanced_in_place_is_refused(make: Callable[[], nn.Module]) -> None:
    """Numbers of an array and places of iterators, by name; the array is as before."""
    model = make()
    with pytest.raises(CaptureError, match=r"writes to 'calls'|advances 'gains'"):
        plan_of(model)
    assert not np.any(getattr(model, "calls", 0))
