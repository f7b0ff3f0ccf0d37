"""Nested strategies: save states sparsely, and more densely when they are needed.

The forward pass is a chain of blocks, and the *state* before a block is all that
earlier blocks made and the forward pass still reads there. A strategy of this
file holds a few states (*snapshots*). Where the backward pass misses something, the
forward pass is advanced from the nearest snapshot to the block that makes it, and
on the way new snapshots are taken; snapshots behind that block are given up. Which
ones are taken is the strategy:

*revolve* (treeverse, binomial): Griewank and Walther, *Algorithm 799: Revolve*
(ACM TOMS 26, 2000); Griewank, *Achieving logarithmic growth of temporal and spatial
complexity in reverse automatic differentiation* (1992). With ``s`` slots, the state
before the first block counted among them, the next snapshot of ``l`` steps goes
where the least number of repeated steps

    P(l, s) = min over m of  m + P(l - m, s - 1) + P(m, s)

is attained. Guarantee: on a chain of blocks of equal costs no schedule with ``s``
states advances less.

*recursive*: Chen et al. (arXiv:1604.06174), Section 4.4: ``k`` states divide a
stretch into ``k + 1`` equal parts, and each part is divided again when it is
reached: ``k log_(k+1)(n)`` states, about ``log_(k+1)(n)`` forward passes.

Resident storages cost no slot, so the first state mostly takes no memory. Blocks
count as equal, as in the papers; rotor knows their costs.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import cache, partial

from graph_capture.cost_graph import CostGraph

from ..schedule import Schedule
from ..uniform import turning_point
from .blocks import find_blocks
from .runs import Runs, last_uses
from .strategy import Candidate, Strategy, StrategyError, StrategyOptions

Place = Callable[[int, int], list[int]]
"""From the steps of a stretch and the free slots to where new snapshots go, from its begin."""


def revolve(graph: CostGraph, slots: int) -> Schedule:
    """Take binomial snapshots of the blocks' states in ``slots`` slots."""
    if slots < 1:
        raise StrategyError(f"revolve needs at least one slot, not {slots}")
    return _Nested(graph, revolve_places, slots).schedule()


def recursive(graph: CostGraph, k: int = 1) -> Schedule:
    """Divide each stretch by ``k`` snapshots, and each part again: log n for ``k = 1``."""
    if k < 1:
        raise StrategyError(f"a stretch is divided by at least one snapshot, not {k}")
    return _Nested(graph, lambda length, free: recursive_places(length, k), slots=None).schedule()


def repeated_steps(length: int, slots: int) -> int:
    """Return P(l, s): the repeated steps when ``length`` steps are reversed in ``slots`` slots.

    By the closed form ``r l - C(s + r, r - 1)``, where ``r`` is the least
    number with ``C(s + r, s) >= l``.

    Examples
    --------
    >>> [repeated_steps(4, slots) for slots in (1, 2, 3, 4)]
    [6, 4, 3, 3]
    """
    if length < 1 or slots < 1:
        raise ValueError(f"no stretch of {length} steps in {slots} slots")
    repeats = 0
    while math.comb(slots + repeats, slots) < length:
        repeats += 1
    return repeats * length - (math.comb(slots + repeats, repeats - 1) if repeats else 0)


@cache
def best_split(length: int, slots: int) -> int:
    """Return where a stretch's first snapshot goes, with ``slots`` slots, one of them for its
    start."""
    return min(
        range(1, length),
        key=lambda m: m + repeated_steps(length - m, slots - 1) + repeated_steps(m, slots),
    )


def revolve_places(length: int, free: int) -> list[int]:
    """Return revolve's snapshots in a stretch of ``length`` steps with ``free`` slots."""
    found, at = [], 0
    while free > 0 and length - at > 1:
        at += best_split(length - at, free + 1)
        found.append(at)
        free -= 1
    return found


