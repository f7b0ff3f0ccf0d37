"""Classes that have a say in how their attributes are read."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..odd import Three
from .test_reads import Config, reads_of


class Closed(type):
    def __setattr__(cls, name: str, value: Any) -> None:
        raise TypeError("closed")


class Unwatchable(metaclass=Closed):
    def __init__(self) -> None:
        self.gain = 2.0


class ReadsUnwatchable(Three):
    def prepare(self) -> None:
        self.config, self.closed = Config(), Unwatchable()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * self.config.gain * self.closed.gain)


def test_a_class_that_refuses_attributes() -> None:
    """Its objects are looked at as a whole, and no other class stays exchanged."""
    model = ReadsUnwatchable().train()
    reads = reads_of(model)
    model.closed.gain = 3.0
    assert reads.difference() == "attribute 'closed.gain' is 3.0, was 2.0 while planning"
    assert vars(Config)["__getattribute__"].__qualname__ == "Config.__getattribute__"
    assert "__getattribute__" not in vars(nn.Module)


class Wrapping:
    """Makes a wrapper of each dict that it is asked for."""

    def __init__(self, held: dict[str, Any]) -> None:
        self.__dict__["_held"] = held

    def __getattr__(self, name: str) -> Any:
        value = self._held[name]
        return Wrapping(value) if isinstance(value, dict) else value


class Wraps(Three):
    def prepare(self) -> None:
        self.held = {"inner": {"gain": 2.0}}
        self.config = Wrapping(self.held)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x)) * self.config.inner.gain


def test_objects_that_are_made_anew_for_each_question_are_no_change() -> None:
    """What they are made of is compared."""
    model = Wraps().train()
    reads = reads_of(model)
    assert reads.difference() is None
    model.held["inner"]["gain"] = 3.0
    assert reads.difference() is not None
