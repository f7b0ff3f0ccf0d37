"""Ours against a strategy where that strategy is at its best: at its own peak, and at its own cost.

Two questions about a strategy that takes no budget (per-block checkpointing,
uniform sqrt(L)):

1. With the memory that it takes, what does our plan cost beside it?
2. For the time that it takes, how little memory does our plan need?

The second is a bisection over budgets, each a solve. Where an answer falls short
of what is wanted, the bounds of the same solves say whether any schedule could do
better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graph_capture.cost_graph import CostGraph
from solvers.least_memory import LeastMemory
from solvers.result import SolveResult, SolveStatus
from solvers.strategies.registry import STRATEGIES
from solvers.strategies.strategy import StrategyError, StrategyOutcome, apply_strategy

from .signs import rounded_down

RIVALS = ("uniform_sqrt", "transformers_per_layer")
WANTED_OVERHEAD = 0.5
"""Share of the rival's overhead, at its peak."""

WANTED_PEAK = 0.7
"""Share of the rival's peak, at its overhead."""

NUM_SOLVES = 6
IMPOSSIBLE = "proven impossible in eager's order"
NOTHING_RECOMPUTED = "it recomputes nothing here"
NO_OVERHEAD = "it has no overhead here that could be halved"

Solved = Callable[[int], SolveResult]


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchedRow:
    """Ours beside one strategy.

    Parameters
    ----------
    strategy, setting
        The other one, at its own choice.
    error
        Why it does not apply; then all figures are zero or ``None``.
    peak_bytes, overhead
        Of the other one. Overheads are over the schedule that recomputes nothing
        (``none``), not over the unplanned step: both of the same graph.
    our_overhead, bound_overhead
        At its peak, and what nothing there is below whose first runs keep eager's order;
        ``None`` where we found nothing.
    overhead_ratio
        Ours over its; ``None`` where it has none, or we found nothing.
    our_peak_bytes, bound_peak_bytes
        The least peak of ours that costs no more than it does, and the highest
        budget of which it is proven that nothing within it costs no more, in eager's order.
    peak_ratio
        Ours over its.
    overhead_verdict, peak_verdict
        ``"met"``, or why it is not.
    """

    strategy: str
    setting: str = ""
    error: str = ""
    peak_bytes: int = 0
    overhead: float = 0.0
    our_overhead: float | None = None
    bound_overhead: float | None = None
    overhead_ratio: float | None = None
    our_peak_bytes: int | None = None
    bound_peak_bytes: int | None = None
    peak_ratio: float | None = None
    overhead_verdict: str = ""
    peak_verdict: str = ""


def match_peak_and_time(
    graph: CostGraph,
    strategy: str,
    *,
    least: LeastMemory,
    solved: Solved,
) -> MatchedRow:
    """Both questions about one strategy.

    Parameters
    ----------
    least
        Of the graph.
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
    peak_ratio = None if peak is None else peak / rival.peak_bytes
    return MatchedRow(
        strategy=strategy,
        setting=rival.setting,
        peak_bytes=rival.peak_bytes,
        overhead=overhead,
        our_overhead=ours,
        bound_overhead=bound,
        overhead_ratio=ratio,
        our_peak_bytes=peak,
        bound_peak_bytes=proven,
        peak_ratio=peak_ratio,
        overhead_verdict=_overhead_verdict(ours, bound, overhead, recomputes),
        peak_verdict=_peak_verdict(peak_ratio, proven, rival.peak_bytes, least)
        if recomputes
        else NOTHING_RECOMPUTED,
    )


def _least_peak(
    rival: StrategyOutcome, at_peak: SolveResult, least: LeastMemory, solved: Solved
) -> tuple[int | None, int]:
    """The least peak that costs no more than the rival, and up to where it is proven that none is.

    The first budget that is tried is the wanted one, so that its answer is sure
    to be known; then the rest is halved.
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


def _overhead_verdict(ours: float | None, bound: float, overhead: float, recomputes: bool) -> str:
    if not recomputes:
        return NOTHING_RECOMPUTED
    if ours is None:
        return "nothing found within its peak"
    if overhead <= 0:
        return NO_OVERHEAD
    if ours / overhead <= WANTED_OVERHEAD:
        return "met"
    least_ratio = bound / overhead
    if least_ratio > WANTED_OVERHEAD:
        return (
            f"{IMPOSSIBLE}: nothing within its peak is below {rounded_down(least_ratio, 3)} of it"
        )
    return f"open: the bound is {rounded_down(least_ratio, 3)} of it"


def _peak_verdict(
    ratio: float | None, proven_bytes: int, peak_bytes: int, least: LeastMemory
) -> str:
    if ratio is None:
        return "nothing found that costs no more"
    if ratio <= WANTED_PEAK:
        return "met"
    wanted_bytes = int(WANTED_PEAK * peak_bytes)
    if least.lower_bound_bytes > wanted_bytes:
        share = least.lower_bound_bytes / peak_bytes
        return f"{IMPOSSIBLE}: every schedule needs {rounded_down(share, 3)} of it"
    if proven_bytes >= wanted_bytes:
        share = proven_bytes / peak_bytes
        return f"{IMPOSSIBLE}: within {rounded_down(share, 3)} of it everything costs more"
    share = proven_bytes / peak_bytes
    return f"open: nothing found, and excluded only up to {rounded_down(share, 3)} of it"
