"""Which runs may become one kernel."""

from __future__ import annotations

from planner.compiled.held_fusion import WithinMemory


def test_kernels_are_joined_where_memory_between_them_leaves_room() -> None:
    """The highest moment between two runs decides, both included."""
    may_join = WithinMemory(memory_bytes=(4, 9, 4, 4), limit_bytes=10).for_one_lowering()
    assert not may_join({0, 2}, 2)
    assert may_join({2, 3}, 2)


def test_what_was_joined_takes_room() -> None:
    """A judge remembers; another lowering begins anew."""
    rules = WithinMemory(memory_bytes=(4, 4, 4), limit_bytes=10)
    may_join = rules.for_one_lowering()
    assert may_join({0, 1}, 6)
    assert not may_join({1, 2}, 1)
    assert rules.for_one_lowering()({1, 2}, 1)


def test_a_limit_of_nothing_joins_nothing() -> None:
    """Every run stays a kernel of its own."""
    assert not WithinMemory(memory_bytes=(0, 0), limit_bytes=0).for_one_lowering()({0, 1}, 1)
