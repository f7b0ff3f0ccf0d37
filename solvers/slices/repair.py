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
"""For a new solution, while HiGHS waits."""

TRIES = 2_000
MOVES = 40_000
"""After a round."""

LARGE = 5_000
"""Operators from which tries and moves become fewer, as each takes longer."""

RELINK_S = 4.0
ANNEAL_S = 2.0
"""No longer than this on a machine that is slower than was thought; results then vary."""


class Repair:
    """Remembers solutions, and offers what can be made of them to ``state``."""

    def __init__(self, state: Incumbent, seed: int) -> None:
        self.state, self.seed = state, seed
        self._pool = Pool(state.graph, state.budget_bytes, most=POOL)
        self._num = 0

    def at_once(self, schedule: Schedule) -> None:
        """Hear of a new solution."""
        self._pool.add(schedule)
        self._relink(AT_ONCE_TRIES)

    def after_round(self, schedule: Schedule) -> None:
        """Anneal the round's last solution, and relink longer."""
        if self._over():
            return
        outcome = local_search(
            self.state.graph,
            self.state.budget_bytes,
            time_limit_s=min(ANNEAL_S, max(0.0, self.state.left_s)),
            num_moves=self._fewer(MOVES),
            seed=self.seed,
            start=schedule,
            heat=COOL,
            stop=self.state.stop,
        )
        self.state.offer(outcome.schedule, f"local_search after {NAME}")
        for known in (schedule, outcome.schedule):
            if known is not None:
                self._pool.add(known)
        self._relink(TRIES)

    def _over(self) -> bool:
        return self.state.done or self.state.left_s <= 0

    def _fewer(self, num: int) -> int:
        return max(1, min(num, num * LARGE // max(1, self.state.graph.num_operators)))

    def _relink(self, num_tries: int) -> None:
        state = self.state
        if self._over():
            return
        start = state.schedule
        if start is None:
            start = min(self._pool, key=lambda s: replay(state.graph, s).peak_bytes)
        self._num += 1
        linked = self._pool.relink(
            start,
            num_tries=self._fewer(num_tries),
            time_limit_s=min(RELINK_S, max(0.0, state.left_s)),
            seed=self.seed + 7919 * self._num,
            stop=state.stop,
        )
        state.offer(linked, f"path_relinking after {NAME}")
