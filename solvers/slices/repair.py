"""Schedules that fit, of a relaxation's solutions that do not."""

from __future__ import annotations

from ..incumbent import Incumbent
from ..local_search import COOL, local_search
from ..path_relinking import Pool
from ..replay import replay
from ..schedule import Schedule

NAME = "slice_refinement"

POOL = 16
"""Solutions and incumbents that pieces are taken from."""

AT_ONCE_TRIES = 500
AT_ONCE_S = 0.25
"""For a new solution, while HiGHS waits."""

TRIES = 2_000
RELINK_S = 1.0
MOVES = 40_000
ANNEAL_S = 2.0
"""After a round."""


class Repair:
    """Remembers solutions, and offers what can be made of them to ``state``."""

    def __init__(self, state: Incumbent, seed: int) -> None:
        self.state, self.seed = state, seed
        self._pool = Pool(state.graph, state.budget_bytes, most=POOL)
        self._num = 0

    def at_once(self, schedule: Schedule) -> None:
        """Hear of a new solution."""
        self._pool.add(schedule)
        self._relink(AT_ONCE_TRIES, AT_ONCE_S)

    def after_round(self, schedule: Schedule) -> None:
        """Anneal the round's last solution, and relink longer."""
        if self.state.done:
            return
        outcome = local_search(
            self.state.graph,
            self.state.budget_bytes,
            time_limit_s=min(ANNEAL_S, max(0.0, self.state.left_s)),
            num_moves=MOVES,
            seed=self.seed,
            start=schedule,
            heat=COOL,
            stop=self.state.stop,
        )
        self.state.offer(outcome.schedule, f"local_search after {NAME}")
        for known in (schedule, outcome.schedule):
            if known is not None:
                self._pool.add(known)
        self._relink(TRIES, RELINK_S)

    def _relink(self, num_tries: int, time_limit_s: float) -> None:
        state = self.state
        if state.done:
            return
        start = state.schedule
        if start is None:
            start = min(self._pool, key=lambda s: replay(state.graph, s).peak_bytes)
        self._num += 1
        linked = self._pool.relink(
            start,
            num_tries=num_tries,
            time_limit_s=min(time_limit_s, max(0.0, state.left_s)),
            seed=self.seed + 7919 * self._num,
            stop=state.stop,
        )
        state.offer(linked, f"path_relinking after {NAME}")
