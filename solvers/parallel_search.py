"""Search for schedules in a second thread while the first one proves bounds.

It runs one search after another: the chain's dynamic program, where there is a chain;
the remaining simple strategies of the field; path relinking among all known schedules;
slice refinement restricted to the operators that known solutions run again, a small
model that combines the best of them; annealing from the best known schedule, hot and
cool in turn. HiGHS and the compiled loops release the interpreter lock, so both threads
run at once. Results wait for :meth:`ParallelSearch.collect`, so that the caller decides
when they count.
"""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType

import numpy as np

from .baseline_incumbents import BaselineSchedules
from .chains.chain_dp import chain_dp
from .incumbent import Incumbent
from .local_search import (
    COOL,
    HEAT,
    local_search,
)
from .path_relinking import Pool
from .schedule import Schedule
from .slices.refinement import slice_refinement
from .slices.slicing import Slicing

CHAIN_SHARE = 0.5
"""Share of the time left that the chain's dynamic program may take."""

CHAIN_S = 12.0
"""And no more than this: menus get better with time, but slowly."""

ANNEAL_S = 2.0
EXTRA_MOVES = 1_000_000_000

RESTRICTED_SHARE = 0.3
"""Of the time left, what a restricted search may take."""

RESTRICTED_S = (2.0, 15.0)
"""And no less, and no more."""

RELINK_TRIES = 8_000
RELINK_S = 2.0
POOL = 24
"""Schedules that pieces are taken from."""

HEARD = 12
"""Solutions that the restricted search puts together."""


class ParallelSearch:
    """The second thread; it runs inside the ``with`` block, when ``wanted``."""

    def __init__(
        self,
        state: Incumbent,
        *,
        seed: int,
        wanted: bool,
        baselines: BaselineSchedules | None = None,
    ) -> None:
        self.state, self.seed, self.wanted = state, seed, wanted
        self._baselines = baselines
        self._found: list[tuple[Schedule, str]] = []
        self._own: Schedule | None = None
        self._slicing: Slicing | None = None
        self._heard: deque[Schedule] = deque(maxlen=HEARD)
        self._pool = Pool(state.graph, state.budget_bytes, most=POOL)
        self._is_new = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._error: BaseException | None = None

    def __enter__(self) -> ParallelSearch:
        if self.wanted:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self.wanted:
            self._thread.join()
        if self.state.done:
            self._found.clear()  # nothing to gain, and the result must not depend on the clock
        if error is None:
            self.collect()

    def collect(self) -> None:
        """Offer what was found since the last call.

        Raises
        ------
        Exception
            Whatever ended the thread early.
        """
        with self._lock:
            found, self._found = self._found, []
        for schedule, solver in found:
            self.state.offer(schedule, solver)
        if self._error is not None:
            raise self._error

    def _keep(self, schedule: Schedule | None, solver: str) -> None:
        if schedule is not None:
            with self._lock:
                self._found.append((schedule, solver))
            self._pool.add(schedule)
            self._own = self._best(schedule)

    def hear(self, schedule: Schedule) -> None:
        """Add a solution, which may not fit, as material for the searches."""
        with self._lock:
            self._heard.append(schedule)

    def suggest(self, slicing: Slicing) -> None:
        """Note where memory binds, for a restricted search."""
        with self._lock:
            self._slicing = slicing if self._slicing is None else self._slicing | slicing
            self._is_new = True

    def _work(self) -> None:
        try:
            chain = chain_dp(
                self.state.graph,
                self.state.budget_bytes,
                time_limit_s=min(CHAIN_S, CHAIN_SHARE * self.state.left_s),
                seed=self.seed,
                stop=self._stop,
            )
            self._keep(chain.schedule, "chain_dp")
            if chain.schedule is not None:
                self._anneal(chain.schedule, COOL, self.seed)
            self._relink(self.seed)
            if self._baselines is not None:
                for schedule, name in self._baselines.families(
                    lambda: self._stop.is_set() or self.state.left_s <= 0
                ):
                    self._keep(schedule, name)
            turn = 0
            while not self._stop.is_set() and self.state.left_s > 0:
                seed = self.seed + 31 * turn
                if not self._restricted():
                    self._anneal(None, HEAT if turn % 2 else COOL, seed)
                self._relink(seed)
                turn += 1
        except Exception as error:  # noqa: BLE001 - raised again by collect()
            self._error = error

    def _relink(self, seed: int) -> None:
        """Put stretches of all known schedules into the best one."""
        best = self._best()
        if best is None:
            return
        with self._lock:
            heard = tuple(self._heard)
        for schedule in heard:
            self._pool.add(schedule)
        linked = self._pool.relink(
            best,
            num_tries=RELINK_TRIES,
            time_limit_s=min(RELINK_S, self.state.left_s),
            seed=seed,
            stop=self._stop,
        )
        if linked != best:
            self._keep(linked, "path_relinking")

    def _restricted(self) -> bool:
        """Refine slices over the operators that known solutions run again; return whether it
        ran."""
        with self._lock:
            heard, slicing, is_new = tuple(self._heard), self._slicing, self._is_new
            self._is_new = False
        best = self._best()
        if not is_new or slicing is None:
            return False
        candidates = np.zeros(self.state.graph.num_operators, dtype=bool)
        for schedule in [*heard, *([] if best is None else [best])]:
            candidates[list(schedule.recomputed())] = True
        left_s = self.state.left_s
        least_s, most_s = RESTRICTED_S
        state = Incumbent(
            self.state.graph,
            self.state.budget_bytes,
            min(left_s, most_s, max(least_s, RESTRICTED_SHARE * left_s)),
            stop=self._stop,
        )
        state.offer(best, "hint")
        slice_refinement(state, seed=self.seed, slicing=slicing, candidates=candidates)
        if state.solver != "hint":
            self._keep(state.schedule, "restricted slice_refinement")
        return True

    def _anneal(self, start: Schedule | None, heat: float, seed: int) -> None:
        outcome = local_search(
            self.state.graph,
            self.state.budget_bytes,
            time_limit_s=min(ANNEAL_S, self.state.left_s),
            num_moves=EXTRA_MOVES,
            seed=seed,
            start=self._best() if start is None else start,
            heat=heat,
            stop=self._stop,
        )
        self._keep(outcome.schedule, "local_search")

    def _best(self, new: Schedule | None = None) -> Schedule | None:
        """Return the best schedule known here or to the caller, or ``new`` if that is better."""
        known = [s for s in (self._own, self.state.schedule, new) if s is not None]
        cost = [op.cost_ns for op in self.state.graph.operators]
        return min(known, key=lambda s: sum(cost[v] for v in s.order), default=None)
