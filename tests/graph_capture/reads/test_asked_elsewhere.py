"""What forward asks Python and PyTorch, rather than its own objects, is compared, too."""

from __future__ import annotations

import abc
import configparser
import cProfile
import decimal
import functools
import gc
import locale
import logging
import os
import pathlib
import queue
import secrets
import shutil
import string
import sys
import threading
import time
import types
import uuid
import warnings
import weakref
from collections.abc import Callable
from os import environ, getenv
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graph_capture.calls.call_spec import bind_call
from graph_capture.errors import CaptureError
from graph_capture.reads.reads import Reads
from tests.capturing import trace_step

from ..odd import WIDTH, Three, mean_square, normal

Patch = pytest.MonkeyPatch

LOG = logging.getLogger("tests.asked")

NAMED = 2.0

BACKENDS = torch.backends.flags_frozen.__globals__

CACHE: dict[int, float] = {}

HOME = pathlib.Path()


class Plain:
    value = 2.0


class Slots:
    __slots__ = ("later",)


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


def helper() -> float:
    return 1.0


def _computed(model: Any) -> float:
    names: dict[str, Any] = dict(globals())
    exec("found = NAMED", names)
    return float(names["found"])


def _from_here(model: Any) -> float:
    import sys as system

    return float(len(system.argv))


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


def _touch(patch: Patch) -> None:
    (HOME / "flag").write_text("3.0")


