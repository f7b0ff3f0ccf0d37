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

import threading
import time
from dataclasses import dataclass

import numpy as np

from graph_capture.cost_graph import CostGraph

from .arrays import GraphArrays, graph_arrays
from .backward_states import CUT, FOUND, enter, explore, moves_of, new_states
from .replay import replay
from .schedule import Schedule

FIRST_STATES = 4_000
"""What the first pass over the operators may look at for each; each later pass has more."""

MORE_STATES = 8
MOST_STATES = 2_000_000
MOST_BYTES = 300_000_000


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


class _Search:
    """The bound, and the states from which a path within the bound is known."""

    def __init__(self, g: GraphArrays, peak_bytes: int | None, lower_bound_bytes: int) -> None:
        self.g = g
        self.ceiling = np.iinfo(np.int64).max if peak_bytes is None else peak_bytes
        self.bound = max(lower_bound_bytes, g.resident_bytes)
        self.moves, self.forced = moves_of(g)
        self.num_words = max(1, -(-len(self.moves.size) // 64))
        self.most_states = min(MOST_STATES, MOST_BYTES // (8 * self.num_words + 128))
        self.states = new_states(2 * FIRST_STATES, self.num_words)
        self.num_states = 0
        self.states_per_s = 0.0
        self.end = -1
        nothing = np.zeros(self.num_words, dtype=np.uint64)
        self.num_states, origin = enter(self.states, 0, 0, nothing)
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
        outcome, bound, looked_at, num_states, end = explore(
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
        self.states = new_states(needed + self.num_states, self.num_words)
        for s in range(num):
            enter(self.states, s, int(old.front[s]), old.words[s])
        for name in ("weight", "down", "down_run"):
            getattr(self.states, name)[:num] = getattr(old, name)[:num]


def compile_backward_search(g: GraphArrays) -> None:
    """Compile what the search runs, once in a process, before a clock starts."""
    if not explore.signatures:
        _Search(g, None, 0).run(1, 1, 1.0)
