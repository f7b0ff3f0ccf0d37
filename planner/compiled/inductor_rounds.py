"""Choose what Inductor gets: a partition whose compiled code stays within the budget.

The cost graph predicts fusion by rule. What a schedule counts on is then held
(:mod:`planner.compiled.held_fusion`), and the code that Inductor generates shows what it takes.
So a budget is brought to the solver in rounds. Between what every schedule needs and the memory
of the one that keeps everything lie evenly spaced *levels*, one fewer than two to the number of
rounds. To solve for a level is fast beside generating its code, so the first code that is read is
that of the highest level whose code is expected to fit (:mod:`planner.compiled.expected_peak`).
What it takes beside what was expected of it says which level is next: a lower one where it does
not fit, a higher one where it leaves more than 5 % of the budget and took less than expected. What
was solved and read is kept for other budgets (:mod:`planner.compiled.readings`). PyTorch's own
partition is tried first, unless what forward hands to backward is too large already: where it
fits, nothing is to be solved.

The least memory of any schedule is searched for only where a budget comes near it, as that takes
seconds. Where the search ends at one of the lowest levels above it, others of these that are
cheaper are read, too: there the solver may find little more than the schedule of least memory,
which repeats nearly everything and whose code may take more than a higher level's. Where nothing
fits, all of them are read. They do not depend on the budget, so what an error names as the least
is found again.

Generated code is read on the CPU only. Elsewhere the plan goes by the rules of fusion, in one
round, and a warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.fx import GraphModule

from graph_capture.units import format_bytes
from graph_capture.without_collector import without_collector
from solvers.arrays import graph_arrays
from solvers.least_memory import needs_bytes
from solvers.replay import replay
from solvers.result import SolveResult
from solvers.schedule import Schedule

from ..base.budget import Budget
from ..errors import InfeasibleBudgetError, PlanWarning
from ..planning.known_least import fits_easily, known_least_memory
from .emit import emit
from .expected_peak import expected_peak_bytes
from .held_fusion import WithinMemory
from .lowered_peak import handed_over_bytes, lowered_extra_bytes
from .options import CompiledOptions
from .priced_step import PricedStep, unplanned_peak_bytes
from .readings import Reading, name_of, peak_of, result_of
from .solve_step import solve_step

WORTH_A_ROUND = 0.05
"""Share of the budget that must be unused for another round of a plan that recomputes."""

MAY_FIT = 1.05
"""Share of the budget up to which an expected peak is worth reading the code of a lowest level."""

LEAST_EXPECTED = 0.75
"""The least share of a level's memory that is expected of any code: results of fused kernels that
take no memory of their own were seen to make it 0.88."""

OWN_MAY_FIT = 0.7
"""Share of the memory of keeping everything from which on PyTorch's own partition may fit: it was
seen to take from 75 % on."""

LOWEST_LEVELS = 3
"""How many levels are all read where a search ends at one of them, or finds nothing."""


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A partition, and what Inductor makes of it, or is expected to.

    Parameters
    ----------
    forward, backward
        The two graphs.
    peak_bytes
        Of the compiled step, resident tensors included.
    is_read
        Whether the peak is that of the generated code.
    schedule
        Of the priced step; ``None`` for PyTorch's own partition.
    result
        Of the solver; ``None`` likewise.
    solve_s
        Seconds of solving, of all rounds.
    """

    forward: GraphModule
    backward: GraphModule
    peak_bytes: int
    is_read: bool = True
    schedule: Schedule | None = None
    result: SolveResult | None = None
    solve_s: float = 0.0


@without_collector()  # Inductor makes many objects, and few of them are cycles
def choose(
    priced: PricedStep,
    budget: Budget,
    options: CompiledOptions,
    own: Callable[[], tuple[GraphModule, GraphModule]],
) -> tuple[Lowered, int]:
    """Return the chosen partition, and the peak without a budget.

    Parameters
    ----------
    own
        Makes PyTorch's partition of the same graph.

    Raises
    ------
    InfeasibleBudgetError
        When no partition that was found stays within the budget.
    """
    if not can_be_read(priced.device):
        warnings.warn(BY_RULE, PlanWarning, stacklevel=2)
        return _by_rule(priced, budget, options, own)
    resident_bytes, num_outputs = priced.graph.resident_bytes, len(priced.step.outputs)

    def lower(forward: GraphModule, backward: GraphModule) -> int:
        return resident_bytes + lowered_extra_bytes(forward, backward, num_outputs)

    usable_bytes, name = budget.usable_bytes, name_of(priced)
    unplanned_bytes = unplanned_peak_bytes(priced)

    def read_own(forward: GraphModule, backward: GraphModule) -> Lowered:
        peak_bytes = peak_of(name, None, lambda: lower(forward, backward))
        return Lowered(forward=forward, backward=backward, peak_bytes=peak_bytes)

    theirs: Lowered | None = None
    if usable_bytes >= OWN_MAY_FIT * unplanned_bytes:
        graphs = own()
        if resident_bytes + handed_over_bytes(graphs[0]) <= usable_bytes:
            theirs = read_own(*graphs)
    if theirs is not None and theirs.peak_bytes <= usable_bytes:
        return theirs, theirs.peak_bytes
    search = _Search(priced, options, name, lower)
    best = search.within(usable_bytes)
    if best is None:
        theirs = theirs or read_own(*own())
        if theirs.peak_bytes <= usable_bytes:
            return theirs, theirs.peak_bytes
        raise _nothing_fits(budget, min(theirs.peak_bytes, search.lowest_bytes))
    return search.lowered(best), unplanned_bytes if theirs is None else theirs.peak_bytes


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
        unused_bytes = usable_bytes - self.best.peak_bytes
        return unused_bytes <= WORTH_A_ROUND * usable_bytes or self.best.cost_ns <= base_cost_ns


