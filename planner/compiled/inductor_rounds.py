"""Search for a partition whose compiled code stays within the budget.

The cost graph predicts fusion by rule. What a schedule counts on is then held
(:mod:`planner.compiled.held_fusion`), and the code that Inductor generates shows what it takes.
So a budget is brought to the solver in rounds. Between what every schedule needs and the memory
of the one that keeps everything lie evenly spaced *levels*, one fewer than two to the number of
rounds. To solve for a level is fast beside generating its code, so the first code that is read is
that of the highest level whose code is expected to fit (:mod:`planner.compiled.expected_peak`).
What it takes beside what was expected of it says which level is next: a lower one where it does
not fit, a higher one where it leaves more than 5 % of the budget and took less than expected. What
was solved and read is kept for other budgets (:mod:`planner.compiled.readings`).

The least memory of any schedule is searched for only where a budget comes near it, as that takes
seconds. Where the search ends at one of the lowest levels above it, others of these that are
cheaper are read, too: there the solver may find little more than the schedule of least memory,
which repeats nearly everything and whose code may take more than a higher level's. They are read
where they may fit by what the code that was read took of what was expected. Where nothing fits, all
of them are read. They do not depend on the budget, so what an error names as the least is found
again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from torch.fx import GraphModule

from solvers.arrays import graph_arrays
from solvers.least_memory import needs_bytes
from solvers.replay import replay
from solvers.result import SolveResult
from solvers.schedule import Schedule

from ..base.budget import Budget
from ..planning.known_least import fits_easily, known_least_memory
from .emit import emit_held
from .expected_peak import expected_memory
from .options import CompiledOptions
from .priced_step import PricedStep
from .readings import Reading, peak_of, result_of
from .repeated_calls import needed_at_turn, saved_bytes
from .solve_step import solve_step

WORTH_A_ROUND = 0.05
"""Share of the budget that must be unused for another round of a plan that recomputes."""

MAY_DIFFER = 0.015
"""By how much what a code takes of what is expected may differ from code to code, at least: what
was seen where codes take what is expected. Where they do not, it is how far off the last was."""

LEAST_EXPECTED = 0.75
"""The least share of a level's memory that is expected of any code: results of fused kernels that
take no memory of their own were seen to make it 0.88."""

LOWEST_LEVELS = 3
"""How many levels are all read where a search ends at one of them, or finds nothing."""


@dataclass(frozen=True, kw_only=True)
class _Found:
    """How far a search is: the highest level that fits, the fastest reading that does, and what
    the last code took of what was expected of it."""

    level: int = -1
    best: Reading | None = None
    share: float = 1.0

    def leaves_little(self, usable_bytes: int, base_cost_ns: int) -> bool:
        """Whether no higher level is worth another reading."""
        if self.best is None:
            return False
        unused_bytes = usable_bytes - self.best.needed_bytes
        return unused_bytes <= WORTH_A_ROUND * usable_bytes or self.best.cost_ns <= base_cost_ns


class Search:
    """Solves for levels of memory and reads what comes of them.

    Parameters
    ----------
    name
        Of the priced step, see :func:`~planner.compiled.readings.name_of`.
    lower
        Returns the peak of the code of forward and backward, resident tensors included.

    Attributes
    ----------
    solve_s
        Seconds of solving so far.
    """

    def __init__(
        self,
        priced: PricedStep,
        options: CompiledOptions,
        name: str,
        lower: Callable[[GraphModule, GraphModule], int],
    ) -> None:
        self._priced, self._lower = priced, lower
        solving = options.solving
        self._solving = replace(solving, time_limit_s=solving.time_limit_s / options.rounds)
        self._name = name
        self._rounds, self._num_levels = options.rounds, 2**options.rounds - 1
        self._base_cost_ns = priced.graph.base_cost_ns
        self._results: dict[int, SolveResult] = {}
        self._expected: dict[int, int] = {}  # bytes, by level
        self._bottom_bytes = int(needs_bytes(graph_arrays(priced.graph)).max())
        self._most_bytes = replay(priced.graph, Schedule.keep_all(priced.graph)).peak_bytes
        self.solve_s = 0.0
        self._needed: list[int] = []

    def within(self, usable_bytes: int) -> Reading | None:
        """The fastest plan found whose compiled code takes no more, or ``None``."""
        found = self._climb(usable_bytes, _Found())
        if found.best is not None and not self._is_low(found.level):
            return found.best
        for level in self._lowest_levels:
            if found.best is None or self._is_better(level, found, usable_bytes):
                found = self._read(level, usable_bytes, found)
        return None if found.best is None else self._climb(usable_bytes, found).best

    def _climb(self, usable_bytes: int, found: _Found) -> _Found:
        """Read the highest level that is expected to fit, and go by what its code takes."""
        too_high = self._num_levels
        for _ in range(self._rounds):
            if found.leaves_little(usable_bytes, self._base_cost_ns):
                break
            level = self._highest_expected(usable_bytes / found.share, found.level, too_high)
            if level == found.level:
                break
            found = self._read(level, usable_bytes, found)
            if found.level != level:
                too_high = level
        return found

    def _read(self, level: int, usable_bytes: int, found: _Found) -> _Found:
        """What is found once a level is read, too."""
        reading = self._at(level)
        found = replace(found, share=reading.needed_bytes / self._expected_bytes(level))
        if reading.needed_bytes > usable_bytes:
            return found
        best = reading if found.best is None else min(reading, found.best, key=_cost_ns)
        return replace(found, best=best, level=max(level, found.level))

    def _highest_expected(self, limit_bytes: float, above: int, below: int) -> int:
        """The highest level between two whose code is expected to fit; ``above`` for none."""
        while below - above > 1:
            level = (above + below) // 2
            target_bytes = self._target_bytes(level)
            if target_bytes * LEAST_EXPECTED > limit_bytes:
                below = level
            elif target_bytes <= limit_bytes or self._expected_bytes(level) <= limit_bytes:
                above = level
            else:
                below = level
        return above

    def _is_better(self, level: int, found: _Found, usable_bytes: int) -> bool:
        """Whether a level is faster than what was found, and may fit."""
        assert found.best is not None
        may_differ = max(MAY_DIFFER, abs(1 - found.share))
        if self._expected_bytes(level) * found.share > (1 + may_differ) * usable_bytes:
            return False
        return _cost_ns(self._solved(level)) < found.best.cost_ns

    def _is_low(self, level: int) -> bool:
        """Whether a level is one of the lowest; asks for the least memory only near it."""
        above = level - LOWEST_LEVELS
        if above >= 0 and fits_easily(self._priced.graph, self._target_bytes(above)):
            return False
        return level <= self._lowest_levels[-1]

    @cached_property
    def _lowest_levels(self) -> list[int]:
        """Some levels from the first one that is not below the least memory."""
        first = next(
            level
            for level in range(self._num_levels)
            if self._target_bytes(level) >= self._least_bytes or level == self._num_levels - 1
        )
        return list(range(max(0, first - 1), min(first + LOWEST_LEVELS, self._num_levels)))

    @property
    def _least_bytes(self) -> int:
        return known_least_memory(self._priced.graph, self._solving.seed).peak_bytes

    @property
    def lowest_bytes(self) -> int:
        """The least that a code needs which was read."""
        return min(self._needed)

    def _at(self, level: int) -> Reading:
        """Read the code of a level."""
        result = self._solved(level)
        schedule = result.schedule
        assert schedule is not None
        peak_bytes = peak_of(
            self._name, schedule, lambda: self._lower(*emit_held(self._priced, schedule))
        )
        at_turn_bytes = needed_at_turn(self._priced, saved_bytes(self._priced, schedule))
        needed_bytes = max(peak_bytes, at_turn_bytes)
        self._needed.append(needed_bytes)
        return Reading(result=result, peak_bytes=peak_bytes, needed_bytes=needed_bytes)

    def _expected_bytes(self, level: int) -> int:
        """What the code of a level is expected to take."""
        if level not in self._expected:
            schedule = self._solved(level).schedule
            assert schedule is not None
            self._expected[level] = expected_memory(self._priced, schedule).peak_bytes
        return self._expected[level]

    def _solved(self, level: int) -> SolveResult:
        """Solve for a level, from what is known to fit a lower one."""
        if level in self._results:
            return self._results[level]
        below = max((known for known in self._results if known < level), default=None)
        hint = None if below is None else self._results[below].schedule
        target_bytes = self._target_bytes(level)
        if hint is not None:  # which may take more than a level that lies below the least memory
            target_bytes = max(target_bytes, replay(self._priced.graph, hint).peak_bytes)
        elif not fits_easily(self._priced.graph, target_bytes):
            target_bytes = max(target_bytes, self._least_bytes)

        def make() -> SolveResult:
            target = Budget(total_bytes=target_bytes, headroom_bytes=0)
            result = solve_step(self._priced, target, self._solving, hint=hint)
            self.solve_s += result.solve_s
            return result

        result = self._results[level] = result_of(self._name, target_bytes, self._solving, make)
        return result

    def _target_bytes(self, level: int) -> int:
        """The memory of a level in the cost graph, which may be less than the least."""
        between_bytes = max(0, self._most_bytes - self._bottom_bytes)
        return self._bottom_bytes + level * between_bytes // max(1, self._num_levels - 1)


def _cost_ns(found: Reading | SolveResult) -> int:
    assert found.cost_ns is not None
    return found.cost_ns


__all__ = ["Search"]
