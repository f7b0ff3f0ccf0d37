"""How a call is described and told from another."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planner.base.call_guard import (
    CallGuard,
    autocast_dtype,
)
from planner.running.live_guard import LiveGuard, looks_of


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor, extra: Any = None, flag: bool = False) -> Tensor:
        return self.norm(self.linear(x))


def guards(arguments: dict[str, Any]) -> tuple[Model, LiveGuard]:
    model = Model()
    guard = CallGuard.of(model, arguments, "cpu")
    return model, LiveGuard(guard, model, "cpu", inspect.signature(model.forward))


X = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("planned", "called"),
    [
        ({"x": X}, {"x": X + 1}),
        ({"x": X}, {"x": X, "extra": None, "flag": False}),
        ({"x": X, "flag": False}, {"x": X}),
        ({"x": X, "extra": {"a": X, "b": 1}}, {"extra": {"a": X, "b": 1}, "x": X}),
        ({"x": X, "extra": [X, (X,)]}, {"x": X, "extra": [X, (X,)]}),
        ({"x": X, "extra": torch.float16}, {"x": X, "extra": torch.float16}),
    ],
)
def test_the_same_call(planned, called):
    """Other values, defaults spelt out and another order of arguments are the same call."""
    _, guard = guards(planned)
    assert guard.difference(called, looks_of(called)) is None


@pytest.mark.parametrize(
    ("called", "named"),
    [
        ({"x": torch.ones(3, 4)}, r"input\.x is float32\[3, 4\].*planned was float32\[2, 4\]"),
        ({"x": X.double()}, r"float64\[2, 4\]"),
        ({"x": X.clone().requires_grad_()}, "requires_grad"),
        ({"x": torch.ones(4, 2).t()}, "strides"),
        ({"x": X.to("meta")}, "on meta"),
        ({"x": None}, "None"),
        ({"x": X, "flag": True}, r"input\.flag is True, planned was False"),
        ({"x": X, "flag": 0}, r"input\.flag is 0, planned was False"),
        ({"x": X, "extra": X}, r"input\.extra"),
    ],
)
def test_another_call(called, named):
    """The first difference is named with what was given and what was planned."""
    import re

    _, guard = guards({"x": X})
    assert re.search(named, guard.difference(called, looks_of(called)))


def test_another_order_inside_an_argument():
    """Forward may go through a dict of it, and add or stack what it finds in order."""
    _, guard = guards({"x": X, "extra": [{"a": X, "b": 1}]})
    called = {"x": X, "extra": [{"b": 1, "a": X}]}
    found = guard.difference(called, looks_of(called))
    assert found == "input.extra[0] has its keys in the order b, a, planned was a, b"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.norm.eval(), "'norm' is in eval mode"),
        (lambda m: m.linear.weight.requires_grad_(False), r"state\.linear\.weight"),
        (lambda m: m.norm.double(), r"state\.norm\."),
        (lambda m: m.register_buffer("late", torch.ones(1)), None),
    ],
)
def test_another_state(change, named):
    """What changed on the module is named; what no graph reads is not."""
    import re

    model, guard = guards({"x": X})
    change(model)
    found = guard.difference({"x": X}, looks_of({"x": X}))
    assert (found is None) if named is None else re.search(named, found)


def test_autocast():
    """Autocast is part of a call, and its dtype is named."""
    _, guard = guards({"x": X})
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype("cpu") == "bfloat16"
        assert (
            guard.difference({"x": X}, looks_of({"x": X}))
            == "autocast is bfloat16, planned was off"
        )
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert guard.difference({"x": X}, looks_of({"x": X})) is None
    assert autocast_dtype("cpu") is None


def test_difference_of_two_guards():
    """Two descriptions of the same model differ only in the call."""
    model = Model()
    a = CallGuard.of(model, {"x": X}, "cpu")
    assert a.difference_to(CallGuard.of(model, {"x": X + 1}, "cpu")) is None
    assert "float32[1, 4]" in a.difference_to(CallGuard.of(model, {"x": X[:1]}, "cpu"))


def test_the_sign_of_zero_is_seen() -> None:
    """``1 / -0.0`` is another number than ``1 / 0.0``, though the two zeros are equal."""
    assert looks_of({"scale": 0.0}) == looks_of({"scale": 0.0}) != looks_of({"scale": -0.0})
