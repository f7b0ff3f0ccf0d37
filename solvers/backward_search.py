"""Find the least memory, or a lower bound on it, by searching backward from the end of the step.

In a state (x, S), the operators before x have run, and S is the part of their outputs
that is still to be read. The last run before it was either the first run of x - 1 or
another run of the producer u < x of something in S. Before that run, its inputs were
there in place of its outputs:

    (x, S) → (x - 1, S \\ out(x-1) ∪ in(x-1))      the first run of x - 1
    (x, S) → (x,     S \\ out(u) ∪ in(u))          u runs again; u not pinned, out(u) ∩ S ≠ ∅

The run needs what is in S after the step, what it allocates, its workspace, what is
resident, and every kept storage made before x. What it writes over does not count,
unless that is in S before the step, too. Kept storages are in no S. This is the black
pebble game (Sethi, 1975) with weights, its moves read backward. A schedule whose first
runs keep the base order is a path from (n, ∅) to (0, ∅), and its peak is the highest
run on the path.

For each x in turn, a path from (x, F) is searched. F is what only pinned operators made
and what is read later, so it is there in every schedule, and none of these peaks is
above the peak of the whole step. Runs within the bound are free and are tried depth
first: the first run, then the run of the latest producer. When all states within the
bound have been seen and none leads to one whose path is known, the bound rises to the
lowest run that was too high. Where a run within the bound needs nothing beyond S, no
other move from the state is tried: any path from (x, S) to the beginning also works
from the smaller state, without the run and with less memory all the way. So the bound
is proven whenever a search is cut, and when x = n is reached the path is an optimal
schedule. All figures are integers: nothing is rounded.

Imperfections: where a bound is far above what each operator needs by itself, there are
many states, and the search is cut (first by the number of states, so that results do
not depend on the machine, and by the clock). An optimal schedule may run operators very
often. The search does not know that nothing saved in forward is written over in
backward (``Operator.rewrites``).
"""

from __future__ import annotations

import heapq
import threading
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from graph_capture.cost_graph import CostGraph

from .arrays import ByteArray, GraphArrays, IntArray, graph_arrays
from .replay import replay
from .schedule import Schedule

FIRST_STATES = 4_000
"""What the first pass over the operators may look at for each; each later pass has more."""

MORE_STATES = 8
MOST_STATES = 2_000_000
MOST_BYTES = 300_000_000

FOUND, CUT, NO_PATH = 0, 1, 2


@dataclass(frozen=True, slots=True)
class LeastBound:
    """What is proven about the least memory of schedules whose first runs keep the base order.

    Parameters
    ----------
    lower_bound_bytes
        None has a lower peak.
    schedule
        One of that peak, when it was found.
    proven
        Whether the bound is the least memory: ``schedule`` or the known peak reaches it.
    """

    lower_bound_bytes: int
    schedule: Schedule | None
    proven: bool


def least_memory_bound(
    graph: CostGraph,
    *,
    peak_bytes: int | None = None,
    lower_bound_bytes: int = 0,
    time_limit_s: float = 10.0,
    stop: threading.Event | None = None,
) -> LeastBound:
    """Raise the bound until it is the least memory, or until the search is cut.

    Parameters
    ----------
    peak_bytes
        Peak of a known schedule. Only lower paths are searched.
    lower_bound_bytes
        A bound that is already proven.
    stop
        Ends the search when set.

    Raises
    ------
    RuntimeError
        When the path found is not a schedule with the proven peak. This is a defect and
        is never hidden.
    """
    g = graph_arrays(graph)
    compile_backward_search(g)
    deadline_s = time.monotonic() + time_limit_s
    search = _Search(g, peak_bytes, lower_bound_bytes)
    n = graph.num_operators
    limit = FIRST_STATES
    left = list(range(1, n + 1))
    while left:
        again: list[int] = []
        for x in left:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or (stop is not None and stop.is_set()):
                return LeastBound(search.bound, None, False)
            outcome = search.run(x, limit, left_s)
            if search.bound == peak_bytes:
                return LeastBound(search.bound, None, True)
            if outcome == CUT:
                again.append(x)
        if n not in again:
            break
        if limit >= search.most_states:
            return LeastBound(search.bound, None, False)
        left = again
        limit = min(MORE_STATES * limit, search.most_states)
    schedule = search.schedule()
    if any(op.rewrites for op in graph.operators):
        # The bound holds, the path may need more.
        reached = replay(graph, schedule).peak_bytes <= max(search.bound, graph.resident_bytes)
        return LeastBound(search.bound, schedule if reached else None, reached)
    if replay(graph, schedule).peak_bytes != max(search.bound, graph.resident_bytes):
        raise RuntimeError("the path of the backward search has another peak than its bound")
    return LeastBound(search.bound, schedule, True)


