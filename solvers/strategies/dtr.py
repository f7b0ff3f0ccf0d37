"""Dynamic tensor rematerialization, simulated online.

Kirisame et al., *Dynamic Tensor Rematerialization* (ICLR 2021, arXiv:2006.09616):
the step runs in its own order with no plan. When an operator does not fit in the
budget, storages are evicted one by one, each time the one with the least

    h_DTR(k) = (c(k) + sum of c over e*(k)) / (size(k) · staleness(k)),

where ``c`` is the cost of the operator that makes a storage, ``e*(k)`` its evicted
neighbourhood (evicted storages that must be recomputed before ``k``, and those
that need ``k`` to be recomputed, through evicted ones), and staleness the time
since the last access. An evicted storage that is read is recomputed, with what
that misses, depth first, evicting others where needed. A storage is evicted at once
when the program gives up its last reference to it (the paper's eager eviction); one
that is rematerialized afterwards, for others' sake, waits to be chosen like any other.

The clock counts the costs of the runs. Neighbourhoods are exact, not the
union-find approximation. The paper's runtime skips small tensors and samples
candidates to save time; the simulation looks at all, as the paper's own does.

Resident and kept storages and outputs of pinned operators are never evicted. Those
of the backward pass are *banished* (the paper's word) when the program needs them
no more: freed for good, and what could not be recomputed without them is not
evicted from then on. Those of the forward pass (states of random generators, from
which dropout masks are drawn again) are banished only where nothing else is left
to evict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from graph_capture.cost_graph import CostGraph

from ..replay import replay
from ..schedule import Schedule
from ..uniform import turning_point
from .runs import Runs, last_uses
from .strategy import Candidate, Strategy, StrategyError, StrategyFailure, StrategyOptions

MOST_RUNS = 10
"""Runs an operator, on average, beyond which the simulation gives up: it thrashes."""


def dtr(
    graph: CostGraph, budget_bytes: int, *, give_up: Callable[[], bool] | None = None
) -> Schedule:
    """Return the runs of a step under DTR with ``budget_bytes`` of memory.

    Where everything fits, nothing is evicted.

    Parameters
    ----------
    give_up
        Called before each run, recomputations included; the simulation ends once it
        returns true.

    Raises
    ------
    StrategyError
        When an operator does not fit with everything evictable gone, the
        simulation recomputes without end, or it was told to give up.
    """
    unplanned = Schedule.keep_all(graph)
    if replay(graph, unplanned).peak_bytes <= budget_bytes:
        return unplanned
    return _Simulation(graph, budget_bytes, give_up).run()


class _Simulation:
    def __init__(
        self, graph: CostGraph, budget_bytes: int, give_up: Callable[[], bool] | None
    ) -> None:
        self.graph, self.budget_bytes = graph, budget_bytes
        self.give_up = give_up if give_up is not None else lambda: False
        self.runs = Runs(graph)
        self.turn = turning_point(graph)
        self.last = last_uses(graph)
        self.fixed = set(self.runs.fixed)
        self.completed = -1  # the program's last operator that has run
        self.waiting: set[int] = set()  # fixed, and no longer needed by the program
        self.cost = [op.cost_ns for op in graph.operators]
        self.size = [s.size_bytes for s in graph.storages]
        self.used_bytes = graph.resident_bytes
        self.clock_ns = 0
        self.accessed_ns = [0] * len(graph.storages)
        self.locks = [0] * len(graph.storages)
        self.evicted: set[int] = set()
        self.effort: dict[int, int] = {}  # numerators of h, while they hold

    def run(self) -> Schedule:
        for x in range(self.graph.num_operators):
            stack = [x]
            self._lock(x)
            while stack:
                v = stack[-1]
                missing = self.runs.missing(v)
                if missing:
                    stack.append(self.runs.producer(missing[0]))
                    self._lock(stack[-1])
                    continue
                if self.give_up():
                    raise StrategyError(f"DTR was told to give up before operator {x}")
                self._perform(v, x)
                stack.pop()
        return self.runs.schedule()

    def _lock(self, v: int) -> None:
        """Protect what an operator waits for from eviction until it has run."""
        for k in self.runs.inputs[v]:
            self.locks[k] += 1

    def _perform(self, v: int, x: int) -> None:
        """Run ``v`` on behalf of the program's operator ``x``."""
        op = self.graph.operators[v]
        at_hand = self.runs.at_hand
        new = [k for k in op.outputs if k not in at_hand]
        # A kept storage that is made again is there twice while its producer runs.
        made = [k for k in op.outputs if k not in at_hand or self.graph.storages[k].kept]
        self._make_room(v, sum(self.size[k] for k in made) + op.workspace_bytes)
        if len(self.runs.order) >= MOST_RUNS * self.graph.num_operators:
            raise StrategyError(
                f"DTR thrashes: more than {MOST_RUNS} runs an operator within "
                f"{self.budget_bytes} bytes",
                StrategyFailure.OUT_OF_MEMORY,
            )
        self.runs.run(v)
        for k in new:
            self.used_bytes += self.size[k]
            if k in self.evicted:
                self.evicted.discard(k)
                self._forget_around(k)
        self.clock_ns += self.cost[v]
        for k in (*self.runs.inputs[v], *op.outputs):
            self.accessed_ns[k] = self.clock_ns
        for k in self.runs.inputs[v]:
            self.locks[k] -= 1
        for k in (*self.runs.inputs[v], *op.outputs):
            if self.last[k] == x == v and self._evictable(k):
                self._evict(k)
        if v == x:
            self.completed = x
            self.waiting.update(
                k
                for k in (*self.runs.inputs[v], *op.outputs)
                if k in self.fixed and self.last[k] == x and not self.graph.storages[k].kept
            )
            for k in sorted(self.waiting):
                if self.runs.producer(k) >= self.turn:
                    self._banish(k)

    def _banish(self, k: int) -> bool:
        """Free ``k`` for good, unless what is evicted and needed again needs it."""
        if self.locks[k]:
            return False
        x = self.completed
        lost: set[int] = {k}
        remain: set[int] = set()
        stack = [k]
        while stack:
            for v in self.graph.consumers[stack.pop()]:
                if v > x or self.graph.operators[v].pinned is not None:
                    continue
                for j in self.graph.operators[v].outputs:
                    if j in self.runs.at_hand:
                        remain.add(j)
                    elif j in self.evicted and j not in lost:
                        if self.last[j] > x or self.locks[j]:
                            return False
                        lost.add(j)
                        stack.append(j)
        self.fixed |= remain
        # Rematerialized without a reference: nothing evicts them now, so they are banished in turn.
        self.waiting |= {j for j in remain if self.last[j] <= x and not self.graph.storages[j].kept}
        for j in lost:
            if j in self.runs.at_hand:
                self.used_bytes -= self.size[j]
                self.runs.at_hand.discard(j)
            self.evicted.discard(j)
            self.effort.pop(j, None)
        self.effort.clear()
        self.waiting.discard(k)
        return True

    def _make_room(self, v: int, need_bytes: int) -> None:
        """Evict until ``v`` fits."""
        while self.used_bytes + need_bytes > self.budget_bytes:
            made = self.graph.operators[v].outputs  # siblings in memory are made anew, not evicted
            candidates = [
                k
                for k in self.runs.at_hand
                if self.size[k] and self._evictable(k) and k not in made
            ]
            if not candidates:
                if any(self._banish(k) for k in sorted(self.waiting)):
                    continue
                raise StrategyError(
                    f"DTR runs out of memory: {self.graph.operators[v].name!r} needs {need_bytes} "
                    f"bytes beside {self.used_bytes} that cannot be evicted; the budget is "
                    f"{self.budget_bytes}",
                    StrategyFailure.OUT_OF_MEMORY,
                )
            self._evict(min(candidates, key=lambda k: (self._score(k), k)))

    def _evictable(self, k: int) -> bool:
        return not self.locks[k] and k in self.runs.at_hand and k not in self.fixed

    def _evict(self, k: int) -> None:
        self.runs.at_hand.discard(k)
        self.used_bytes -= self.size[k]
        self.evicted.add(k)
        self.effort.pop(k, None)
        self._forget_around(k)

    def _score(self, k: int) -> float:
        """h_DTR; staleness counts from one, so that nothing is divided by zero."""
        if k not in self.effort:
            makers = {self.runs.producer(k)}
            makers.update(self.runs.producer(j) for j in self._reach(k, down=False)[0])
            makers.update(self.runs.producer(j) for j in self._reach(k, down=True)[0])
            self.effort[k] = sum(self.cost[v] for v in makers)
        return self.effort[k] / (self.size[k] * (self.clock_ns - self.accessed_ns[k] + 1))

    def _forget_around(self, k: int) -> None:
        """The numerators that an eviction or a recomputation of ``k`` changes."""
        for down in (False, True):
            for j in self._reach(k, down=down)[1]:
                self.effort.pop(j, None)

    def _reach(self, k: int, *, down: bool) -> tuple[set[int], set[int]]:
        """Return evicted storages reached from ``k`` through evicted ones, and adjacent ones in
        memory."""
        inside: set[int] = set()
        rim: set[int] = set()
        stack = [k]
        while stack:
            for j in self._neighbours(stack.pop(), down=down):
                if j in self.runs.at_hand:
                    rim.add(j)
                elif j in self.evicted and j not in inside and j != k:
                    inside.add(j)
                    stack.append(j)
        return inside, rim

    def _neighbours(self, k: int, *, down: bool) -> Iterator[int]:
        if down:
            for v in self.graph.consumers[k]:
                yield from self.graph.operators[v].outputs
        else:
            yield from self.runs.inputs[self.runs.producer(k)]


def _propose(graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
    if options.budget_bytes is None:
        raise StrategyError("dtr needs a budget; give budget_bytes")
    yield Candidate(schedule=dtr(graph, options.budget_bytes))


DTR = Strategy(
    name="dtr",
    summary="online: at the budget evicts least cost of neighbourhood / (size × staleness)",
    source="Kirisame et al., arXiv:2006.09616, h_DTR with eager eviction",
    propose=_propose,
    needs_budget=True,
)
