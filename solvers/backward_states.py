"""States and moves of the backward search, and the compiled exploration of them.

What a state is, and which moves lead from it, is said in :mod:`solvers.backward_search`.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .arrays import ByteArray, GraphArrays, IntArray

FOUND, CUT, NO_PATH = 0, 1, 2
"""A path is known; the search was cut; there is none below the ceiling."""


class Moves(NamedTuple):
    """What a run does to a state. Storages are those that are read and not kept."""

    in_ptr: IntArray
    in_idx: IntArray
    out_ptr: IntArray
    out_idx: IntArray
    over_ptr: IntArray
    over_idx: IntArray
    size: IntArray
    producer: IntArray
    pinned: ByteArray
    first_bytes: IntArray
    """By operator: while it runs first, beside S; resident and kept storages included."""
    again_bytes: IntArray
    """By operator: while it runs again, beside S and ``there_bytes``."""
    there_bytes: IntArray
    """By next base operator: resident and kept storages."""


class States(NamedTuple):
    """The known states, with a hash table over them (open addressing)."""

    words: NDArray[np.uint64]
    """S as bits."""
    front: IntArray
    """x."""
    weight: IntArray
    """Bytes of S."""
    parent: IntArray
    """The state that a search came from; -1 at its start."""
    parent_run: IntArray
    down: IntArray
    """Where the path to (0, ∅) goes on; -1 where none is known."""
    down_run: IntArray
    seen: ByteArray
    cursor: IntArray
    """The move tried last: -1 before the first one, then storages downward."""
    slot: IntArray
    """Place in ``table``."""
    table: IntArray


def moves_of(g: GraphArrays) -> tuple[Moves, list[list[int]]]:
    """The moves, and for each x the F of (x, F)."""
    n = g.num_operators
    read = np.diff(g.pos_ptr) > 1
    real = np.flatnonzero(read & (g.kept == 0) & (g.producer >= 0))
    real = real[np.argsort(g.producer[real], kind="stable")]
    number = np.full(g.num_storages, -1, dtype=np.int64)
    number[real] = np.arange(len(real))
    first_bytes = np.zeros(n, dtype=np.int64)
    again_bytes = np.zeros(n, dtype=np.int64)
    there_bytes = np.full(n + 1, g.resident_bytes, dtype=np.int64)
    ins: list[IntArray] = []
    outs: list[IntArray] = []
    over: list[IntArray] = []
    for v in range(n):
        made = g.outputs(v)
        again_bytes[v] = g.size[made].sum() + g.workspace[v]
        first_bytes[v] = there_bytes[v] + again_bytes[v]
        there_bytes[v + 1] = there_bytes[v] + g.size[made[g.kept[made] > 0]].sum()
        ins.append(np.sort(number[g.inputs(v)][number[g.inputs(v)] >= 0]))
        outs.append(np.sort(number[made][number[made] >= 0]))
        over.append(number[g.written_over(v)])
    forced: list[list[int]] = [[] for _ in range(n + 1)]
    for k in real.tolist():
        if g.pinned[g.producer[k]]:
            for x in range(int(g.producer[k]) + 1, int(g.positions(k)[-1]) + 1):
                forced[x].append(int(number[k]))
    in_ptr, in_idx = _joined(ins)
    out_ptr, out_idx = _joined(outs)
    over_ptr, over_idx = _joined(over)
    moves = Moves(
        in_ptr=in_ptr,
        in_idx=in_idx,
        out_ptr=out_ptr,
        out_idx=out_idx,
        over_ptr=over_ptr,
        over_idx=over_idx,
        size=g.size[real],
        producer=g.producer[real],
        pinned=g.pinned,
        first_bytes=first_bytes,
        again_bytes=again_bytes,
        there_bytes=there_bytes,
    )
    return moves, forced


def _joined(rows: list[IntArray]) -> tuple[IntArray, IntArray]:
    ptr = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=ptr[1:])
    return ptr, np.concatenate([*rows, np.zeros(0, dtype=np.int64)]).astype(np.int64)


def new_states(num: int, num_words: int) -> States:
    table_size = 1 << int(2 * num).bit_length()
    return States(
        words=np.zeros((num, num_words), dtype=np.uint64),
        front=np.zeros(num, dtype=np.int64),
        weight=np.zeros(num, dtype=np.int64),
        parent=np.full(num, -1, dtype=np.int64),
        parent_run=np.full(num, -1, dtype=np.int64),
        down=np.full(num, -1, dtype=np.int64),
        down_run=np.full(num, -1, dtype=np.int64),
        seen=np.zeros(num, dtype=np.uint8),
        cursor=np.full(num, -1, dtype=np.int64),
        slot=np.zeros(num, dtype=np.int64),
        table=np.full(table_size, -1, dtype=np.int64),
    )


@njit(cache=True, nogil=True)
def enter(states, num_states, front, words):  # type: ignore[no-untyped-def]
    """``(num_states, index)`` with the state of ``front`` and ``words`` entered."""
    code = np.uint64(front) * np.uint64(0x9E3779B97F4A7C15)
    for i in range(words.size):
        code ^= words[i]
        code *= np.uint64(0xBF58476D1CE4E5B9)
        code ^= code >> np.uint64(29)
    mask = states.table.size - 1
    place = np.int64(code & np.uint64(mask))
    while True:
        s = states.table[place]
        if s < 0:
            break
        if states.front[s] == front:
            same = True
            for i in range(words.size):
                if states.words[s, i] != words[i]:
                    same = False
                    break
            if same:
                return num_states, s
        place = (place + 1) & mask
    s = num_states
    states.table[place] = s
    states.slot[s] = place
    states.front[s] = front
    states.words[s] = words
    states.seen[s] = 0
    states.cursor[s] = -1
    states.down[s] = -1
    states.parent[s] = -1
    states.parent_run[s] = -1
    return num_states + 1, s


@njit(cache=True, nogil=True)
def explore(moves, states, before, x, words, weight, bound, ceiling, limit):  # type: ignore[no-untyped-def]
    """``(outcome, bound, states looked at, states known, the first state)``.

    The first state is that of ``x`` and ``words``. Of the new states, only
    those of a path that is found remain.
    """
    num, start = enter(states, before, x, words)
    if states.down[start] >= 0:
        return FOUND, bound, 0, num, start
    states.weight[start] = weight
    states.seen[start] = 1
    stack = [start]
    high = [(bound, start, start, start)]  # bytes, state, parent, run
    high.pop()
    words = words.copy()
    outcome = CUT
    goal, goal_parent, goal_run = start, start, start
    while outcome == CUT and num - before < limit:
        if len(stack) == 0:
            if len(high) == 0:
                outcome = NO_PATH
                bound = ceiling
                break
            bound = high[0][0]  # all states within the bound were seen and lead nowhere
            while len(high) > 0 and high[0][0] == bound:
                _, s, parent, run = heapq.heappop(high)
                if states.down[s] >= 0:
                    outcome, goal, goal_parent, goal_run = FOUND, s, parent, run
                elif states.seen[s] == 0:
                    states.seen[s] = 1
                    states.parent[s] = parent
                    states.parent_run[s] = run
                    stack.append(s)
            continue
        s = stack[-1]
        front = states.front[s]
        words[:] = states.words[s]
        weight = states.weight[s]
        k = states.cursor[s]
        is_first = k < 0  # the first run is tried before all others
        if is_first:
            states.cursor[s] = 64 * words.size
            run = front - 1
        else:
            k = _highest_below(words, k)
            if k < 0:
                stack.pop()
                continue
            states.cursor[s] = k
            run = moves.producer[k]
            if moves.pinned[run]:
                continue
        highest = -1
        for a in range(moves.out_ptr[run], moves.out_ptr[run + 1]):
            u = moves.out_idx[a]
            bit = np.uint64(1) << np.uint64(u % 64)
            if words[u // 64] & bit:
                highest = u
                words[u // 64] ^= bit
                weight -= moves.size[u]
        if not is_first and highest != k:
            continue  # tried together with the last of its outputs
        copied = 0
        for a in range(moves.over_ptr[run], moves.over_ptr[run + 1]):
            u = moves.over_idx[a]
            if words[u // 64] & (np.uint64(1) << np.uint64(u % 64)):
                copied += moves.size[u]
        grows = False
        for a in range(moves.in_ptr[run], moves.in_ptr[run + 1]):
            u = moves.in_idx[a]
            bit = np.uint64(1) << np.uint64(u % 64)
            if not words[u // 64] & bit:
                grows = True
                words[u // 64] |= bit
                weight += moves.size[u]
        if is_first:
            during = weight + copied + moves.first_bytes[run]
        else:
            during = weight + copied + moves.there_bytes[front] + moves.again_bytes[run]
        if during >= ceiling:
            continue
        if during <= bound and not grows:
            states.cursor[s] = 0  # no other move leads anywhere that this one does not
        num, new = enter(states, num, front - 1 if is_first else front, words)
        known = states.down[new] >= 0
        if states.seen[new] and not known:
            continue
        if not known:
            states.weight[new] = weight
        if during > bound:
            heapq.heappush(high, (during, new, s, run))
        elif known:
            outcome, goal, goal_parent, goal_run = FOUND, new, s, run
        else:
            states.seen[new] = 1
            states.parent[new] = s
            states.parent_run[new] = run
            stack.append(new)
    looked_at = num - before
    if outcome != FOUND:
        _forget(states, before, num)
        return outcome, bound, looked_at, before, -1
    num, start = _keep_path(states, before, num, goal, goal_parent, goal_run)
    return outcome, bound, looked_at, num, start


@njit(cache=True, nogil=True)
def _highest_below(words, end):  # type: ignore[no-untyped-def]
    """The highest bit of ``words`` below ``end``, or -1."""
    i = (end - 1) // 64
    part = np.uint64(0)
    if end > 0:
        part = words[i]
        if end % 64:
            part &= (np.uint64(1) << np.uint64(end % 64)) - np.uint64(1)
    while part == np.uint64(0):
        i -= 1
        if i < 0:
            return -1
        part = words[i]
    result = 64 * i
    for shift in (32, 16, 8, 4, 2, 1):
        if part >> np.uint64(shift):
            part >>= np.uint64(shift)
            result += shift
    return result


@njit(cache=True, nogil=True)
def _forget(states, before, num):  # type: ignore[no-untyped-def]
    """Remove the states entered last from the table; older ones are found without them."""
    for s in range(before, num):
        states.table[states.slot[s]] = -1


@njit(cache=True, nogil=True)
def _keep_path(states, before, num, goal, parent, run):  # type: ignore[no-untyped-def]
    """``(states known, the first state)`` when only the path to ``goal`` remains."""
    path = [parent]
    while states.parent[path[-1]] >= 0:
        path.append(states.parent[path[-1]])
    words = np.empty((len(path), states.words.shape[1]), dtype=np.uint64)
    rest = np.empty((len(path), 3), dtype=np.int64)  # front, weight, the run towards the goal
    for i, s in enumerate(path):
        words[i] = states.words[s]
        rest[i] = states.front[s], states.weight[s], run
        run = states.parent_run[s]
    _forget(states, before, num)
    num = before
    down = goal
    for i in range(len(path)):
        num, s = enter(states, num, rest[i, 0], words[i])
        states.weight[s] = rest[i, 1]
        states.down[s] = down
        states.down_run[s] = rest[i, 2]
        down = s
    return num, down


__all__ = [
    "CUT",
    "FOUND",
    "NO_PATH",
    "Moves",
    "States",
    "enter",
    "explore",
    "moves_of",
    "new_states",
]
