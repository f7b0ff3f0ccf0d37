"""The dynamic program over (first block, last block, memory), compiled.

Beaumont, Eyraud-Dubois, Herrmann, Joly and Shilova, *Optimal checkpointing for
heterogeneous chains: how to train deep neural networks with limited memory*
(INRIA RR-9302, 2019), Theorem 1, with the menus of Rockmate (ICML 2023).

``C[i, j, m]`` is the least time of the forward parts of blocks i … j and of the
backward parts of blocks j … i in m slots of memory, the boundary of block i
included:

- ``C[i, i, m] = min over options o: forward(i, o) + back(i, o)``
- ``C[i, j, m]`` is the least of

  - saving: over options o,
    ``forward(i, o) + C[i + 1, j, m - saved(i, o)] + back(i, o)``;
  - splitting: over i < s <= j,
    ``advance(i … s - 1) + C[s, j, m - boundary(i)] + C[i, s - 1, m]``.

A part is allowed where m is no less than its peak and what is held whatever the
plan when it runs. For a forward part that is the moment before the backward
part of j; blocks up to the chain's last block run forward for the first time
there, pinned operators included, all others again.

Exact within the class of *persistent* schedules (what is saved stays until the
backward part that it is saved for), for the given menus and slots. Sizes are
rounded to the nearest slot; whoever reads the table replays what it gets.
Time O(L^2 (L + options) M), memory O(L^2 M) for L blocks and M slots.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..arrays import IntArray

NEVER = np.iinfo(np.int64).max // 4
"""Cost of what does not fit."""


class ChainFigures(NamedTuple):
    """Bytes and nanoseconds of a chain's blocks; options of block i: ``ptr[i] … ptr[i + 1] - 1``.

    ``first`` is for a first run, ``again`` for repetitions.
    """

    boundary_bytes: IntArray
    advance_first_ns: IntArray
    advance_again_ns: IntArray
    advance_bytes: IntArray
    """Peak of running the forward part for the next boundary alone, own boundary held."""
    advance_free_bytes: IntArray
    """The same, own boundary dropped at its last use."""
    held_first_bytes: IntArray
    """Held whatever the plan while the block's forward part runs first."""
    held_again_bytes: IntArray
    """Held whatever the plan just before the block's backward part."""
    ptr: IntArray
    saved_bytes: IntArray
    forward_bytes: IntArray
    inner_bytes: IntArray
    """Peak of making the saved storages alone, just before the backward part."""
    back_bytes: IntArray
    """Peak of the backward part with all that is held meanwhile."""
    first_ns: IntArray
    again_ns: IntArray
    inner_ns: IntArray
    back_ns: IntArray

    @property
    def num_blocks(self) -> int:
        return len(self.boundary_bytes)


class ChainTable(NamedTuple):
    """Costs and decisions; rows are pairs (i, j), see :func:`row`.

    A decision is an option's index, or ``-s`` for a split before block s.
    """

    cost: NDArray[np.int64]
    decision: NDArray[np.int16]
    slot_bytes: int


def row(i: int, j: int, num_blocks: int) -> int:
    """Return the row of blocks i … j among all pairs with i <= j."""
    return i * num_blocks - i * (i - 1) // 2 + j - i


def fill_table(figures: ChainFigures, num_slots: int, slot_bytes: int) -> ChainTable:
    """Solve for all pairs of blocks and 0 … ``num_slots`` slots."""
    num_blocks = figures.num_blocks
    num_rows = num_blocks * (num_blocks + 1) // 2
    cost = np.full((num_rows, num_slots + 1), NEVER, dtype=np.int64)
    decision = np.zeros((num_rows, num_slots + 1), dtype=np.int16)
    _fill(figures, slot_bytes, cost, decision)
    return ChainTable(cost, decision, slot_bytes)


@njit(cache=True, nogil=True)
def slots_of(size_bytes, slot_bytes):  # type: ignore[no-untyped-def]
    """Return the nearest number of slots."""
    return (size_bytes + slot_bytes // 2) // slot_bytes


@njit(cache=True, nogil=True)
def _row(i, j, num_blocks):  # type: ignore[no-untyped-def]
    return i * num_blocks - i * (i - 1) // 2 + j - i


@njit(cache=True, nogil=True)
def _fill(f, slot_bytes, cost, decision):  # type: ignore[no-untyped-def]
    num_blocks = f.boundary_bytes.size
    num_slots = cost.shape[1] - 1
    for length in range(num_blocks):
        for i in range(num_blocks - length):
            j = i + length
            here = cost[_row(i, j, num_blocks)]
            how = decision[_row(i, j, num_blocks)]
            is_first = j == num_blocks - 1
            held = f.held_first_bytes[i] if is_first else f.held_again_bytes[j]
            for o in range(f.ptr[i], f.ptr[i + 1]):
                peak = f.forward_bytes[o] if length or is_first else f.inner_bytes[o]
                needed = max(held + peak, f.back_bytes[o])
                saved = slots_of(f.saved_bytes[o], slot_bytes)
                ns = f.back_ns[o]
                if is_first:
                    ns += f.first_ns[o]
                elif length:
                    ns += f.again_ns[o]
                else:
                    ns += f.inner_ns[o]
                begin = slots_of(needed, slot_bytes)
                if length == 0:
                    for m in range(begin, num_slots + 1):
                        if ns < here[m]:
                            here[m] = ns
                            how[m] = o - f.ptr[i]
                    continue
                rest = cost[_row(i + 1, j, num_blocks)]
                for m in range(max(begin, saved), num_slots + 1):
                    total = ns + rest[m - saved]
                    if total < here[m]:
                        here[m] = total
                        how[m] = o - f.ptr[i]
            kept = slots_of(f.boundary_bytes[i], slot_bytes)
            needed = 0
            ns = 0
            for s in range(i + 1, j + 1):
                b = s - 1  # the block that is run through to reach the boundary of s
                if is_first:
                    ns += f.advance_first_ns[b]
                    held = f.held_first_bytes[b]
                else:
                    ns += f.advance_again_ns[b]
                peak = f.advance_bytes[b] if b == i else f.advance_free_bytes[b]
                needed = max(needed, held + peak)
                later = cost[_row(s, j, num_blocks)]
                earlier = cost[_row(i, s - 1, num_blocks)]
                for m in range(max(slots_of(needed, slot_bytes), kept), num_slots + 1):
                    total = ns + later[m - kept] + earlier[m]
                    if total < here[m]:
                        here[m] = total
                        how[m] = -s
    return 0
