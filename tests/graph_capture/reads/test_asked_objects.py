"""What forward asks of objects, classes and names is compared, however it asks."""

from __future__ import annotations

import abc
import functools
import gc
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from .asking import Asks, Plain, asking, assert_found, helper, reads_of

Patch = pytest.MonkeyPatch

NAMED = 2.0

CACHE: dict[int, float] = {}


class Item:
    scale = 2.0

    def __class_getitem__(cls, key: Any) -> float:
        return cls.scale


class Meta(type):
    level = 2.0

    @property
    def gain(cls) -> float:
        return cls._gain

    def __getattr__(cls, name: str) -> float:
        if name != "made_up":
            raise AttributeError(name)
        return NAMED


class OfMeta(metaclass=Meta):
    _gain = 2.0


def _computed(model: Any) -> float:
    names: dict[str, Any] = dict(globals())
    exec("found = NAMED", names)
    return float(names["found"])


@functools.singledispatch
def registered(value: Any) -> float:
    return 2.0


class Abstract(abc.ABC):  # noqa: B024
    pass


def _global(model: Any) -> float:
    try:
        return NOT_THERE  # type: ignore[name-defined, no-any-return]
    except NameError:
        return 1.0


def _of_class(model: Any) -> float:
    try:
        return Plain.later  # type: ignore[attr-defined, no-any-return]
    except AttributeError:
        return 1.0


def _of_parameter(model: Any) -> float:
    try:
        return model.a.weight.later  # type: ignore[no-any-return]
    except AttributeError:
        return 1.0


def _imported(model: Any) -> float:
    try:
        import not_there_at_all  # type: ignore[import-not-found]
    except ImportError:
        return 1.0
    return float(not_there_at_all.gain)