def recursive_places(length: int, k: int) -> list[int]:
    """``k`` snapshots in a stretch of ``length`` steps, and again in each last part.

    Parts differ by one step at most; where there are fewer steps than parts, each
    step is a part.

    Examples
    --------
    >>> recursive_places(16, 3), recursive_places(5, 8)
    ([4, 8, 12, 13, 14, 15], [1, 2, 3, 4])
    """
    found, at = [], 0
    while (rest := length - at) > 1:
        parts = dict.fromkeys(at + i * rest // (k + 1) for i in range(1, k + 1))
        found += [place for place in parts if place > at]
        at = found[-1]
    return found


class _Nested:
    """Advances, snapshots and recomputations of one schedule."""

    def __init__(self, graph: CostGraph, place: Place, slots: int | None) -> None:
        self.graph, self.place, self.slots = graph, place, slots
        self.turn = turning_point(graph)
        blocks = find_blocks(graph).blocks
        borders = {0, self.turn, blocks[-1].end, *(block.begin for block in blocks)}
        self.cuts = sorted(borders)
        self.runs = Runs(graph)
        self.last = last_uses(graph)
        self.states = self._states()
        self.snapshots: list[int] = [0]
        self.recovered: set[int] = set()

    def schedule(self) -> Schedule:
        runs, num = self.runs, self.graph.num_operators
        last_block = len(self.cuts) - 2
        for v in range(self.turn):
            runs.run(v)
        self.snapshots += self._places(0, last_block)
        self.recovered |= self._read_later(last_block, self.turn) | self.states[last_block]
        self._settle(self.turn)
        for v in range(self.turn, num):
            while missing := runs.missing(v):
                self._recover(max(self._block_of(k) for k in missing), v)
            runs.run(v)
        return runs.schedule()

    def _recover(self, block: int, now: int) -> None:
        """Bring back what the backward pass reads of ``block`` from position ``now`` on."""
        wanted = self._read_later(block, now) - self.runs.at_hand
        inside = bool(wanted - self.states[block + 1])
        target = block if inside else block + 1
        while self.snapshots[-1] > target:
            self.recovered |= self.states[self.snapshots.pop()] & self.runs.at_hand
        begin = self.snapshots[-1]
        self._settle(now)
        for cut in self._places(begin, target):
            self.snapshots.append(cut)
            self.runs.recompute(self.states[cut])
            self._settle(now)
        self.runs.recompute(wanted)
        # The block was run from its state, which its backward part may read, too.
        self.recovered |= wanted | (self.states[target] & self.runs.at_hand)
        self._settle(now)

    def _places(self, begin: int, target: int) -> list[int]:
        free = 0 if self.slots is None else self.slots - len(self.snapshots)
        return [begin + at for at in self.place(target - begin + 1, free)]

    def _settle(self, now: int) -> None:
        """Drop what is neither in a snapshot nor waiting for the backward pass."""
        self.recovered = {k for k in self.recovered if self.last[k] >= max(now, self.turn)}
        held = set(self.recovered).union(*(self.states[cut] for cut in self.snapshots))
        held.update(k for k in self.runs.at_hand if self.runs.producer(k) >= self.turn)
        self.runs.keep_only(held)

    def _states(self) -> list[set[int]]:
        """Of each cut what is made before it and read in the forward pass at or after it."""
        states: list[set[int]] = [set() for _ in self.cuts]
        for k, s in enumerate(self.graph.storages):
            if s.producer is None:
                continue
            last = max((v for v in self.graph.consumers[k] if v < self.turn), default=-1)
            for i in range(bisect_right(self.cuts, s.producer), bisect_right(self.cuts, last)):
                states[i].add(k)
        return states

    def _read_later(self, block: int, now: int) -> set[int]:
        """What ``block`` makes and the backward pass reads at ``now`` or later."""
        return {
            k
            for v in range(self.cuts[block], self.cuts[block + 1])
            for k in self.graph.operators[v].outputs
            if self.last[k] >= max(now, self.turn)
        }

    def _block_of(self, k: int) -> int:
        return bisect_right(self.cuts, self.runs.producer(k)) - 1


def _propose_revolve(graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
    num_blocks = len(find_blocks(graph))
    default = max(1, math.ceil(math.log2(num_blocks)))
    counts = [default]
    if options.budget_bytes is not None:
        counts += [s for s in _slot_counts(num_blocks + 2) if s != default]
    yield from _within_reach((f"slots={s}", partial(revolve, graph, s)) for s in counts)


def _propose_recursive(graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
    num_blocks = len(find_blocks(graph))
    counts = _slot_counts(num_blocks + 2) if options.budget_bytes is not None else [1]
    yield from _within_reach((f"k={k}", partial(recursive, graph, k)) for k in counts)


def _within_reach(
    settings: Iterator[tuple[str, Callable[[], Schedule]]],
) -> Iterator[Candidate]:
    """Candidates of all settings but those that would run far too often."""
    reason: StrategyError | None = None
    found = False
    for setting, make in settings:
        try:
            schedule = make()
        except StrategyError as error:
            reason = error
            continue
        found = True
        yield Candidate(schedule=schedule, setting=setting)
    if not found and reason is not None:
        raise reason


def _slot_counts(most: int) -> list[int]:
    """1, 2, 3, … and, where there are many, some 20 % apart."""
    counts = [1]
    while counts[-1] < most:
        counts.append(min(most, max(counts[-1] + 1, round(1.2 * counts[-1]))))
    return counts


REVOLVE = Strategy(
    name="revolve",
    summary="states before blocks saved in s slots by binomial recursion; recomputed repeatedly",
    source="Griewank and Walther, ACM TOMS 26 (2000), Algorithm 799; treeverse (1992)",
    propose=_propose_revolve,
)
CHEN_RECURSIVE = Strategy(
    name="chen_recursive",
    summary="k states saved per stretch, each part divided again when reached (log n for k = 1)",
    source="Chen et al., arXiv:1604.06174, Section 4.4",
    propose=_propose_recursive,
)
