"""What the allocator reports."""

from __future__ import annotations

import pytest
import torch

from graph_capture.costs.allocator import peak_extra_bytes


def test_what_is_returned_counts() -> None:
    """A tensor that the call returns is alive to the end: 4000 bytes."""
    assert peak_extra_bytes(lambda: torch.zeros(1000)) == 4000


def test_what_is_freed_counts_while_it_lives() -> None:
    """First 4000 and 8000 bytes at once, then 4000 less and 4000 more: the peak is 12000."""

    def call() -> list[torch.Tensor]:
        a, b = torch.zeros(1000), torch.zeros(2000)
        del a
        return [b, torch.zeros(1000)]

    assert peak_extra_bytes(call) == 12000


def test_what_was_there_before_does_not_count() -> None:
    """A call that works in place on an old tensor takes nothing."""
    x = torch.zeros(1000)
    assert peak_extra_bytes(lambda: x.mul_(x)) == 0


def test_an_error_ends_the_record() -> None:
    """After a call that raises, the next record works."""
    with pytest.raises(ZeroDivisionError):
        peak_extra_bytes(lambda: 1 // 0)
    assert peak_extra_bytes(lambda: torch.zeros(10)) == 40


def test_records_may_be_nested() -> None:
    """An inner record is complete, and what it saw counts in the outer one, too."""
    inner: list[int] = []

    def planning() -> None:
        inner.append(peak_extra_bytes(lambda: torch.empty(3000, dtype=torch.uint8)))

    def loop() -> torch.Tensor:
        first = torch.empty(1000, dtype=torch.uint8)
        planning()
        del first
        return torch.empty(2500, dtype=torch.uint8)

    assert peak_extra_bytes(loop) == 4000
    assert inner == [3000]
