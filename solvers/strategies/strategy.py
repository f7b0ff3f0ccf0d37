"""Define strategies, and take the best of a strategy's schedules within a budget.

A *strategy* looks only at a cost graph and proposes schedules: one, or one for each
value of its parameter. :func:`apply_strategy` replays every proposal by the one judge
(``solvers/replay.py``), so a strategy can claim nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from graph_capture.cost_graph import CostGraph

from ..checked import check_time_limit, checked_budget
from ..replay import replay
from ..schedule import Schedule


class StrategyFailure(StrEnum):
    """Why a strategy came to no schedule."""

    NOT_APPLICABLE = "not_applicable"  # not to this graph, or not without a budget
    PROVEN_INFEASIBLE = "proven_infeasible"
    NOTHING_FOUND = "nothing_found"  # in time, and nothing proven
    OUT_OF_MEMORY = "out_of_memory"  # what it would do does not fit


class StrategyError(ValueError):
    """A strategy cannot be applied to a graph; the message says why, ``failure`` what kind."""

    def __init__(
        self, message: str, failure: StrategyFailure = StrategyFailure.NOT_APPLICABLE
    ) -> None:
        super().__init__(message)
        self.failure = failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One schedule that a strategy proposes.

    Parameters
    ----------
    schedule
        First runs in base order.
    setting
        The strategy's parameters, as people write them: ``"k=3"``.
    note
        What else is known, e.g. that it is proven optimal.
    """

    schedule: Schedule
    setting: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyOptions:
    """What a strategy may know besides the graph.

    Parameters
    ----------
    budget_bytes
        Peak that must not be exceeded; ``None`` for no budget.
    time_limit_s
        For strategies that solve.
    seed, workers
        As in :func:`solvers.solve`.
    """

    budget_bytes: int | None = None
    time_limit_s: float = 60.0
    seed: int = 0
    workers: int = 2


Propose = Callable[[CostGraph, StrategyOptions], Iterable[Candidate]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """A rematerialization strategy by name.

    Parameters
    ----------
    name
        Key in a registry.
    summary
        What it saves and what it recomputes, in one line.
    source
        Paper and section, or the function that users know it by.
    propose
        Gives candidates; the first one is the source's own choice where there
        is no budget. Raises :class:`StrategyError` where the strategy does not
        apply.
    needs_budget
        Whether it requires a budget.
    """

    name: str
    summary: str
    source: str
    propose: Propose
    needs_budget: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyOutcome:
    """The result of a strategy on a graph, from the replay.

    Parameters
    ----------
    strategy, setting, note
        Name, parameters and remarks of what was taken.
    schedule, peak_bytes, cost_ns
        Of what was taken.
    fits
        Whether the peak is within the budget; true where there is none. When
        nothing fits, what was taken is the candidate with the lowest peak.
    num_candidates
        How many were replayed.
    solve_s
        Wall clock of proposing and replaying.
    """

    strategy: str
    setting: str
    note: str
    schedule: Schedule
    peak_bytes: int
    cost_ns: int
    fits: bool
    num_candidates: int
    solve_s: float


def apply_strategy(
    strategy: Strategy,
    graph: CostGraph,
    *,
    budget_bytes: int | None = None,
    time_limit_s: float = 60.0,
    seed: int = 0,
    workers: int = 2,
) -> StrategyOutcome:
    """Return the cheapest of a strategy's candidates within the budget.

    Without a budget its first candidate is taken. Of equal costs the lower peak
    wins, then the earlier candidate.

    Raises
    ------
    StrategyError
        When the strategy does not apply to the graph, or needs a budget and
        there is none.
    ValueError
        When the budget is negative.
    InvalidScheduleError
        When it proposes a schedule that does not compute the step.

    Examples
    --------
    >>> from graph_capture.cost_graph import CostGraph, Operator, Storage
    >>> from solvers.strategies import STRATEGIES
    >>> one = CostGraph(
    ...     (Operator(name="a", outputs=(0,), cost_ns=5),),
    ...     (Storage(name="x", size_bytes=9, producer=0),),
    ... )
    >>> outcome = apply_strategy(STRATEGIES["none"], one, budget_bytes=8)
    >>> outcome.cost_ns, outcome.peak_bytes, outcome.fits
    (5, 9, False)
    """
    budget_bytes = None if budget_bytes is None else checked_budget(budget_bytes)
    check_time_limit(time_limit_s)
    if budget_bytes is None and strategy.needs_budget:
        raise StrategyError(f"{strategy.name} needs a budget; give budget_bytes")
    options = StrategyOptions(
        budget_bytes=budget_bytes, time_limit_s=time_limit_s, seed=seed, workers=workers
    )
    begin_s = time.monotonic()
    best: tuple[tuple[int, int], Candidate, int, int] | None = None
    num_candidates = 0
    for candidate in strategy.propose(graph, options):
        outcome = replay(graph, candidate.schedule)
        num_candidates += 1
        fits = budget_bytes is None or outcome.peak_bytes <= budget_bytes
        rank = (0, outcome.cost_ns) if fits else (1, outcome.peak_bytes)
        better = best is None or (*rank, outcome.peak_bytes) < (*best[0], best[2])
        if better:
            best = (rank, candidate, outcome.peak_bytes, outcome.cost_ns)
        if budget_bytes is None:
            break
    if best is None:
        raise StrategyError(f"{strategy.name} proposed no schedule")
    (misses, _), chosen, peak_bytes, cost_ns = best
    return StrategyOutcome(
        strategy=strategy.name,
        setting=chosen.setting,
        note=chosen.note,
        schedule=chosen.schedule,
        peak_bytes=peak_bytes,
        cost_ns=cost_ns,
        fits=not misses,
        num_candidates=num_candidates,
        solve_s=time.monotonic() - begin_s,
    )
