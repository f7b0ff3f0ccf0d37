"""Reads that neither a class nor a container shows: past classes, of large arrays, of clocks."""

from __future__ import annotations

import datetime
import gc
import inspect
import logging
import time
import weakref
from collections.abc import Callable
from datetime import datetime as datetime_of_user
from time import time_ns as seconds

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graph_capture.calls.call_spec import bind_call
from graph_capture.errors import CaptureError
from graph_capture.reads import snapshots
from graph_capture.reads.reads import Reads
from tests.capturing import trace_step

from ..odd import WIDTH, Three, mean_square, normal
from .test_reads import bound

PAST_CLASSES = object.__getattribute__
NUM_LARGE = 400_000  # three megabytes of doubles


def reads_of(model: nn.Module) -> Reads:
    arguments = bind_call(model.forward, (normal(0, 16, WIDTH),), {})
    return trace_step(model, arguments, mean_square).reads


class Held:
    gain = 2.0

    def __init__(self) -> None:
        self.factor = 3.0


class _Raw(Three):
    unread = 0.0

    def prepare(self) -> None:
        self.scale, self.held = 2.0, Held()


class ByObject(_Raw):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * object.__getattribute__(self, "scale")


class ByModule(_Raw):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * nn.Module.__getattribute__(self, "scale")


class BySuper(_Raw):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * super().__getattribute__("scale")


class ByGlobal(_Raw):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * PAST_CLASSES(self, "scale")


class ByInspect(_Raw):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * inspect.getattr_static(self, "scale")


class ByComputedName(_Raw):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * object.__getattribute__(self, "".join(("sc", "ale")))


class OfAnother(_Raw):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * object.__getattribute__(self.held, "factor")


class OfItsClass(_Raw):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * object.__getattribute__(self.held, "gain")


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(
            (kind, lambda model, patch: setattr(model, "scale", 3.0))
            for kind in (ByObject, ByModule, BySuper, ByGlobal, ByInspect, ByComputedName)
        ),
        (OfAnother, lambda model, patch: setattr(model.held, "factor", 4.0)),
        (OfItsClass, lambda model, patch: patch.setattr(Held, "gain", 4.0)),
    ],
)
def test_what_is_asked_past_a_class_is_a_read(
    kind: type[nn.Module],
    change: Callable[[nn.Module, pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An attribute that nobody is asked for by way of its class is compared, too."""
    model = kind()
    reads = reads_of(model)
    assert reads.difference() is None
    change(model, monkeypatch)
    assert reads.difference() is not None


class ReadsArray(Three):
    def prepare(self) -> None:
        self.table = np.arange(NUM_LARGE, dtype=np.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * float(self.table[5])


@pytest.mark.parametrize("at", [0, 5, NUM_LARGE - 1])
@pytest.mark.parametrize("layout", ["as made", "reversed", "of bytes"])
def test_one_number_of_a_large_array_is_seen(at: int, layout: str) -> None:
    """All of an array is compared in every step, whatever its size and layout."""
    model = ReadsArray()
    if layout == "reversed":
        model.table = np.arange(NUM_LARGE, dtype=np.float64)[::-1]
    elif layout == "of bytes":
        model.table = (np.arange(NUM_LARGE * 7 + 3) % 100).astype(np.uint8)
    reads = reads_of(model)
    assert reads.difference() is None
    assert reads.difference() is None
    model.table[at] += 1
    assert "holds other numbers" in str(reads.difference())


def test_an_array_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes too long to compare is named, and as a buffer it is read."""
    monkeypatch.setattr(snapshots, "MAX_ARRAY_BYTES", 10**6)
    with pytest.raises(CaptureError, match=r"'table'.*register_buffer"):
        reads_of(ReadsArray())

    class ReadsBuffer(Three):
        def prepare(self) -> None:
            self.register_buffer("table", torch.arange(NUM_LARGE).double())

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.table[5]

    assert reads_of(ReadsBuffer()).difference() is None


class ByTime(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * (time.time() % 7)


class ByName(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * float(seconds())


class ByDuration(Three):
    def forward(self, x: Tensor) -> Tensor:
        before = time.perf_counter()
        h = self.a(x)
        return h * round(time.perf_counter() - before)


class ByDate(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * datetime.datetime.now().year


class ByDay(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * (datetime_of_user.today().weekday() + 1)


class ByCalendar(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * time.gmtime().tm_year


class ByImport(Three):
    def forward(self, x: Tensor) -> Tensor:
        import time as clock

        return self.a(x) + torch.tensor(clock.monotonic())


class Branches(Three):
    def prepare(self) -> None:
        self.began = time.time()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return h if time.time() - self.began < 3600 else h.relu()


class HandsOut(Three):
    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        return self.a(x), time.time()


BY_CLOCK = (ByTime, ByName, ByDuration, ByDate, ByDay, ByCalendar, ByImport, Branches, HandsOut)


@pytest.mark.parametrize("kind", BY_CLOCK)
def test_forward_that_goes_by_a_clock_is_refused(kind: type[nn.Module]) -> None:
    """The function that reads the clock is named, and the clocks are as before."""
    before = dict(vars(time)), dict(vars(datetime)), seconds, datetime_of_user
    with pytest.raises(CaptureError, match=r"reads a clock \(test_silent_reads\.py, in forward"):
        reads_of(kind())
    assert before == (vars(time), vars(datetime), seconds, datetime_of_user)


class Logs(Three):
    def forward(self, x: Tensor) -> Tensor:
        before = time.perf_counter()
        h = self.a(x)
        logging.getLogger(__name__).debug("took %s s", time.perf_counter() - before)
        return self.c(h)


class IsGiven(Three):
    def forward(self, x: Tensor, now: Tensor) -> Tensor:
        return self.a(x) * now


def test_a_clock_for_a_log_is_planned() -> None:
    """What it shows goes into nothing that is computed."""
    assert reads_of(Logs()).difference() is None


def test_what_a_clock_shows_may_be_an_argument() -> None:
    """As the error says."""
    model = IsGiven()
    arguments = bind_call(model.forward, (normal(0, 16, WIDTH), torch.tensor(time.time())), {})
    assert trace_step(model, arguments, mean_square).reads.difference() is None


class Weak(Three):
    def prepare(self) -> None:
        self.lend: Callable[[], Callable[[Tensor], Tensor] | None] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        scale = self.lend()
        assert scale is not None
        return self.c(scale(self.a(x)))


@pytest.mark.parametrize("freezes", [False, True])
def test_a_function_that_nothing_names_is_found(freezes: bool) -> None:
    """What its closure holds is looked at, frozen (``gc.freeze``) or not."""
    scale, rescale = bound(2.0)
    model = Weak()
    model.lend = weakref.ref(scale)
    if freezes:
        gc.freeze()
    reads = reads_of(model)
    rescale(5.0)
    change = reads.difference()
    assert change is not None
    assert "factor" in str(change)