WAYS: dict[str, tuple[Callable[[Any], float], Callable[[Asks, Patch], Any]]] = {
    "a slot that is filled later": (
        lambda model: getattr(model.slots, "later", 1.0),
        lambda model, patch: setattr(model.slots, "later", 3.0),
    ),
    "a key that is an object": (
        lambda model: next(iter(model.by_object)).value,
        lambda model, patch: setattr(next(iter(model.by_object)), "value", 3.0),
    ),
    "an event": (
        lambda model: float(model.event.is_set()),
        lambda model, patch: model.event.set(),
    ),
    "a lock": (
        lambda model: float(model.lock.locked()),
        lambda model, patch: model.lock.acquire(),
    ),
    "a queue": (
        lambda model: float(model.queue.qsize()),
        lambda model, patch: model.queue.put(1),
    ),
    "__class_getitem__": (
        lambda model: Item[0],  # type: ignore[type-arg, misc]
        lambda model, patch: patch.setattr(Item, "scale", 3.0),
    ),
    "property of a metaclass": (
        lambda model: OfMeta.gain,
        lambda model, patch: patch.setattr(OfMeta, "_gain", 3.0),
    ),
    "attribute of a metaclass": (
        lambda model: OfMeta.level,
        lambda model, patch: patch.setattr(Meta, "level", 3.0),
    ),
    "__getattr__ of a metaclass": (
        lambda model: OfMeta.made_up,  # type: ignore[attr-defined]
        lambda model, patch: patch.setitem(globals(), "NAMED", 3.0),
    ),
    "eval of a string": (
        lambda model: float(eval("NAMED + 0.0")),
        lambda model, patch: patch.setitem(globals(), "NAMED", 3.0),
    ),
    "eval of code": (
        lambda model: float(eval(model.code)),
        lambda model, patch: patch.setitem(globals(), "NAMED", 3.0),
    ),
    "exec in a copy of the globals": (
        _computed,
        lambda model, patch: patch.setitem(globals(), "NAMED", 3.0),
    ),
    "names of an object": (
        lambda model: float(len(dir(model.plain))),
        lambda model, patch: setattr(model.plain, "more", 1),
    ),
    "names of a class": (
        lambda model: float(len(dir(Plain))),
        lambda model, patch: patch.setattr(Plain, "more", 1, raising=False),
    ),
    "id of a parameter": (
        lambda model: CACHE.get(id(model.a.weight), 1.0),
        lambda model, patch: patch.setitem(CACHE, id(model.a.weight), 3.0),
    ),
    "weak reference": (
        lambda model: float(model.reference() is None),
        lambda model, patch: delattr(model, "held") or gc.collect(),
    ),
    "far inside": (
        lambda model: model.deep[0][0][0][0][0][0].value,
        lambda model, patch: setattr(model.deep[0][0][0][0][0][0], "value", 3.0),
    ),
    "far inside, an item": (
        lambda model: float(len(model.deep[0][0][0][0][0])),
        lambda model, patch: model.deep[0][0][0][0][0].append(1),
    ),
    "new attribute of a function": (
        lambda model: getattr(helper, "later", 1.0),
        lambda model, patch: patch.setattr(helper, "later", 3.0, raising=False),
    ),
    "new attribute of a function held": (
        lambda model: float(hasattr(model.function, "later")),
        lambda model, patch: setattr(model.function, "later", 3.0),
    ),
    "new attribute of a class": (
        lambda model: getattr(model.kind, "later", 1.0),
        lambda model, patch: patch.setattr(Plain, "later", 3.0, raising=False),
    ),
    "new name in a file": (
        lambda model: getattr(sys.modules[__name__], "LATER", 1.0),
        lambda model, patch: patch.setitem(globals(), "LATER", 3.0),
    ),
    "new name in a namespace": (
        lambda model: getattr(model.names, "later", 1.0),
        lambda model, patch: setattr(model.names, "later", 3.0),
    ),
    "new attribute of a parameter": (
        lambda model: getattr(model.a.weight, "_scale", 1.0),
        lambda model, patch: setattr(model.a.weight, "_scale", 3.0),
    ),
    "new attribute of a buffer": (
        lambda model: float(hasattr(model.mask, "_scale")),
        lambda model, patch: setattr(model.mask, "_scale", 3.0),
    ),
    "object on a parameter": (
        lambda model: model.a.weight.factor.value,
        lambda model, patch: setattr(model.a.weight.factor, "value", 3.0),
    ),
    "a template": (
        lambda model: float(model.template.substitute(a=2)),
        lambda model, patch: setattr(model.template, "template", "${a}1"),
    ),
    "a configuration": (
        lambda model: float(model.options["part"]["gain"]),
        lambda model, patch: model.options.set("part", "gain", "3"),
    ),
    "number of parameters": (
        lambda model: float(len(list(model.parameters()))),
        lambda model, patch: model.register_parameter("more", nn.Parameter(torch.ones(1))),
    ),
    "what singledispatch knows": (
        lambda model: registered(2.0),
        lambda model, patch: registered.register(type("New", (), {}), lambda value: 3.0),
    ),
    "what an abstract class knows": (
        lambda model: float(isinstance(model.plain, Abstract)),
        lambda model, patch: Abstract.register(type("Another", (), {})),
    ),
    "a global that comes later": (
        _global,
        lambda model, patch: patch.setitem(globals(), "NOT_THERE", 3.0),
    ),
    "a class attribute that comes later": (
        _of_class,
        lambda model, patch: patch.setattr(Plain, "later", 3.0, raising=False),
    ),
    "a parameter's attribute that comes later": (
        _of_parameter,
        lambda model, patch: setattr(model.a.weight, "later", 3.0),
    ),
    "a module that comes later": (
        _imported,
        lambda model, patch: patch.setitem(sys.modules, "not_there_at_all", sys),
    ),
}


@pytest.mark.parametrize("name", WAYS)
def test_another_answer_is_found(name: str, monkeypatch: Patch) -> None:
    """Before the quick comparison is made, and by it."""
    assert_found(*WAYS[name], monkeypatch)


SCALES = np.array([2.0, 3.0])


class _Config(dict[str, float]):
    __getattr__ = dict.__getitem__


def _goes_through_its_file(model: Asks) -> float:
    return sum(2.0 for name in globals() if name == "_Config")


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: float(SCALES[0]),
        lambda model: 2.0 if hasattr(SCALES, "shape") and not hasattr(SCALES, "later") else 1.0,
        lambda model: 2.0 if hasattr({1}, "add") and not hasattr({1}, "later") else 1.0,
        lambda model: 2.0 if hasattr(_Config(gain=2.0), "gain") else 1.0,
        lambda model: getattr(_Config(gain=2.0), "gain", 1.0),
        _goes_through_its_file,
    ],
    ids=["array", "of an array", "of a set", "hasattr", "getattr", "names"],
)
def test_answers_stay_what_they_are(ask: Callable[[Any], float]) -> None:
    """To ask is no error, and nothing has changed."""
    assert reads_of(asking(ask)).difference() is None
