"""Outputs, taken apart and put together."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from graph_capture.outputs import find_loss, take_apart


class _Pair(NamedTuple):
    left: Tensor
    right: Tensor


def test_containers_come_back_in_their_types() -> None:
    """Tuples, named tuples, dicts, lists and constants keep their types and places."""
    a, b = torch.zeros(1), torch.ones(1)
    output = (_Pair(a, b), OrderedDict(x=[a, None, "s"]), {"y": 3})
    template, tensors = take_apart(output)
    assert [id(t) for t in tensors] == [id(a), id(b)]
    new = [torch.full((1,), 5.0), torch.full((1,), 6.0)]
    pair, ordered, plain = template.build(new)
    assert type(pair) is _Pair
    assert pair.left is new[0]
    assert pair.right is new[1]
    assert type(ordered) is OrderedDict
    assert ordered["x"] == [new[0], None, "s"]
    assert plain == {"y": 3}


def test_opaque_objects_are_copied_with_new_tensors() -> None:
    """An object that holds tensors comes back as a copy that holds the new ones."""
    cache = SimpleNamespace(layers=[{"key": torch.zeros(2)}], length=4)
    template, tensors = take_apart((cache,))
    new = torch.ones(2)
    (copied,) = template.build([new])
    assert len(tensors) == 1
    assert copied is not cache
    assert copied.layers[0]["key"] is new
    assert copied.length == 4
    assert cache.layers[0]["key"] is tensors[0]


def test_places_have_names() -> None:
    """Each tensor is named by where it is in the output."""
    template, _ = take_apart({"logits": torch.zeros(1), "more": [torch.ones(1)]})
    assert template.names == ("logits", "more.0")
    assert take_apart(torch.zeros(1))[0].names == ("output",)


def test_which_output_is_the_loss() -> None:
    """The scalar that requires grad, or the attribute of that name; no other."""
    scalar = torch.zeros((), requires_grad=True) * 1
    assert find_loss(scalar) is scalar
    assert find_loss(SimpleNamespace(loss=scalar)) is scalar
    assert find_loss(torch.zeros(2, requires_grad=True)) is None
    assert find_loss(torch.zeros(())) is None
    assert find_loss({"logits": scalar}) is None
    assert find_loss(SimpleNamespace(loss=None)) is None
