"""What a model was called with."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graph_capture.calls.call_spec import (
    TensorSpec,
    bind_call,
    call_forward,
    describe,
    difference,
    from_json,
    parse_dtype,
    realize,
    split_sample,
    tensors_of,
    to_json,
)


def _forward(x: Tensor, *more: Tensor, scale: float = 1.0, **named: Any) -> tuple[Any, ...]:
    return x, more, scale, named


def test_a_call_survives_being_bound() -> None:
    """Variable and named arguments arrive where they were meant to."""
    x, y = torch.ones(1), torch.zeros(1)
    bound = bind_call(_forward, (x, y), {"scale": 2.0, "mask": y})
    assert call_forward(_forward, bound) == (x, (y,), 2.0, {"mask": y})


@pytest.mark.parametrize(
    ("sample", "args", "kwargs"),
    [((1, 2), (1, 2), {}), ([1], (1,), {}), ({"a": 1}, (), {"a": 1})],
)
def test_samples_are_arguments(sample: Any, args: tuple, kwargs: dict) -> None:
    """A tuple or list is positional arguments, a dict keyword arguments."""
    assert split_sample(sample) == (args, kwargs)


def test_a_sample_of_another_kind_is_refused() -> None:
    """Anything else is refused by its type."""
    with pytest.raises(TypeError, match="got int"):
        split_sample(3)


def test_a_description_keeps_layout_and_grad() -> None:
    """Shape, strides, dtype and requires_grad survive description and realization."""
    t = torch.zeros(4, 6, dtype=torch.float64).t().requires_grad_()
    again = realize(describe({"x": [t, 3]}))["x"]
    assert again[1] == 3
    assert TensorSpec.of(again[0]) == TensorSpec.of(t)
    assert TensorSpec.of(t).stride == (1, 6)


def test_the_order_of_keys_does_not_matter_to_tensors() -> None:
    """Two calls that write their keyword arguments in another order have the same tensors."""
    a, b = torch.zeros(1), torch.ones(1)
    assert [t.item() for t in tensors_of({"b": b, "a": a})] == [0.0, 1.0]
    assert difference(describe({"b": b, "a": a}), describe({"a": a, "b": b})) is None


def test_the_order_of_keys_is_kept() -> None:
    """A realized mapping has its keys in the order in which they were written."""
    assert list(realize(describe({"b": torch.ones(1), "a": 2}))) == ["b", "a"]


@pytest.mark.parametrize(
    ("expected", "got", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), "planned was float32[2, 3] on cpu"),
        (torch.zeros(2, 3), torch.zeros(2, 3).double(), "float64[2, 3]"),
        (torch.zeros(2, 3), torch.zeros(3, 2).t(), "strides (1, 2), planned were (3, 1)"),
        (torch.zeros(2), torch.zeros(2, requires_grad=True), "requires_grad"),
        ({"a": 1}, {}, "input.a is missing"),
        ({}, {"a": 1}, "planned was none"),
        ([1, 2], [1], "has 1 items, planned were 2"),
        ([1, {"k": True}], [1, {"k": 1}], "input[1].k is 1, planned was True"),
        (None, torch.zeros(1), "planned was None"),
        (0.0, -0.0, "input is -0.0, planned was 0.0"),
        (np.float32(2), np.float64(2), "planned was np.float32(2.0)"),
        (slice(0, 4), slice(0, 5), "planned was slice(0, 4, None)"),
    ],
)
def test_the_first_difference_in_words(expected: Any, got: Any, words: str) -> None:
    """A difference names the place and both sides."""
    found = difference(describe(expected), describe(got))
    assert found is not None
    assert words in found


def test_equal_calls_have_no_difference() -> None:
    """Strides of an empty tensor and new tensors of one kind are no difference."""
    for a, b in ((torch.zeros(0, 3), torch.zeros(3, 0).t()), (torch.ones(2), torch.zeros(2))):
        assert difference(describe(a), describe(b)) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: float("nan"),
        lambda: np.float32(2.5),
        lambda: complex(1, float("nan")),
        lambda: torch.device("cpu"),
        lambda: slice(0, 1000 * 1000),
        lambda: range(5),
        lambda: bytes([1, 2]),
    ],
)
def test_plain_values_made_anew_are_no_difference(make: Callable[[], Any]) -> None:
    """A loop makes its arguments anew in each step."""
    assert difference(describe({"x": make()}), describe({"x": make()})) is None


def test_a_specification_as_json() -> None:
    """Tensors, containers, plain values and dtypes come back from JSON as they were."""
    spec = describe({"x": (torch.zeros(2, 3).t(), [1, None, "s", 2.5]), "d": torch.bfloat16})
    assert from_json(json.loads(json.dumps(to_json(spec)))) == spec


def test_an_object_cannot_be_written() -> None:
    """An argument of a kind that JSON does not know is refused by its type."""
    with pytest.raises(TypeError):
        to_json({"x": object()})


@pytest.mark.parametrize("data", [{}, {"code": "x"}, {"tuple": 3, "list": 4}, [1], {"value": []}])
def test_what_is_no_specification_is_refused(data: Any) -> None:
    """JSON of another form is refused."""
    with pytest.raises((ValueError, TypeError)):
        from_json(data)


@pytest.mark.parametrize("name", ["nn", "load", "no_such", "", None, 3])
def test_only_dtypes_are_reachable_by_name(name: Any) -> None:
    """A name in a file reaches dtypes and nothing else of torch."""
    with pytest.raises(ValueError, match="not a dtype"):
        parse_dtype(name)
