"""Run a strategy only once if it proposes the same at every budget."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from graph_capture.cost_graph import CostGraph
from solvers.strategies.strategy import Candidate, Strategy, StrategyOptions, StrategyOutcome


class CachedStrategy:
    """Keeps a strategy's candidates, and the time it took to propose them.

    Parameters
    ----------
    strategy
        A strategy whose candidates do not depend on the budget.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = replace(strategy, propose=self._propose)
        self._original = strategy
        self._found: list[Candidate] = []
        self._took_s: list[float] = []
        self._running: Iterator[Candidate] | None = None
        self._fresh_s = 0.0

    def with_full_time(self, outcome: StrategyOutcome) -> StrategyOutcome:
        """Return the last call's outcome, with the time that it would have taken alone."""
        alone_s = sum(self._took_s[: outcome.num_candidates])
        return replace(outcome, solve_s=outcome.solve_s + max(0.0, alone_s - self._fresh_s))

    def _propose(self, graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
        self._fresh_s = 0.0
        place = 0
        while place < len(self._found) or self._fetch(graph, options):
            yield self._found[place]
            place += 1

    def _fetch(self, graph: CostGraph, options: StrategyOptions) -> bool:
        """Fetch one more candidate, if there is one."""
        begin_s = time.monotonic()
        if self._running is None:
            self._running = iter(self._original.propose(graph, options))
        try:
            candidate = next(self._running)
        except StopIteration:
            return False
        except Exception:
            # An iterator that has raised would seem to have ended on the next call.
            self._running = None
            self._found.clear()
            self._took_s.clear()
            raise
        self._found.append(candidate)
        self._took_s.append(time.monotonic() - begin_s)
        self._fresh_s += self._took_s[-1]
        return True
