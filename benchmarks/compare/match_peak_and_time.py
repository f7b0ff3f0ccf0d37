"""Compare ours with a strategy where it is at its best: at its own peak, and at its own cost.

Two questions about a strategy that takes no budget (per-block checkpointing,
uniform sqrt(L)):

1. With its memory, what does our plan cost in comparison?
2. With its time, how little memory does our plan need?

The second is a bisection over budgets, with one solve each. If an answer falls short of
the goal, the bounds of the same solves say whether any schedule could do better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from graph_capture.cost_graph import CostGraph
from solvers.least_memory import LeastMemory
from solvers.result import SolveResult, SolveStatus
from solvers.strategies.registry import STRATEGIES
from solvers.strategies.strategy import StrategyError, StrategyOutcome, apply_strategy

from .signs import rounded_down

RIVALS = ("uniform_sqrt", "transformers_per_layer")
WANTED_OVERHEAD = 0.5
"""Goal: our share of the rival's overhead, at its peak."""

WANTED_PEAK = 0.7
"""Goal: our share of the rival's peak, at its overhead."""

NUM_SOLVES = 6
Solved = Callable[[int], SolveResult]


class Wanted(StrEnum):
    """Whether ours reaches the goal against a strategy, or why not."""

    MET = "met"
    IMPOSSIBLE = "impossible"  # proven, for every schedule in eager's order
    OPEN = "open"  # neither found nor excluded
    NOTHING_FOUND = "nothing_found"  # of ours that is as good as the strategy
    NOTHING_RECOMPUTED = "nothing_recomputed"  # by the strategy
    NO_OVERHEAD = "no_overhead"  # of the strategy, that could be halved


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchedRow:
    """Ours beside one strategy.

    Parameters
    ----------
    strategy, setting
        The other strategy, at its own choice.
    error
        Why it does not apply; then all figures are zero or ``None``.
    recomputes
        Whether the other strategy recomputes anything.
    peak_bytes, overhead
        Of the other strategy. Overheads are relative to the schedule that recomputes
        nothing (``none``), not to the unplanned step; both are of the same graph.
    our_overhead, bound_overhead
        Our overhead at its peak, and the lower bound there for schedules whose first
        runs keep eager's order; ``None`` if we found nothing.
    overhead_ratio
        Our overhead over its; ``None`` if it has none, or we found nothing.
    our_peak_bytes, bound_peak_bytes
        The least peak of a plan of ours that costs no more than it does, and the highest
        budget within which it is proven that every schedule in eager's order costs more.
    peak_ratio
        Our peak over its.
    least_bound_bytes
        No schedule in eager's order needs less, at any cost.
    """

    strategy: str
    setting: str = ""
    error: str = ""
    recomputes: bool = False
    peak_bytes: int = 0
    overhead: float = 0.0
    our_overhead: float | None = None
    bound_overhead: float | None = None
    overhead_ratio: float | None = None
    our_peak_bytes: int | None = None
    bound_peak_bytes: int | None = None
    peak_ratio: float | None = None
    least_bound_bytes: int = 0

    @property
    def half_overhead(self) -> Wanted:
        """Whether ours has :data:`WANTED_OVERHEAD` of its overhead at its peak."""
        if not self.recomputes:
            return Wanted.NOTHING_RECOMPUTED
        if self.our_overhead is None:
            return Wanted.NOTHING_FOUND
        if self.overhead <= 0:
            return Wanted.NO_OVERHEAD
        if self.our_overhead / self.overhead <= WANTED_OVERHEAD:
            return Wanted.MET
        impossible = self._bound_overhead_ratio > WANTED_OVERHEAD
        return Wanted.IMPOSSIBLE if impossible else Wanted.OPEN

    @property
    def low_peak(self) -> Wanted:
        """Whether ours needs :data:`WANTED_PEAK` of its peak in its time."""
        if not self.recomputes:
            return Wanted.NOTHING_RECOMPUTED
        if self.peak_ratio is None:
            return Wanted.NOTHING_FOUND
        if self.peak_ratio <= WANTED_PEAK:
            return Wanted.MET
        impossible = self._nothing_as_low or self._excluded_bytes >= self._wanted_bytes
        return Wanted.IMPOSSIBLE if impossible else Wanted.OPEN

    @property
    def half_overhead_words(self) -> str:
        """:attr:`half_overhead` in words, with figures."""
        ratio = rounded_down(self._bound_overhead_ratio, 3) if self.overhead > 0 else ""
        return {
            Wanted.IMPOSSIBLE: f"{_IMPOSSIBLE}: nothing within its peak is below {ratio} of it",
            Wanted.OPEN: f"open: the bound is {ratio} of it",
            Wanted.NOTHING_FOUND: "nothing found within its peak",
        }.get(self.half_overhead) or _WORDS[self.half_overhead]

    @property
    def low_peak_words(self) -> str:
        """:attr:`low_peak` in words, with figures."""
        bound = self.least_bound_bytes if self._nothing_as_low else self._excluded_bytes
        share = rounded_down(bound / self.peak_bytes, 3) if self.peak_bytes else ""
        why = (
            f"every schedule needs {share} of it"
            if self._nothing_as_low
            else f"within {share} of it everything costs more"
        )
        return {
            Wanted.IMPOSSIBLE: f"{_IMPOSSIBLE}: {why}",
            Wanted.OPEN: f"open: nothing found, and excluded only up to {share} of it",
            Wanted.NOTHING_FOUND: "nothing found that costs no more",
        }.get(self.low_peak) or _WORDS[self.low_peak]

    @property
    def _bound_overhead_ratio(self) -> float:
        assert self.bound_overhead is not None
        return self.bound_overhead / self.overhead

    @property
    def _wanted_bytes(self) -> int:
        return int(WANTED_PEAK * self.peak_bytes)

    @property
    def _excluded_bytes(self) -> int:
        assert self.bound_peak_bytes is not None
        return self.bound_peak_bytes

    @property
    def _nothing_as_low(self) -> bool:
        return self.least_bound_bytes > self._wanted_bytes


