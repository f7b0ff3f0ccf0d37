"""Outputs, taken apart and put together."""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graph_capture.errors import NotFittingError
from graph_capture.recording.outputs import find_loss, take_apart


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


@dataclasses.dataclass(slots=True)
class _Slots:
    logits: torch.Tensor
    extra: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Frozen:
    logits: torch.Tensor


class _Hidden:
    """Keeps a tensor behind a property, beside a module."""

    __slots__ = ("_inner", "owner")

    def __init__(self, inner: torch.Tensor, owner: nn.Module) -> None:
        self._inner, self.owner = {"deep": [inner]}, owner

    @property
    def logits(self) -> torch.Tensor:
        return self._inner["deep"][0]


class _Batch(UserDict):
    @property
    def logits(self) -> torch.Tensor:
        return self.data["logits"]


class _Lookup(Mapping):
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.logits

    def __iter__(self) -> Iterator[str]:
        return iter(("logits",))

    def __len__(self) -> int:
        return 1


_MODULE = nn.Linear(1, 1)


@pytest.mark.parametrize(
    "make",
    [
        _Slots,
        _Frozen,
        lambda t: _Hidden(t, _MODULE),
        lambda t: _Batch(logits=t),
        _Lookup,
        lambda t: types.SimpleNamespace(logits=t),
        lambda t: _Slots(t, functools.partial(max, t)),
        lambda t: _Slots(t, collections.deque([t])),
    ],
)
def test_objects_of_all_kinds_come_back_with_new_tensors(make: Callable[[Any], Any]) -> None:
    """Slots, properties, mappings of their own: the output's type, and the new tensor in it."""
    old, new = torch.zeros(2), torch.ones(2)
    template, tensors = take_apart((make(old), 3))
    assert len(tensors) == 1
    (built, three) = template.build([new])
    assert type(built) is type(make(old))
    assert built.logits is new
    assert three == 3


class _ByAttribute(dict):
    """Answers to the names of its items, and with a KeyError to any other, as people write it."""

    __getattr__ = dict.__getitem__


def test_a_dict_that_is_asked_by_attribute_is_copied() -> None:
    """Though ``copy`` cannot ask it for anything."""
    inner = _ByAttribute(hidden=torch.zeros(1), names=["a"])
    output = _ByAttribute(loss=torch.zeros(()), inner=inner)
    template, tensors = take_apart(output)
    built = template.build([torch.full_like(t, 2.0) for t in tensors])
    assert type(built) is type(built.inner) is _ByAttribute
    assert (built.loss.item(), built.inner.hidden.item()) == (2.0, 2.0)
    assert built.inner.names == ["a"]
    assert built.inner.names is not inner.names
    assert find_loss(inner) is None


class _Ordered(collections.OrderedDict):
    __getattr__ = collections.OrderedDict.__getitem__


def test_an_ordered_dict_that_is_asked_by_attribute_keeps_its_order() -> None:
    """It has a way of its own to be filled."""
    output = _Ordered(b=torch.zeros(1), a=2)
    template, _ = take_apart(output)
    built = template.build([torch.ones(1)])
    assert type(built) is _Ordered
    assert list(built.items()) == [("b", torch.ones(1)), ("a", 2)]


def test_a_module_in_an_output_is_not_copied() -> None:
    """It is the model's own."""
    template, _ = take_apart(_Hidden(torch.zeros(1), _MODULE))
    assert template.build([torch.ones(1)]).owner is _MODULE


def test_a_tensor_in_a_function_of_an_output_is_refused() -> None:
    """A function is not copied, so it would hand out the stand-in."""
    hidden = torch.zeros(1)
    with pytest.raises(NotFittingError, match="_Slots holds tensors that its copies share"):
        take_apart(_Slots(torch.zeros(1), lambda: hidden))


def test_a_container_without_named_places_is_taken_apart() -> None:
    """As diffusers registers its outputs."""

    class Plain(dict):
        pass

    torch.utils._pytree.register_pytree_node(
        Plain, lambda d: (list(d.values()), list(d)), lambda v, k: Plain(zip(k, v, strict=True))
    )
    template, tensors = take_apart(Plain(sample=torch.zeros(1)))
    assert template.names == ("output 0",)
    built = template.build([torch.ones(1)])
    assert type(built) is Plain
    assert len(tensors) == 1


def test_shapes_arrays_and_bytes_come_out_as_they_are() -> None:
    """Also where such an object makes a new one of itself when it is asked what it holds."""
    output = (torch.zeros(2), torch.Size([2]), np.ones(2), b"ab", bytearray(b"cd"), 1j)
    template, tensors = take_apart(output)
    first, second = template.build(tensors), template.build(tensors)
    assert [type(value) for value in first] == [type(value) for value in output]
    first[2][0] = 5.0
    assert second[2].tolist() == [1.0, 1.0]
