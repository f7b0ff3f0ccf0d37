"""Which runs may become one kernel."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from planner.compiled.expected_peak import ExpectedMemory
from planner.compiled.held_fusion import WithinMemory


def rules(memory: Sequence[int], limit: int, made: Sequence[int] | None = None) -> WithinMemory:
    """Rules for runs that hold and make these bytes."""
    made = [0] * len(memory) if made is None else made
    expected = ExpectedMemory(memory_bytes=tuple(memory), made_bytes=tuple(made))
    return WithinMemory(memory_bytes=memory, limit_bytes=limit, expected=expected)


def test_kernels_are_joined_where_memory_between_them_leaves_room() -> None:
    """The highest moment between two runs decides, both included."""
    may_join = rules((4, 9, 4, 4), 10).for_one_lowering()
    assert not may_join({0, 2}, 2)
    assert may_join({2, 3}, 2)


def test_what_was_joined_takes_room() -> None:
    """A judge remembers; another lowering begins anew."""
    held = rules((4, 4, 4), 10)
    may_join = held.for_one_lowering()
    assert may_join({0, 1}, 6)
    assert not may_join({1, 2}, 1)
    assert held.for_one_lowering()({1, 2}, 1)


def test_a_limit_of_nothing_joins_nothing() -> None:
    """Every run stays a kernel of its own."""
    assert not rules((0, 0), 0).for_one_lowering()({0, 1}, 1)


@pytest.mark.parametrize(
    ("runs", "may"), [({0}, True), ({0, 1}, True), ({0, 2}, False), ({1, 2}, False), ({2, 3}, True)]
)
def test_kernels_share_a_call_where_nothing_need_be_freed_between(
    runs: set[int], may: bool
) -> None:
    """All that the runs make is there at once, beside what the first one finds.

    The second run frees four bytes, without which the third exceeds the peak of ten.
    """
    assert rules((6, 8, 7, 10), 0, made=(2, 2, 3, 3)).may_share_a_call(runs) == may
