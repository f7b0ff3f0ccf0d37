"""Schedules of the field's simple strategies, as first incumbents.

Uniform segments, Chen's and Checkmate's greedy plans, revolve, Megatron's and the
selective policies take milliseconds each and solve nothing; DTR takes about as long as
a hundred of them. What one of them finds within the budget is a schedule like any
other: slice refinement and annealing start from it, and the result is never worse. This
is the only reason why no strategy of the field beats ours where the time limit ends a
solve (on a U-Net of three levels within 1 s, DTR was up to three points better, and
found schedules at 43 % of the memory where annealing found none).

There are two portions. Schedules without a parameter and DTR give annealing a start.
The families have one schedule for each value of a parameter; they are many, and help
where all else has failed. Their effort is counted in runs written down, not in seconds:
on graphs of some thousand operators it ends before all values are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from graph_capture.cost_graph import CostGraph

from .arrays import graph_arrays
from .fast_replay import fast_replay
from .schedule import Schedule
from .strategies.articulation import (
    AP_GREEDY,
    AP_SQRT,
    LINEARIZED_GREEDY,
    LINEARIZED_SQRT,
)
from .strategies.attention import MEGATRON_SELECTIVE
from .strategies.chen import CHEN_GREEDY
from .strategies.dtr import dtr
from .strategies.nested import (
    CHEN_RECURSIVE,
    REVOLVE,
)
from .strategies.policies import (
    SAVE_MATMULS_PER_BLOCK,
    SAVE_ONLY_MATMULS,
)
from .strategies.strategy import (
    Strategy,
    StrategyError,
    StrategyOptions,
)
from .strategies.uniform_segments import (
    MEGATRON_FULL_BLOCK,
    MEGATRON_FULL_UNIFORM,
    TRANSFORMERS_EVERY_N,
    TRANSFORMERS_PER_LAYER,
    UNIFORM_EVERY_K,
    UNIFORM_SQRT,
)

GiveUp = Callable[[], bool]

SINGLE: tuple[Strategy, ...] = (
    TRANSFORMERS_PER_LAYER,
    UNIFORM_SQRT,
    SAVE_ONLY_MATMULS,
    SAVE_MATMULS_PER_BLOCK,
    MEGATRON_SELECTIVE,
    LINEARIZED_SQRT,
)
"""One schedule each."""

FAMILIES: tuple[Strategy, ...] = (
    UNIFORM_EVERY_K,
    TRANSFORMERS_EVERY_N,
    CHEN_GREEDY,
    MEGATRON_FULL_BLOCK,
    MEGATRON_FULL_UNIFORM,
    REVOLVE,
    CHEN_RECURSIVE,
    LINEARIZED_GREEDY,
    AP_SQRT,
    AP_GREEDY,
)
"""A schedule for each value of a parameter; those with most values or preparation come last."""

EFFORT_RUNS = 300_000
"""Of the families: runs written down that take some two seconds of Python.

All values fit in on graphs of up to some 500 operators.
"""

EARLY_DTR_OPERATORS = 1_500
"""Up to which DTR, which looks at everything that it could evict, takes some tenths of a second."""

LATE_DTR_OPERATORS = 3_000
"""Up to which it is worth its time after the families."""

Found = tuple[Schedule, str]
"""A schedule that fits, and the strategy that it is of."""


class BaselineSchedules:
    """Yield the strategies' schedules within a budget, each cheaper than those before.

    Both portions end early once ``give_up``, which is polled, returns true. When called
    again, they resume where they ended.
    """

    def __init__(self, graph: CostGraph, budget_bytes: int) -> None:
        self.graph, self.budget_bytes = graph, budget_bytes
        self._arrays = graph_arrays(graph)
        self._singles, self._families = self._proposed(SINGLE), self._proposed(FAMILIES)
        self._spent_runs = 0
        self._best_ns: int | None = None
        self._dtr_ended = False

    def singles(self, give_up: GiveUp) -> Iterator[Found]:
        """Strategies without a parameter, and DTR where that is quick."""
        while not give_up():
            proposal = next(self._singles, None)
            if proposal is None:
                break
            if self._is_best(proposal[0]):
                yield proposal
        if self.graph.num_operators <= EARLY_DTR_OPERATORS:
            yield from self._by_dtr(give_up)

    def families(self, give_up: GiveUp, effort_runs: int = EFFORT_RUNS) -> Iterator[Found]:
        """The rest of the first portion, then all values of the parameters, then DTR.

        Ends when the effort is spent, too.
        """
        yield from self.singles(give_up)
        allowed_runs = self._spent_runs + effort_runs
        while not give_up():
            if self._spent_runs >= allowed_runs:
                return
            proposal = next(self._families, None)
            if proposal is None:
                break
            if self._is_best(proposal[0]):
                yield proposal
        if self.graph.num_operators <= LATE_DTR_OPERATORS:
            yield from self._by_dtr(give_up)

    def _is_best(self, schedule: Schedule) -> bool:
        outcome = fast_replay(self._arrays, np.array(schedule.order, dtype=np.int64))
        if not outcome.valid or outcome.peak_bytes > self.budget_bytes:
            return False
        if self._best_ns is not None and outcome.cost_ns >= self._best_ns:
            return False
        self._best_ns = outcome.cost_ns
        return True

    def _proposed(self, strategies: tuple[Strategy, ...]) -> Iterator[Found]:
        options = StrategyOptions(budget_bytes=self.budget_bytes)
        for strategy in strategies:
            try:
                for candidate in strategy.propose(self.graph, options):
                    self._spent_runs += len(candidate.schedule.order)
                    yield candidate.schedule, strategy.name
            except StrategyError:
                # It does not apply to this graph (no blocks, no attention).
                self._spent_runs += self.graph.num_operators

    def _by_dtr(self, give_up: GiveUp) -> Iterator[Found]:
        """Run DTR unless it has already finished. A run that is cut starts over next time."""
        if self._dtr_ended or give_up():
            return
        was_cut = False

        def cut() -> bool:
            nonlocal was_cut
            was_cut = was_cut or give_up()
            return was_cut

        try:
            schedule = dtr(self.graph, self.budget_bytes, give_up=cut)
        except StrategyError:
            self._dtr_ended = not was_cut  # otherwise it ran out of time, not of memory
            return
        self._dtr_ended = True
        if self._is_best(schedule):
            yield schedule, "dtr"
