"""Find the chain in a graph: its blocks, what flows between them, and their backward parts.

A *cut* is a position of the forward pass where hardly anything crosses: at most
one storage that is made before it and read in the forward pass at or after it.
The stretch between two cuts is a *block*. What crosses the cut before block i is
its *boundary*: from the boundary alone the block's forward part can be run again.

Not counted at the cuts, because they are held throughout: kept storages,
outputs of pinned operators, and storages that are read over a long stretch of
the forward pass (attention masks, position tables, the output of an encoder).
How long is "long" is chosen so that the bytes so held plus those of the largest
block are fewest.

The backward part of block i goes as far as the operators read nothing that was
made before block i but its boundary. In a chain ``b_i`` reads the output of
``f_i``; it then belongs to block i + 1, whose boundary that output is. This is
the convention of Griewank and Walther, *Algorithm 799: Revolve* (ACM TOMS 26,
2000): one backward step needs one boundary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..arrays import GraphArrays, IntArray

MIN_BLOCKS = 3
LARGEST_SHARE = 0.7
"""A chain whose held bytes and largest block are more of all saved bytes is of no use."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A graph viewed as a chain of ``num_blocks`` blocks.

    Parameters
    ----------
    cuts
        Forward part of block i: operators ``cuts[i] … cuts[i + 1] - 1``.
    ends
        Backward part of block i: operators ``ends[i + 1] … ends[i] - 1``. The
        backward pass runs from the last block to the first.
    boundaries
        Storages that cross the cut before block i; none before block 0.
    held
        Storages that are held from their production to where nobody can need
        them any more.
    """

    cuts: tuple[int, ...]
    ends: tuple[int, ...]
    boundaries: tuple[tuple[int, ...], ...]
    held: frozenset[int]

    @property
    def num_blocks(self) -> int:
        return len(self.cuts) - 1

    @property
    def turn(self) -> int:
        """First operator of the backward pass."""
        return self.cuts[-1]


def find_chain(g: GraphArrays, turn: int) -> Chain | None:
    """Find the finest chain of ``g``; ``None`` when it has too few cuts to be useful.

    Parameters
    ----------
    turn
        Where the backward pass begins, see ``uniform.turning_point``.
    """
    if turn < 1 or g.num_operators == 0:
        return None
    spans = _Spans(g, turn)
    best: tuple[int, frozenset[int], tuple[int, ...]] | None = None
    for longest in _lengths(spans.length):
        held = frozenset(int(k) for k in np.flatnonzero(spans.fixed | (spans.length > longest)))
        cuts = spans.cuts(held)
        if len(cuts) - 1 < MIN_BLOCKS:
            continue
        bytes_ = spans.needed_bytes(held, cuts)
        if best is None or bytes_ < best[0]:
            best = (bytes_, held, cuts)
    if best is None or best[0] > LARGEST_SHARE * spans.saved_bytes:
        return None
    return chain_of_cuts(g, best[2], best[1])


def chain_of_cuts(g: GraphArrays, cuts: tuple[int, ...], held: frozenset[int]) -> Chain:
    """Build the chain with these cuts, from 0 to the turning point."""
    turn, num = cuts[-1], g.num_operators
    first_forward, last_forward = _forward_stretch(g, turn)
    first_backward = np.full(g.num_storages, num, dtype=np.int64)
    storage = np.repeat(np.arange(g.num_storages), np.diff(g.pos_ptr))
    backward = g.pos_idx >= turn
    np.minimum.at(first_backward, storage[backward], g.pos_idx[backward])
    free = g.producer >= 0
    free[list(held)] = False
    boundaries: list[tuple[int, ...]] = []
    ends = [num]
    for cut in cuts[:-1]:
        crosses = free & (first_forward < cut) & (last_forward >= cut)
        boundaries.append(tuple(int(k) for k in np.flatnonzero(crosses)))
        if cut:
            earlier = free & (g.producer < cut) & ~crosses
            ends.append(int(first_backward[earlier].min(initial=num)))
    ends.append(turn)
    return Chain(cuts, tuple(ends), tuple(boundaries), held | _read_late(g, cuts, ends))


def coarsen(g: GraphArrays, chain: Chain, cuts: Iterable[int]) -> Chain:
    """Return ``chain`` with only these of its cuts."""
    wanted = {0, chain.turn, *cuts}
    return chain_of_cuts(g, tuple(p for p in chain.cuts if p in wanted), chain.held)


def _read_late(g: GraphArrays, cuts: tuple[int, ...], ends: list[int]) -> frozenset[int]:
    """Storages of a block that the backward part of an earlier block reads."""
    late = []
    for k in range(g.num_storages):
        made = int(g.producer[k])
        if 0 <= made < cuts[-1]:
            block = int(np.searchsorted(cuts, made, side="right")) - 1
            if g.positions(k)[-1] >= ends[block]:
                late.append(k)
    return frozenset(late)


class _Spans:
    """The stretch of the forward pass over which each storage is read."""

    def __init__(self, g: GraphArrays, turn: int) -> None:
        self.g, self.turn = g, turn
        self.first, self.last = _forward_stretch(g, turn)
        forward = (g.producer >= 0) & (g.producer < turn)
        self.length = np.where(forward, self.last - self.first, 0)
        pinned = np.zeros(g.num_storages, dtype=bool)
        pinned[forward] = g.pinned[g.producer[forward]] > 0
        self.fixed = forward & (pinned | (g.kept > 0))
        later = np.array(
            [len(g.positions(k)) > 0 and g.positions(k)[-1] >= turn for k in range(g.num_storages)],
            dtype=bool,
        )
        self.read_later = forward & later
        self.saved_bytes = int(g.size[self.read_later].sum())

    def cuts(self, held: frozenset[int]) -> tuple[int, ...]:
        """Positions that at most one storage crosses."""
        crossing = np.zeros(self.turn + 1, dtype=np.int64)
        free = np.ones(self.g.num_storages, dtype=bool)
        free[list(held)] = False
        ks = np.flatnonzero(free & (self.last > self.first) & (self.g.size > 0))
        np.add.at(crossing, self.first[ks] + 1, 1)
        np.add.at(crossing, self.last[ks] + 1, -1)
        crossing = np.cumsum(crossing)
        inner = np.arange(1, self.turn)
        return (0, *(int(p) for p in inner[crossing[1 : self.turn] <= 1]), self.turn)

    def needed_bytes(self, held: frozenset[int], cuts: tuple[int, ...]) -> int:
        """Bytes of what is held, and of the block that saves most for its backward part."""
        size = self.g.size
        long = [k for k in held if not self.fixed[k]]
        inside = self.read_later.copy()
        inside[list(held)] = False
        ks = np.flatnonzero(inside)
        block = np.searchsorted(np.array(cuts), self.g.producer[ks], side="right") - 1
        per_block = np.bincount(block, weights=size[ks], minlength=len(cuts))
        return int(size[long].sum() + per_block.max(initial=0))


def _forward_stretch(g: GraphArrays, turn: int) -> tuple[IntArray, IntArray]:
    """First and last forward use of each storage, production included; ``turn``, -1: none."""
    first = np.full(g.num_storages, turn, dtype=np.int64)
    last = np.full(g.num_storages, -1, dtype=np.int64)
    storage = np.repeat(np.arange(g.num_storages), np.diff(g.pos_ptr))
    forward = g.pos_idx < turn
    np.minimum.at(first, storage[forward], g.pos_idx[forward])
    np.maximum.at(last, storage[forward], g.pos_idx[forward])
    return first, last


def _lengths(length: IntArray) -> list[int]:
    """Thresholds worth trying, longest first, some 20 % apart."""
    tried = [int(length.max(initial=0))]
    for value in sorted({int(x) for x in length}, reverse=True):
        if 1 <= value <= tried[-1] / 1.2:
            tried.append(value)
    return tried
