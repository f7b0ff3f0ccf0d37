"""What a step reads beside its arguments is known, and a change of it is found."""

from __future__ import annotations

import copy
import gc
import os
import threading
import types
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graph_capture.calls.call_spec import bind_call
from graph_capture.reads import process_wide
from graph_capture.reads.reads import Reads
from tests.capturing import trace_step

from ..odd import WIDTH, Three, mean_square, normal

GAIN = 1.5

TABLE = {"low": [0.5, 2], "high": (1, 2)}

SETTINGS = types.SimpleNamespace(gain=1.0, unread=3)


class Scaled(torch.autograd.Function):
    """Multiplies the gradient by a class attribute."""

    factor = 2.0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * Scaled.factor


class Shifted(Scaled):
    """Asks the class by another name."""

    distance = 0.0

    @classmethod
    def shift(cls) -> float:
        return cls.distance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] + Shifted.shift()


class Config:
    """Answers to another name, as configurations of Transformers do."""

    shift = 0.25

    def __init__(self) -> None:
        self.gain = 1.0
        self.steps = 0

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__("gain" if name == "amplification" else name)


@dataclass(slots=True)
class Slotted:
    gain: float = 1.0


class Pair(NamedTuple):
    first: float
    second: list[int]


class Term(tuple):
    """A pair that does not say how long it is, as e3nn's representations do not."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError


def helper(x: Tensor, by: float = 1.0) -> Tensor:
    """Reads globals for a forward that calls it."""
    return x * GAIN * TABLE["low"][0] * SETTINGS.gain * by


def twice(x: Tensor, by: float = 1.0) -> Tensor:
    """Another body for :func:`helper`."""
    return x * 2


def bound(factor: float) -> tuple[Callable[[Tensor], Tensor], Callable[[float], None]]:
    """A function with a number in its closure, and what changes that."""

    def scale(x: Tensor) -> Tensor:
        return x * factor

    def change(new: float) -> None:
        nonlocal factor
        factor = new

    return scale, change


class Reader(Three):
    """Reads numbers from everywhere."""

    reach = 2

    def prepare(self) -> None:
        self.drop = nn.Dropout(0.1)
        self.act = F.gelu
        self.scaling: dict[str, Any] = {"default": 2.0, "deep": {"er": [1, 2]}}
        self.config = Config()
        self.slotted = Slotted()
        self.pair = Pair(1.0, [2])
        self.terms = [Term((2.0, [1.0]))]
        self.offsets = [3, 4]
        self.names = {"a", "b"}
        self.stage = "one"
        self.unread = 1
        self.scale_it, self.rescale = bound(1.0)
        self.adapter = None
        self.curve = np.array([1.0, 2.0])
        self.codes = bytearray(b"\x01")
        self.layers = ChainMap({"depth": 1.0}, {})
        self.secret = 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = x * float(self.curve.sum()) * self.codes[0] * self.layers["depth"]
        x = F.tanh(x) * vars(self)["secret"] * float(os.environ.get("READERS_GAIN", "1"))
        h = self.drop(self.act(self.a(x))) * self.scaling["default"]
        h = self.scale_it(helper(h)) * self.config.amplification + self.config.shift
        h = Shifted.apply(Scaled.apply(h)) * self.slotted.gain * self.pair.second[0]
        h = h * self.terms[0][0] * self.terms[0][1][0]
        for name in sorted(self.names):
            h = h * len(name)
        if self.stage == "two" or self.adapter is not None:
            h = h.relu()
        return self.c(self.b(h)[:, self.offsets[0] :].repeat(1, self.reach)[:, :WIDTH])


def reads_of(model: nn.Module) -> Reads:
    arguments = bind_call(model.forward, (normal(0, 16, WIDTH),), {})
    return trace_step(model, arguments, mean_square).reads


@pytest.fixture
def reader() -> Reader:
    torch.manual_seed(0)
    return Reader().train()


CHANGES: dict[str, Callable[[Reader, pytest.MonkeyPatch], Any]] = {
    "drop.p": lambda model, patch: setattr(model.drop, "p", 0.5),
    "act": lambda model, patch: setattr(model, "act", F.silu),
    "scaling": lambda model, patch: model.scaling.update(default=1.0),
    "er": lambda model, patch: model.scaling["deep"]["er"].append(3),
    "config.amplification": lambda model, patch: setattr(model.config, "gain", 2.0),
    "config": lambda model, patch: setattr(model, "config", Config()),
    "Config.shift": lambda model, patch: patch.setattr(Config, "shift", 1.0),
    "slotted.gain": lambda model, patch: setattr(model.slotted, "gain", 2.0),
    "pair": lambda model, patch: model.pair.second.__setitem__(0, 3),
    "terms": lambda model, patch: model.terms[0][1].append(2.0),
    "offsets": lambda model, patch: setattr(model, "offsets", [4, 4]),
    "names": lambda model, patch: model.names.add("c"),
    "stage": lambda model, patch: setattr(model, "stage", "two"),
    "adapter": lambda model, patch: setattr(model, "adapter", "some"),
    "Reader.reach": lambda model, patch: patch.setattr(Reader, "reach", 3),
    "reach": lambda model, patch: setattr(model, "reach", 3),
    "factor": lambda model, patch: model.rescale(2.0),
    "Scaled.factor": lambda model, patch: patch.setattr(Scaled, "factor", 3.0),
    "Shifted.distance": lambda model, patch: patch.setattr(Shifted, "distance", 3.0),
    "GAIN": lambda model, patch: patch.setitem(globals(), "GAIN", 2.0),
    "TABLE": lambda model, patch: patch.setitem(TABLE, "low", [0.5, 3]),
    "SETTINGS.gain": lambda model, patch: patch.setattr(SETTINGS, "gain", 2.0),
    "inplace": lambda model, patch: setattr(model.drop, "inplace", 0),  # of another type
    "curve": lambda model, patch: model.curve.__setitem__(0, 3.0),
    "codes": lambda model, patch: model.codes.__setitem__(0, 2),
    "maps": lambda model, patch: model.layers.__setitem__("depth", 2.0),
    "secret": lambda model, patch: setattr(model, "secret", 2.0),
    "environment": lambda model, patch: patch.setenv("READERS_GAIN", "2"),
    "functional.tanh": lambda model, patch: patch.setattr(F, "tanh", torch.sin),
    "defaults of helper": lambda model, patch: patch.setattr(helper, "__defaults__", (2.0,)),
    "code of helper": lambda model, patch: patch.setattr(helper, "__code__", twice.__code__),
    "a.forward": lambda model, patch: setattr(model.a, "forward", lambda x: x),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_found_by_its_name(
    name: str, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever forward or backward read, and wherever it lies, a change of it is found."""
    reads = reads_of(reader)
    assert reads.difference() is None
    assert reads.difference() is None  # as found by the quick comparison
    CHANGES[name](reader, monkeypatch)
    found = reads.difference()
    assert found is not None
    assert name in found