WAYS: dict[str, tuple[Callable[[Any], float], Callable[[Asks, Patch], Any]]] = {
    "number of threads": (
        lambda model: float(torch.get_num_threads()),
        lambda model, patch: torch.set_num_threads(torch.get_num_threads() + 1),
    ),
    "matmul precision": (
        lambda model: float(len(torch.get_float32_matmul_precision())),
        lambda model, patch: torch.set_float32_matmul_precision("high"),
    ),
    "initial seed": (
        lambda model: float(torch.initial_seed() % 7),
        lambda model, patch: torch.manual_seed(torch.initial_seed() + 1),
    ),
    "torch.backends": (
        lambda model: float(torch.backends.cudnn.benchmark),
        lambda model, patch: (
            # PyTorch's own tests forbid it for the rest of a process.
            patch.setitem(BACKENDS, "__allow_nonbracketed_mutation_flag", True),
            patch.setattr(torch.backends.cudnn, "benchmark", True),
        ),
    ),
    "default device": (
        lambda model: float(torch.get_default_device().type == "meta"),
        lambda model, patch: torch.set_default_device("meta"),
    ),
    "warn only": (
        lambda model: float(torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda model, patch: (
            torch.use_deterministic_algorithms(False, warn_only=True)
            or torch.use_deterministic_algorithms(True, warn_only=True)
        ),
    ),
    "level of a logger": (
        lambda model: float(LOG.isEnabledFor(logging.DEBUG)),
        lambda model, patch: (
            patch.setattr(LOG, "level", logging.DEBUG) or LOG.manager._clear_cache()
        ),
    ),
    "attribute of a logger": (
        lambda model: float(LOG.level),
        lambda model, patch: patch.setattr(LOG, "level", logging.DEBUG),
    ),
    "decimal's context": (
        lambda model: float(decimal.Decimal(1) / decimal.Decimal(3)),
        lambda model, patch: patch.setattr(decimal.getcontext(), "prec", 3),
    ),
    "sys.argv": (
        lambda model: float(len(sys.argv)),
        lambda model, patch: patch.setattr(sys, "argv", ["one", "two", "three", "four"] * 9),
    ),
    "sys.argv by a local import": (
        _from_here,
        lambda model, patch: patch.setattr(sys, "argv", ["one", "two", "three", "four"] * 9),
    ),
    "sys.modules": (
        lambda model: float("no_such_file" in sys.modules),
        lambda model, patch: patch.setitem(sys.modules, "no_such_file", sys),
    ),
    "environ by its name": (
        lambda model: float(environ.get("ASKED", 1)),
        lambda model, patch: patch.setenv("ASKED", "3"),
    ),
    "getenv by its name": (
        lambda model: float(getenv("ASKED", "1")),
        lambda model, patch: patch.setenv("ASKED", "3"),
    ),
    "a file that is there": (
        lambda model: float(os.path.exists(HOME / "flag")),
        lambda model, patch: _touch(patch),
    ),
    "a path that is there": (
        lambda model: float((HOME / "flag").exists()),
        lambda model, patch: _touch(patch),
    ),
    "what a file holds": (
        lambda model: float((HOME / "number").read_text()),
        lambda model, patch: (HOME / "number").write_text("3.00"),
    ),
    "what NumPy reads": (
        lambda model: float(np.load(HOME / "array.npy")),
        lambda model, patch: np.save(HOME / "array.npy", np.ones((1, 1))),
    ),
    "a slot that is filled later": (
        lambda model: getattr(model.slots, "later", 1.0),
        lambda model, patch: setattr(model.slots, "later", 3.0),
    ),
    "a key that is an object": (
        lambda model: next(iter(model.by_object)).value,
        lambda model, patch: setattr(next(iter(model.by_object)), "value", 3.0),
    ),
    "files of a directory": (
        lambda model: float(len(os.listdir(HOME))),
        lambda model, patch: _touch(patch),
    ),
    "working directory": (
        lambda model: float(len(os.getcwd())),
        lambda model, patch: patch.chdir(HOME.parent),
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
    "filters of warnings": (
        lambda model: float(len(warnings.filters)),
        lambda model, patch: patch.setattr(warnings, "filters", warnings.filters[1:]),
    ),
    "locale": (
        lambda model: float(locale.setlocale(locale.LC_NUMERIC) == "C"),
        lambda model, patch: locale.setlocale(locale.LC_NUMERIC, "C.UTF-8"),
    ),
    "NumPy's settings": (
        lambda model: float(np.geterr()["over"] == "raise"),
        lambda model, patch: np.seterr(over="raise"),
    ),
    "garbage collection": (
        lambda model: float(gc.isenabled()),
        lambda model, patch: gc.disable(),
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
    "anomaly detection": (
        lambda model: float(torch.is_anomaly_enabled()),
        lambda model, patch: torch.autograd.set_detect_anomaly(True),
    ),
}


@pytest.fixture(autouse=True)
def _settings(monkeypatch: Patch, tmp_path: pathlib.Path) -> Any:
    monkeypatch.setitem(globals(), "HOME", tmp_path)
    (tmp_path / "number").write_text("2.0")
    np.save(tmp_path / "array.npy", np.ones(()))
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    errors, deterministic = np.geterr(), torch.are_deterministic_algorithms_enabled()
    number = locale.setlocale(locale.LC_NUMERIC)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(deterministic)
    torch.autograd.set_detect_anomaly(False)
    np.seterr(**errors)
    locale.setlocale(locale.LC_NUMERIC, number)
    gc.enable()
    LOG.manager._clear_cache()  # type: ignore[attr-defined]


def _asking(ask: Callable[[Any], float]) -> Asks:
    model = Asks()
    model.ask = ask
    return model


def _reads(model: nn.Module) -> Reads:
    arguments = bind_call(model.forward, (normal(0, 16, WIDTH),), {})
    return trace_step(model, arguments, mean_square).reads


@pytest.mark.parametrize("name", WAYS)
def test_another_answer_is_found(name: str, monkeypatch: Patch) -> None:
    """Before the quick comparison is made, and by it."""
    ask, change = WAYS[name]
    for looks in (0, 2):
        with monkeypatch.context() as patch:
            model = _asking(ask)
            reads = _reads(model)
            for _ in range(looks):
                assert reads.difference() is None
            change(model, patch)
            assert reads.difference() is not None
        _undo(model)


def _undo(model: Asks) -> None:
    torch.set_default_device(None)
    torch.autograd.set_detect_anomaly(False)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    np.seterr(over="warn")
    gc.enable()
    locale.setlocale(locale.LC_NUMERIC, "C")
    (HOME / "number").write_text("2.0")
    np.save(HOME / "array.npy", np.ones(()))
    (HOME / "flag").unlink(missing_ok=True)
    LOG.manager._clear_cache()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: float(uuid.uuid4().int % 97),
        lambda model: float(secrets.randbelow(97)),
        lambda model: float(os.urandom(1)[0]),
    ],
)
def test_numbers_without_a_seed_are_refused(ask: Callable[[Any], float]) -> None:
    """A plan would repeat them."""
    with pytest.raises(CaptureError, match=r"without a seed \(test_asked_elsewhere\.py"):
        _reads(_asking(ask))


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: float(time.strftime("%S")) + float(time.strftime("%j")),
        lambda model: float(time.ctime()[-4:]),
        lambda model: float(time.asctime()[-4:]),
    ],
)
def test_written_dates_are_clocks(ask: Callable[[Any], float]) -> None:
    """As the numbers are that they are made of."""
    with pytest.raises(CaptureError, match="reads a clock"):
        _reads(_asking(ask))