_IMPOSSIBLE = "proven impossible in eager's order"
_WORDS = {
    Wanted.MET: "met",
    Wanted.NOTHING_RECOMPUTED: "it recomputes nothing here",
    Wanted.NO_OVERHEAD: "it has no overhead here that could be halved",
}


def match_peak_and_time(
    graph: CostGraph,
    strategy: str,
    *,
    least: LeastMemory,
    solved: Solved,
) -> MatchedRow:
    """Answer both questions about one strategy.

    Parameters
    ----------
    least
        The least memory of the graph.
    solved
        Solves ours within a budget.
    """
    try:
        rival = apply_strategy(STRATEGIES[strategy], graph)
    except StrategyError as error:
        return MatchedRow(strategy=strategy, error=str(error))
    baseline_ns = graph.base_cost_ns
    at_peak = solved(rival.peak_bytes)
    overhead = rival.cost_ns / baseline_ns - 1
    ours = None if at_peak.cost_ns is None else at_peak.cost_ns / baseline_ns - 1
    bound = at_peak.global_bound_ns / baseline_ns - 1
    recomputes = bool(rival.schedule.recomputed())
    ratio = ours / overhead if recomputes and ours is not None and overhead > 0 else None
    peak, proven = _least_peak(rival, at_peak, least, solved)
    return MatchedRow(
        strategy=strategy,
        setting=rival.setting,
        recomputes=recomputes,
        peak_bytes=rival.peak_bytes,
        overhead=overhead,
        our_overhead=ours,
        bound_overhead=bound,
        overhead_ratio=ratio,
        our_peak_bytes=peak,
        bound_peak_bytes=proven,
        peak_ratio=None if peak is None else peak / rival.peak_bytes,
        least_bound_bytes=least.lower_bound_bytes,
    )


def _least_peak(
    rival: StrategyOutcome, at_peak: SolveResult, least: LeastMemory, solved: Solved
) -> tuple[int | None, int]:
    """The least peak that costs no more than the rival, and the highest budget proven too small.

    The first budget tried is the goal, so that its answer is known in any case; then the
    remaining range is halved.
    """
    proven = least.lower_bound_bytes - 1
    if at_peak.cost_ns is None or at_peak.cost_ns > rival.cost_ns:
        return None, proven
    assert at_peak.peak_bytes is not None
    low, high = proven, at_peak.peak_bytes
    budget = int(WANTED_PEAK * rival.peak_bytes)
    for _ in range(NUM_SOLVES):
        if not low < budget < high:
            budget = (low + high) // 2
        if budget <= low:
            break
        result = solved(budget)
        if result.cost_ns is not None and result.cost_ns <= rival.cost_ns:
            assert result.peak_bytes is not None
            high = result.peak_bytes
        else:
            low = budget
            nothing_fits = result.status is SolveStatus.INFEASIBLE and result.schedule is None
            if nothing_fits or result.global_bound_ns > rival.cost_ns:
                proven = max(proven, budget)
        budget = (low + high) // 2
    return high, proven