class _Search:
    """Solves for levels of memory and reads what comes of them."""

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
        self._solve_s = 0.0
        self._peaks: list[int] = []

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
        found = replace(found, share=reading.peak_bytes / self._expected_bytes(level))
        if reading.peak_bytes > usable_bytes:
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
        if self._expected_bytes(level) * found.share > MAY_FIT * usable_bytes:
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
        """The lowest peak that was read."""
        return min(self._peaks)

    def lowered(self, reading: Reading) -> Lowered:
        """The partition of a reading."""
        forward, backward = self._emit(reading.result)
        return Lowered(
            forward=forward,
            backward=backward,
            peak_bytes=reading.peak_bytes,
            schedule=reading.result.schedule,
            result=reading.result,
            solve_s=self._solve_s,
        )

    def _at(self, level: int) -> Reading:
        """Read the code of a level."""
        result = self._solved(level)
        peak_bytes = peak_of(self._name, result.schedule, lambda: self._lower(*self._emit(result)))
        self._peaks.append(peak_bytes)
        return Reading(result=result, peak_bytes=peak_bytes)

    def _expected_bytes(self, level: int) -> int:
        """What the code of a level is expected to take."""
        if level not in self._expected:
            schedule = self._solved(level).schedule
            assert schedule is not None
            self._expected[level] = expected_peak_bytes(self._priced, schedule)
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
            self._solve_s += result.solve_s
            return result

        result = self._results[level] = result_of(self._name, target_bytes, self._solving, make)
        return result

    def _target_bytes(self, level: int) -> int:
        """The memory of a level in the cost graph, which may be less than the least."""
        between_bytes = max(0, self._most_bytes - self._bottom_bytes)
        return self._bottom_bytes + level * between_bytes // max(1, self._num_levels - 1)

    def _emit(self, result: SolveResult) -> tuple[GraphModule, GraphModule]:
        assert result.schedule is not None
        replayed = replay(self._priced.graph, result.schedule)
        rules = WithinMemory(memory_bytes=replayed.memory_bytes, limit_bytes=replayed.peak_bytes)
        return emit(self._priced, result.schedule, rules)


BY_RULE = (
    "the code that Inductor generates is read back on the CPU only: on this device the plan's peak "
    "comes from kernels fused by rule and may be off; measure a step, and leave headroom="
)


def can_be_read(device: torch.device) -> bool:
    """Whether generated code can be run without its kernels, which shows its peak."""
    return device.type == "cpu"


def _by_rule(
    priced: PricedStep,
    budget: Budget,
    options: CompiledOptions,
    own: Callable[[], tuple[GraphModule, GraphModule]],
) -> tuple[Lowered, int]:
    """One solve, whose peak is the cost graph's."""
    everything_bytes = unplanned_peak_bytes(priced)
    if everything_bytes <= budget.usable_bytes:
        forward, backward = own()
        theirs = Lowered(
            forward=forward, backward=backward, peak_bytes=everything_bytes, is_read=False
        )
        return theirs, everything_bytes
    result = solve_step(priced, budget, options.solving)
    assert result.schedule is not None
    forward, backward = emit(priced, result.schedule)
    found = Lowered(
        forward=forward,
        backward=backward,
        peak_bytes=replay(priced.graph, result.schedule).peak_bytes,
        is_read=False,
        schedule=result.schedule,
        result=result,
        solve_s=result.solve_s,
    )
    return found, everything_bytes


def _cost_ns(found: Reading | SolveResult) -> int:
    assert found.cost_ns is not None
    return found.cost_ns


def _nothing_fits(budget: Budget, lowest_bytes: int) -> InfeasibleBudgetError:
    min_budget_bytes = budget.total_for(lowest_bytes)
    return InfeasibleBudgetError(
        f"No partition that was found stays within {format_bytes(budget.total_bytes)} "
        f"({budget.total_bytes} bytes) once Inductor has compiled it. The least budget known to "
        f"work is {format_bytes(min_budget_bytes)} (budget_bytes={min_budget_bytes}); whether a "
        "lower one exists is not proven. A smaller batch or a shorter sequence lowers it.",
        budget_bytes=budget.total_bytes,
        min_budget_bytes=min_budget_bytes,
        lower_bound_bytes=0,
    )


__all__ = ["Lowered", "choose"]