class _Scaled(Three):
    def prepare(self) -> None:
        self.limit = 1.0
        self.c.register_full_backward_pre_hook(
            lambda module, g: (g[0] / max(self.limit, g[0].norm().item()),)
        )


class _ScaledByTensors(Three):
    def prepare(self) -> None:
        self.c.register_full_backward_pre_hook(
            lambda module, g: (g[0] * torch.clamp(1.0 / g[0].norm(), max=1),)
        )


def test_a_backward_hook_that_asks_has_advice_of_its_own() -> None:
    """It names the hook's line, and what it advises is planned."""
    with pytest.raises(CaptureError, match=r"backward hook.*test_asked_elsewhere\.py:\d+.*clamp"):
        _reads(_Scaled())
    _reads(_ScaledByTensors())


def test_nothing_is_left_behind() -> None:
    """Neither in the files whose functions ran nor in Python's own."""
    before = dict(globals()), os.stat, open, sys.getprofile()
    _reads(_asking(lambda model: getattr(model, "later", 1.0)))
    assert before[0].keys() == globals().keys()
    assert before[1:] == (os.stat, open, sys.getprofile())
    with pytest.raises(CaptureError):
        _reads(_asking(lambda model: float(os.urandom(1)[0])))
    assert "getattr" not in globals()
    assert before[1:] == (os.stat, open, sys.getprofile())


def test_an_ordinary_model_is_asked_for_nothing_more() -> None:
    """Each step compares what it did before."""
    labels = [place.label for place in _reads(nn.Sequential(nn.Linear(WIDTH, 4), nn.GELU())).places]
    assert not [label for label in labels if label.startswith(("the answer", "the state"))]


SCALES = np.array([2.0, 3.0])


class _Config(dict[str, float]):
    __getattr__ = dict.__getitem__


def _goes_through_its_file(model: Asks) -> float:
    return sum(2.0 for name in globals() if name == "_Config")


def _copies_a_link(model: Asks) -> float:
    link = HOME / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(HOME / "number")
    shutil.copy2(link, HOME / "copy", follow_symlinks=False)
    return 2.0


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: float(SCALES[0]),
        lambda model: 2.0 if hasattr(SCALES, "shape") and not hasattr(SCALES, "later") else 1.0,
        lambda model: 2.0 if hasattr({1}, "add") and not hasattr({1}, "later") else 1.0,
        lambda model: 2.0 if hasattr(_Config(gain=2.0), "gain") else 1.0,
        lambda model: getattr(_Config(gain=2.0), "gain", 1.0),
        _goes_through_its_file,
        _copies_a_link,
    ],
    ids=["array", "of an array", "of a set", "hasattr", "getattr", "names", "links"],
)
def test_answers_stay_what_they_are(ask: Callable[[Any], float]) -> None:
    """To ask is no error, and nothing has changed."""
    assert _reads(_asking(ask)).difference() is None


def test_a_profiler_of_somebody_elses_goes_on() -> None:
    """One that is written in C cannot be taken off and put back."""
    profile = cProfile.Profile()
    profile.enable()
    try:
        _reads(_asking(lambda model: 2.0))
        seen = sys.getprofile()
    finally:
        profile.disable()
    assert seen is profile
    names = {getattr(entry.code, "co_name", "") for entry in profile.getstats()}
    assert "trace_step" in names


def test_what_the_collector_calls_is_not_forwards_own() -> None:
    """It runs whenever there is much to collect."""
    times: list[float] = []

    def note(phase: str, info: dict[str, int]) -> None:
        times.append(time.perf_counter())

    def ask(model: Asks) -> float:
        gc.collect()
        return 2.0

    before = list(gc.callbacks)
    gc.callbacks.append(note)
    try:
        _reads(_asking(ask))
        assert gc.callbacks[-1] is note
    finally:
        gc.callbacks.remove(note)
    assert gc.callbacks == before
