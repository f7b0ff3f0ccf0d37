"""What objects among the arguments of a call hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import Tensor

from graph_capture.calls.call_spec import bind_call
from graph_capture.errors import CaptureError
from tests.capturing import trace_step

from ..odd import WIDTH, Three, mean_square, normal


class _IsGiven(Three):
    def forward(self, x: Tensor, scale: Any, table: Any) -> Tensor:
        return self.c(self.a(x) * scale(1.0) * float(table[0]))


class _Scale:
    by = 2.0

    def __call__(self, value: float) -> float:
        return value * self.by


@pytest.mark.parametrize("what", ["scale", "table"])
@pytest.mark.parametrize("looks", [0, 2])
def test_what_an_argument_holds_is_compared(what: str, looks: int) -> None:
    """Of an object that is called, and of an array, which stay the same objects."""
    scale, table = _Scale(), np.ones(2)
    model = _IsGiven()
    arguments = bind_call(model.forward, (normal(0, 16, WIDTH), scale, table), {})
    reads = trace_step(model, arguments, mean_square).reads
    for _ in range(looks):
        assert reads.difference() is None
    if what == "scale":
        scale.by = 3.0
    else:
        table[0] = 3.0
    assert reads.difference() is not None


class _AsksArgument(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * getattr(x, "gain", 1.0)


def test_an_attribute_of_an_argument_is_refused() -> None:
    """The next call's tensor may have another; one without any is planned."""
    model, x = _AsksArgument(), normal(0, 16, WIDTH)
    trace_step(model, bind_call(model.forward, (x,), {}), mean_square)
    x.gain = 2.0  # type: ignore[attr-defined]
    with pytest.raises(CaptureError, match="'gain', which somebody has put on a tensor"):
        trace_step(model, bind_call(model.forward, (x,), {}), mean_square)
