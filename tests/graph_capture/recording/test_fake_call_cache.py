"""Calls like earlier ones are not made again, and hand out the like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from graph_capture.recording.fake_call_cache import FakeCallCache

aten = torch.ops.aten


class _Counter(TorchDispatchMode):
    """Which calls reach PyTorch's own stand-ins."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


def _described(out: Any) -> Any:
    if isinstance(out, torch.Tensor):
        memory = out.untyped_storage().nbytes()
        return (out.shape, out.stride(), out.storage_offset(), out.dtype, out.device, memory)
    return [_described(o) for o in out] if isinstance(out, (tuple, list)) else out


Making = Callable[[], tuple[Any, tuple]]


def _matrix() -> torch.Tensor:
    return torch.empty(4, 6)


@pytest.mark.parametrize(
    ("make", "num_made"),
    [
        (lambda: (aten.mm.default, (_matrix(), _matrix().t())), 1),
        (lambda: (aten.native_layer_norm.default, (_matrix(), [6], None, None, 1e-5)), 1),
        (lambda: (aten.add_.Tensor, (_matrix(), _matrix())), 1),
        (lambda: (aten.view.default, (_matrix(), [24])), 3),
        (lambda: (aten._unsafe_view.default, (_matrix(), [24])), 3),
        (lambda: (aten.squeeze_.default, (_matrix(),)), 3),
        (lambda: (aten.split.Tensor, (_matrix(), 2)), 3),
        (lambda: (aten.arange.default, (5,)), 3),
    ],
    ids=["mm", "layer_norm", "add_", "view", "_unsafe_view", "squeeze_", "split", "arange"],
)
def test_three_calls_alike(make: Making, num_made: int) -> None:
    """What makes memory of its own or writes in place is called once, views each time."""
    fake_mode = FakeTensorMode()
    repeated, counter = FakeCallCache(fake_mode), _Counter()
    with fake_mode:
        found = []
        for _ in range(3):
            func, args = make()
            with counter:
                out = repeated.run(func, args, {})
            found.append(_described(out))
            if func is aten.add_.Tensor:
                assert out is args[0]
            if func in (aten.view.default, aten._unsafe_view.default):
                assert out.untyped_storage()._cdata == args[0].untyped_storage()._cdata
        func, args = make()
        expected = _described(func(*args))
    assert found == [expected] * 3
    assert counter.calls.count(func) == num_made


def test_other_shapes_numbers_and_dtypes_are_other_calls() -> None:
    """A flag is not the number that it equals, and the default dtype counts."""
    fake_mode = FakeTensorMode()
    repeated = FakeCallCache(fake_mode)
    with fake_mode:
        whole = torch.empty(4, dtype=torch.long)
        assert repeated.run(aten.mul.Tensor, (whole, 1), {}).dtype == torch.long
        assert repeated.run(aten.mul.Tensor, (whole, 1.0), {}).dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert repeated.run(aten.mul.Tensor, (whole, 1.0), {}).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
        other = torch.empty(2, 4, dtype=torch.long)
        assert repeated.run(aten.mul.Tensor, (other, 1), {}).shape == (2, 4)
