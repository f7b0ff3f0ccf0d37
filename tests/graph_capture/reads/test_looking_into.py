"""By whatever way a value reaches forward, its change is found."""

from __future__ import annotations

import contextvars
import copy
import ctypes
import functools
import multiprocessing
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .. import settings
from ..odd import Three
from .test_reads import Config, reads_of

LEVEL: contextvars.ContextVar[float] = contextvars.ContextVar("LEVEL", default=2.0)

OF_THREAD = threading.local()

OF_THREAD.gain = 2.0

REACH = 2.0
DEFAULTS = {"gain": 2.0, "least": -1.0}

CACHED = [2.0]


def scaled(x: Tensor, by: dict[str, float], gain: float = 1.0, more: Any = DEFAULTS) -> Tensor:
    return x * by["k"] * gain * more["gain"]


def times(x: Tensor, *, factor: float) -> Tensor:
    return x * factor


def by_default(x: Tensor, scale: Any = lambda: DEFAULTS["least"]) -> Tensor:
    return x.clamp(min=scale())


def stepped(x: Tensor) -> Tensor:
    return x * stepped.by  # type: ignore[attr-defined]


def held_by_the_model() -> float:
    return 1.0


stepped.by = 2.0  # type: ignore[attr-defined]

held_by_the_model.strength = 2.0  # type: ignore[attr-defined]


@functools.lru_cache
def cached() -> float:
    return CACHED[0]


class Above(Three):
    factor = 2.0


class Odd(Above):
    """Reads numbers by ways that leave no name of an attribute in the code."""

    def prepare(self) -> None:
        self.by = {"k": 2.0}
        self.options = Config()
        self.act = functools.partial(scaled, by=self.by, gain=2.0)
        self.view = types.MappingProxyType(self.by)
        self.file = settings
        self.order = {"a": 2.0, "b": 0.5}
        self.others = [nn.Dropout(1.0).eval()]
        self.lent = Config()
        self.borrowed = weakref.ref(self.lent)
        self.stands_for, self.copied = Config(), Config()
        self.proxy = weakref.proxy(self.stands_for)
        self.member = Config()
        self.members = weakref.WeakSet([self.member])
        self.number, self.shared = ctypes.c_double(2.0), multiprocessing.Value("d", 2.0)
        self.memory = memoryview(bytearray(b"\x01"))
        self.register_buffer("mask", None)
        self.own = held_by_the_model

    def forward(self, x: Tensor) -> Tensor:
        from .. import settings as here

        held = settings
        h = self.act(self.a(x)) * self.view["k"] * self.factor * LEVEL.get() * OF_THREAD.gain
        h = h * here.GAIN + self.file.SHIFT + getattr(held, "SLOPE") + globals()["REACH"]  # noqa: B009
        h = times(h, factor=vars(self.options)["gain"])
        h = h * self.borrowed().gain * self.proxy.gain * copy.copy(self.copied).gain
        h = h * sum(each.gain for each in self.members) * self.own.strength
        h = stepped(by_default(h)) * self.number.value * self.shared.value * self.memory[0]
        h = h * vars(self).get("late", 1.0) * (1 + len([k for k in vars(self) if "more" in k]))
        h = h * cached() if self.mask is None and not hasattr(self, "registered") else h.abs()
        for value in self.order.values():
            h = h.clamp(max=1.0) * value
        return self.c(self.others[0](h))


WAYS: dict[str, Callable[[Odd, pytest.MonkeyPatch], Any]] = {
    "by": lambda model, patch: model.by.update(k=3.0),
    "act": lambda model, patch: model.act.keywords.update(gain=3.0),
    "Odd.factor": lambda model, patch: patch.setattr(Odd, "factor", 3.0, raising=False),
    "LEVEL": lambda model, patch: LEVEL.set(3.0),
    "OF_THREAD": lambda model, patch: patch.setattr(OF_THREAD, "gain", 3.0),
    "settings.GAIN": lambda model, patch: patch.setattr(settings, "GAIN", 3.0),
    "settings.SHIFT": lambda model, patch: patch.setattr(settings, "SHIFT", 3.0),
    "settings.SLOPE": lambda model, patch: patch.setattr(settings, "SLOPE", 3.0),
    "REACH": lambda model, patch: patch.setitem(globals(), "REACH", 3.0),
    "gain": lambda model, patch: setattr(model.options, "gain", 3.0),
    "DEFAULTS": lambda model, patch: patch.setitem(DEFAULTS, "gain", 3.0),
    "order": lambda model, patch: model.order.update(a=model.order.pop("a")),
    "training": lambda model, patch: model.others[0].train(),
    "borrowed": lambda model, patch: setattr(model.lent, "gain", 3.0),
    "proxy": lambda model, patch: setattr(model.stands_for, "gain", 3.0),
    "members": lambda model, patch: setattr(model.member, "gain", 3.0),
    "copied": lambda model, patch: setattr(model.copied, "gain", 3.0),
    "number": lambda model, patch: setattr(model.number, "value", 3.0),
    "shared": lambda model, patch: setattr(model.shared, "value", 3.0),
    "memory": lambda model, patch: model.memory.__setitem__(0, 3),
    "least": lambda model, patch: patch.setitem(DEFAULTS, "least", 0.0),
    "stepped.by": lambda model, patch: patch.setattr(stepped, "by", 3.0),
    "strength": lambda model, patch: patch.setattr(held_by_the_model, "strength", 3.0),
    "CACHED": lambda model, patch: patch.setitem(globals(), "CACHED", [3.0]),
    "late": lambda model, patch: vars(model).update(late=2.0),
    "more_1": lambda model, patch: setattr(model, "more_1", 1),
    "mask": lambda model, patch: setattr(model, "mask", torch.ones(2)),
    "registered": lambda model, patch: model.register_buffer("registered", torch.ones(2)),
}


@pytest.mark.parametrize("name", WAYS)
def test_a_change_is_found_whatever_the_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, views, partial functions, contexts, the order of a dict, a class between."""
    reads = contextvars.copy_context().run(_found_after, WAYS[name], monkeypatch)
    assert reads is not None
    assert name in reads or name in ("by", "training")


def _found_after(
    change: Callable[[Odd, pytest.MonkeyPatch], Any], monkeypatch: pytest.MonkeyPatch
) -> str | None:
    model = Odd().train()
    reads = reads_of(model)
    assert reads.difference() is None
    assert reads.difference() is None  # as found by the quick comparison
    change(model, monkeypatch)
    return reads.difference()