class _Moves(NamedTuple):
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


class _States(NamedTuple):
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


class _Search:
    """The bound, and the states from which a path within the bound is known."""

    def __init__(self, g: GraphArrays, peak_bytes: int | None, lower_bound_bytes: int) -> None:
        self.g = g
        self.ceiling = np.iinfo(np.int64).max if peak_bytes is None else peak_bytes
        self.bound = max(lower_bound_bytes, g.resident_bytes)
        self.moves, self.forced = _moves_of(g)
        self.num_words = max(1, -(-len(self.moves.size) // 64))
        self.most_states = min(MOST_STATES, MOST_BYTES // (8 * self.num_words + 128))
        self.states = _new_states(2 * FIRST_STATES, self.num_words)
        self.num_states = 0
        self.states_per_s = 0.0
        self.end = -1
        nothing = np.zeros(self.num_words, dtype=np.uint64)
        self.num_states, origin = _enter(self.states, 0, 0, nothing)
        self.states.down[origin] = origin

    def run(self, x: int, limit: int, left_s: float) -> int:
        """Search from (x, F) through ``limit`` new states, or as many as the time allows."""
        if self.states_per_s > 0:
            limit = min(limit, max(1000, int(left_s * self.states_per_s)))
        self._make_room(limit)
        begin_s = time.monotonic()
        before = self.num_states
        words = np.zeros(self.num_words, dtype=np.uint64)
        for k in self.forced[x]:
            words[k // 64] |= np.uint64(1 << (k % 64))
        weight = int(self.moves.size[self.forced[x]].sum())
        outcome, bound, looked_at, num_states, end = _explore(
            self.moves, self.states, before, x, words, weight, self.bound, self.ceiling, limit
        )
        self.num_states = num_states
        self.bound = bound
        if outcome == FOUND and x == self.g.num_operators:
            self.end = end
        elapsed_s = time.monotonic() - begin_s
        if looked_at >= FIRST_STATES and elapsed_s > 0:
            self.states_per_s = looked_at / elapsed_s
        return outcome

    def schedule(self) -> Schedule:
        """Return the path from (n, ∅) in the order of its runs."""
        order: list[int] = []
        s = self.end
        while self.states.down[s] != s:
            order.append(int(self.states.down_run[s]))
            s = int(self.states.down[s])
        return Schedule(tuple(reversed(order)))

    def _make_room(self, limit: int) -> None:
        needed = self.num_states + limit + self.g.num_storages + 4
        if needed <= len(self.states.front):
            return
        old, num = self.states, self.num_states
        self.states = _new_states(needed + self.num_states, self.num_words)
        for s in range(num):
            _enter(self.states, s, int(old.front[s]), old.words[s])
        for name in ("weight", "down", "down_run"):
            getattr(self.states, name)[:num] = getattr(old, name)[:num]


def compile_backward_search(g: GraphArrays) -> None:
    """Compile what the search runs, once in a process, before a clock starts."""
    if not _explore.signatures:
        _Search(g, None, 0).run(1, 1, 1.0)


def _moves_of(g: GraphArrays) -> tuple[_Moves, list[list[int]]]:
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
    moves = _Moves(
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


def _new_states(num: int, num_words: int) -> _States:
    table_size = 1 << int(2 * num).bit_length()
    return _States(
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
def _enter(states, num_states, front, words):  # type: ignore[no-untyped-def]
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
def _explore(moves, states, before, x, words, weight, bound, ceiling, limit):  # type: ignore[no-untyped-def]
    """``(outcome, bound, states looked at, states known, the first state)``.

    The first state is that of ``x`` and ``words``. Of the new states, only
    those of a path that is found remain.
    """
    num, start = _enter(states, before, x, words)
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
        num, new = _enter(states, num, front - 1 if is_first else front, words)
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
        num, s = _enter(states, num, rest[i, 0], words[i])
        states.weight[s] = rest[i, 1]
        states.down[s] = down
        states.down_run[s] = rest[i, 2]
        down = s
    return num, down