@pytest.mark.parametrize(("name", "value"), [("default dtype", torch.float64), ("oneDNN", False)])
def test_a_setting_of_the_process_is_compared(
    name: str, value: Any, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What decides which operators PyTorch runs is a change like an attribute's."""
    reads = reads_of(reader)
    for _ in range(2):  # the second time by the quick comparison
        assert reads.difference() is None
    monkeypatch.setitem(process_wide._SETTINGS, name, lambda: value)
    assert name in (reads.difference() or "")


def test_the_message_names_both_values(reader: Reader) -> None:
    """What it is and what it was."""
    reads = reads_of(reader)
    reader.drop.p = 0.5
    assert reads.difference() == "attribute 'drop.p' is 0.5, was 0.1 while planning"


def test_equal_values_and_unread_ones_are_no_change(reader: Reader) -> None:
    """Other objects of the same value, and counters that the loop keeps, alarm nobody."""
    reads = reads_of(reader)
    for step in range(3):
        reader.offsets = [3, 4]
        reader.scaling = copy.deepcopy(reader.scaling)
        reader.drop.p = float("0.1")
        reader.unread = reader.config.steps = SETTINGS.unread = step
        reader.new = step  # type: ignore[assignment]
        assert reads.difference() is None
    reader.drop.p = 0.2
    assert reads.difference() is not None


def test_a_change_that_is_undone_is_none(reader: Reader) -> None:
    """The value from planning counts, not the last one."""
    reads = reads_of(reader)
    assert reads.difference() is None
    reader.stage = "two"
    assert reads.difference() is not None
    reader.stage = "one"
    assert reads.difference() is None


def test_it_keeps_nothing_alive() -> None:
    """Neither the modules nor the objects that they hold."""
    model = Reader().train()
    reads = reads_of(model)
    assert reads.difference() is None
    gone = weakref.ref(model.a), weakref.ref(model), weakref.ref(model.config)
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None, None, None]
    assert reads.difference() is None  # and asks nothing of what is gone


