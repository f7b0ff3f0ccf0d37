"""A model whose forward asks one question, and a check that another answer is found."""

from __future__ import annotations

import configparser
import queue
import string
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graph_capture.calls.call_spec import bind_call
from graph_capture.reads.reads import Reads
from tests.capturing import trace_step

from ..odd import WIDTH, Three, mean_square, normal


class Plain:
    value = 2.0


class Slots:
    __slots__ = ("later",)


def helper() -> float:
    return 1.0


class Asks(Three):
    def prepare(self) -> None:
        self.event, self.lock, self.queue = threading.Event(), threading.Lock(), queue.Queue()
        self.deep, self.plain, self.names = [[[[[[Plain()]]]]]], Plain(), types.SimpleNamespace()
        self.slots, self.by_object = Slots(), {Plain(): 1}
        self.held, self.code = Plain(), compile("NAMED + 0.0", "text", "eval")
        self.reference = weakref.ref(self.held)
        self.function, self.kind = (lambda: 1.0), Plain
        self.register_buffer("mask", torch.ones(1))
        self.a.weight.factor = Plain()
        self.template, self.options = string.Template("$a"), configparser.ConfigParser()
        self.options.read_dict({"part": {"gain": "2"}})
        self.ask: Callable[[Any], float] = helper  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * self.ask(self))


def asking(ask: Callable[[Any], float]) -> Asks:
    """A model whose forward asks that."""
    model = Asks()
    model.ask = ask
    return model


def reads_of(model: nn.Module) -> Reads:
    """What a captured step of it has read."""
    arguments = bind_call(model.forward, (normal(0, 16, WIDTH),), {})
    return trace_step(model, arguments, mean_square).reads


def assert_found(
    ask: Callable[[Any], float],
    change: Callable[[Asks, pytest.MonkeyPatch], Any],
    monkeypatch: pytest.MonkeyPatch,
    undo: Callable[[], None] = lambda: None,
) -> None:
    """The change is told from what was asked, at the first comparison and after two others."""
    for looks in (0, 2):
        with monkeypatch.context() as patch:
            model = asking(ask)
            reads = reads_of(model)
            for _ in range(looks):
                assert reads.difference() is None
            change(model, patch)
            assert reads.difference() is not None
        undo()
