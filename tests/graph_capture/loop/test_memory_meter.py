"""Memory of code that stays eager."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from graph_capture.loop.memory_meter import MemoryMeter


def test_the_meter_follows_lifetimes() -> None:
    """Peak is the most that was alive at once: 400 + 400 bytes, then 400 less and 1200 more."""

    def work() -> Tensor:
        a = torch.zeros(100)
        b = a + 1
        del a
        c = torch.zeros(300)
        del b
        return c

    meter = MemoryMeter()
    with FakeTensorMode(), meter:
        kept = work()
    assert meter.peak_bytes == 400 + 1200
    assert meter.current_bytes == kept.untyped_storage().nbytes() == 1200


def test_real_tensors_are_noted_and_replaced() -> None:
    """What the code brings along counts once, and a stand-in is computed with."""
    brought = torch.ones(4)
    fakes = FakeTensorMode()
    seen: list[Tensor] = []

    def twin(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return fakes.from_tensor(tensor)

    meter = MemoryMeter(twin=twin)
    with fakes, meter:
        result = torch.zeros(4) + brought * 2
    assert isinstance(result, FakeTensor)
    assert seen == [brought]
    assert list(meter.constants.values()) == [16]


def test_questions_to_fake_tensors_are_no_calls() -> None:
    """Asking for a device computes nothing."""
    meter = MemoryMeter()
    with FakeTensorMode(), meter:
        torch.zeros(4).device  # noqa: B018
    assert [str(func) for func, *_ in meter.calls] == ["aten.zeros.default"]