def test_classes_are_as_before() -> None:
    """What was exchanged while the step was traced is put back, after an error, too."""
    model = Reader().train()
    reads_of(model)
    model.pair = Pair(1.0, [])
    with pytest.raises(Exception, match="captured"):
        reads_of(model)
    assert "__getattribute__" not in vars(nn.Module)
    assert "__getattribute__" not in vars(Slotted)
    assert vars(Config)["__getattribute__"].__qualname__ == "Config.__getattribute__"


class Guarded(nn.Module):
    """A module that answers for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain = nn.Linear(WIDTH, WIDTH), 2.0

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__("gain" if name == "power" else name)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.power


def test_a_module_with_a_getattribute_of_its_own() -> None:
    """What it asks for itself is seen."""
    model = Guarded().train()
    reads = reads_of(model)
    model.gain = 3.0
    assert reads.difference() == "attribute 'gain' is 3.0, was 2.0 while planning"


@pytest.mark.parametrize("value", [np.float32(0.1), np.int64(0), Fraction(0), np.float64("nan")])
def test_numbers_of_other_kinds_are_compared_by_value(value: Any) -> None:
    """Set anew in each step they are no change."""
    model = Reader().train()
    model.unread = model.drop.p = 0.1
    model.scaling["other"] = value
    reads = reads_of(model)
    model.scaling["other"] = copy.deepcopy(value)
    assert reads.difference() is None
    model.scaling["other"] = value + 1 if value == value else 1.0
    assert reads.difference() is not None


class ReadsInThread(Three):
    """Another thread asks a model of its own meanwhile."""

    def prepare(self) -> None:
        self.others = [Guarded()]

    def forward(self, x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: self.others[0].power)
        thread.start()
        thread.join()
        return self.c(self.a(x))


def test_what_another_thread_reads_is_no_part_of_the_step() -> None:
    """It may change."""
    model = ReadsInThread().train()
    reads = reads_of(model)
    model.others[0].gain = 3.0
    assert reads.difference() is None


class Stacks(Three):
    def forward(self, x: Tensor) -> Tensor:
        h = self.c(self.a(x))
        return h * torch.tensor([x[0, :1].sum(0, keepdim=True), h.detach()[0, 0]])[:, None]


def test_a_tensor_of_one_element_tensors_has_the_shape_of_eager() -> None:
    """Each gives one number, whatever its own shape."""
    arguments = bind_call(Stacks.forward, (Stacks(), normal(0, 2, WIDTH)), {})
    del arguments["self"]
    step = trace_step(Stacks().train(), arguments, mean_square)
    assert step.outputs[0].meta["val"].shape == Stacks()(normal(0, 2, WIDTH)).shape
