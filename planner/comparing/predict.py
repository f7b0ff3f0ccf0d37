"""Predict every strategy at every budget by replay, and prove lower bounds."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace

from graph_capture.cost_graph import CostGraph
from graph_capture.units import format_bytes
from solvers.any_order.permutation import first_runs
from solvers.least_memory import LeastMemory
from solvers.portfolio import solve
from solvers.result import SolveResult, SolveStatus
from solvers.schedule import Schedule
from solvers.scopes import BoundScope
from solvers.strategies.solved import AUTO, status_in_words
from solvers.strategies.strategy import Strategy, StrategyError, StrategyOutcome, apply_strategy

from ..base.solve_options import SolveOptions
from ..comparison_record import BudgetBound, ComparisonRow, RowOutcome
from ..planning.known_least import fits_easily
from .bound_text import (
    EAGERS_ORDER,
    bytes_rounded_down,
)
from .budgets import NamedBudget
from .cached_strategy import CachedStrategy
from .execution.runner import LONGEST_ERROR

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _NoSchedule:
    """Why a strategy has no schedule: as a code, and in words."""

    outcome: RowOutcome
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """A row and its schedule; ``None`` where the strategy failed."""

    row: ComparisonRow
    schedule: Schedule | None = None


class Predictor:
    """Applies strategies to one graph; each budget is solved once.

    Parameters
    ----------
    graph
        The captured step.
    baseline_step_us
        Time of the step that recomputes nothing.
    least
        The least memory of the graph.
    once
        Names of strategies that are slow and propose the same at every budget: they
        run only once.
    """

    def __init__(
        self,
        graph: CostGraph,
        baseline_step_us: float,
        least: LeastMemory,
        solving: SolveOptions,
        once: Container[str] = (),
    ) -> None:
        self.graph = graph
        self.baseline_step_us = baseline_step_us
        self.least = least
        self.solving = solving
        self._once = once
        self._cached: dict[str, CachedStrategy] = {}
        self._solved: dict[int, SolveResult] = {}
        self._bounds: dict[int, int | None] = {}
        self._outcomes: dict[tuple[str, int | None], StrategyOutcome | _NoSchedule] = {}

    # -- bounds ----------------------------------------------------------------------

    def bound_of(self, budget: NamedBudget) -> BudgetBound:
        """The best known bound on all schedules within a budget.

        A bound for a budget also holds for every lower one, so the bounds of all solved
        budgets count.
        """
        num_bytes = budget.num_bytes
        if num_bytes not in self._bounds:
            if num_bytes < self.least.lower_bound_bytes:
                self._bounds[num_bytes] = None
            else:
                result = self.solved(num_bytes)
                excluded = result.status is SolveStatus.INFEASIBLE and result.schedule is None
                self._bounds[num_bytes] = None if excluded else result.global_bound_ns
        own = self._bounds[num_bytes]
        if own is not None:
            own = max(b for n, b in self._bounds.items() if n >= num_bytes and b is not None)
        return BudgetBound(
            budget=budget.label,
            budget_bytes=num_bytes,
            lower_bound_us=None if own is None else own / 1e3,
            scope=BoundScope.BASE_ORDER,
        )

    # -- rows ------------------------------------------------------------------------

    def predicted(self, strategy: Strategy, budget: NamedBudget | None) -> Predicted:
        """The row of a strategy at a budget, or at its own choice."""
        label, num_bytes = ("", None) if budget is None else (budget.label, budget.num_bytes)
        key = (strategy.name, num_bytes)
        if key not in self._outcomes:
            self._outcomes[key] = self._outcome(strategy, num_bytes)
        row = ComparisonRow(strategy=strategy.name, budget=label, budget_bytes=num_bytes)
        outcome = self._outcomes[key]
        if isinstance(outcome, _NoSchedule):
            return Predicted(row=replace(row, error=outcome.error, outcome=outcome.outcome))
        misses = budget is not None and not outcome.fits
        step_us = outcome.cost_ns / 1e3
        row = replace(
            row,
            setting=outcome.setting,
            note=outcome.note,
            outcome=RowOutcome.OVER_BUDGET if misses else RowOutcome.FOUND,
            off_order=self._off_order(outcome.schedule),
            fits=None if budget is None else outcome.fits,
            predicted_peak_bytes=outcome.peak_bytes,
            predicted_step_us=step_us,
            overhead=step_us / self.baseline_step_us - 1 if self.baseline_step_us else 0.0,
            num_recomputed=sum(outcome.schedule.recomputed().values()),
            solve_s=outcome.solve_s,
        )
        return Predicted(row=row, schedule=outcome.schedule)

    def _off_order(self, schedule: Schedule) -> bool:
        """Whether the bounds do not cover a schedule."""
        return first_runs(schedule) != tuple(range(self.graph.num_operators))

    def own_peak_bytes(self, strategy: Strategy) -> int:
        """The peak of a strategy at its own choice.

        Raises
        ------
        ValueError
            When it has none.
        """
        predicted = self.predicted(strategy, None).row
        if predicted.predicted_peak_bytes is None:
            raise ValueError(f"the peak of {strategy.name!r} cannot be a budget: {predicted.error}")
        return predicted.predicted_peak_bytes

    def _outcome(self, strategy: Strategy, num_bytes: int | None) -> StrategyOutcome | _NoSchedule:
        """A strategy's outcome, or why it has no schedule."""
        if num_bytes is not None and strategy.needs_budget:
            if num_bytes < self.least.lower_bound_bytes:
                return self._infeasible(num_bytes, proven=True)
            if strategy is AUTO:
                return self._ours(num_bytes)
        try:
            return self._applied(strategy, num_bytes)
        except StrategyError as error:
            return _NoSchedule(RowOutcome(error.failure), str(error)[:LONGEST_ERROR])
        # A strategy may be a user's function: its row reports whatever it raises, and the others
        # go on. KeyboardInterrupt is not an Exception and ends the comparison.
        except Exception as error:  # noqa: BLE001
            text = f"{type(error).__name__}: {error}"[:LONGEST_ERROR]
            return _NoSchedule(RowOutcome.FAILED, text)

    def _applied(self, strategy: Strategy, num_bytes: int | None) -> StrategyOutcome:
        cached = None
        if strategy.name in self._once:
            cached = self._cached.setdefault(strategy.name, CachedStrategy(strategy))
            strategy = cached.strategy
        outcome = apply_strategy(
            strategy,
            self.graph,
            budget_bytes=num_bytes,
            time_limit_s=self.solving.time_limit_s,
            seed=self.solving.seed,
            workers=self.solving.workers,
        )
        return outcome if cached is None else cached.with_full_time(outcome)

    def _ours(self, num_bytes: int) -> StrategyOutcome | _NoSchedule:
        """Our outcome: the solve that gave the bound."""
        result = self.solved(num_bytes)
        if result.schedule is None:
            proven = result.status is SolveStatus.INFEASIBLE
            return self._infeasible(num_bytes, proven=proven)
        assert result.cost_ns is not None
        assert result.peak_bytes is not None
        return StrategyOutcome(
            strategy=AUTO.name,
            setting="",
            note=f"{status_in_words(result)} (by {result.solver})",
            schedule=result.schedule,
            peak_bytes=result.peak_bytes,
            cost_ns=result.cost_ns,
            fits=True,
            num_candidates=1,
            solve_s=result.solve_s,
        )

    def solved(self, num_bytes: int) -> SolveResult:
        """Our result within a budget, as :func:`planner.optimize` solves; solved once each."""
        if num_bytes not in self._solved:
            fits = self.least.peak_bytes <= num_bytes and not fits_easily(self.graph, num_bytes)
            self._solved[num_bytes] = solve(
                self.graph,
                num_bytes,
                time_limit_s=self.solving.time_limit_s,
                seed=self.solving.seed,
                workers=self.solving.workers,
                hint=self.least.schedule if fits else None,
                gap=self.solving.gap,
            )
        return self._solved[num_bytes]

    def _infeasible(self, num_bytes: int, *, proven: bool) -> _NoSchedule:
        least, bound = self.least.peak_bytes, self.least.lower_bound_bytes
        if proven:
            need = (
                f"every schedule needs {bytes_rounded_down(bound)} ({bound} bytes) or more"
                if bound > num_bytes
                else "the solver has excluded every schedule"
            )
            return _NoSchedule(
                RowOutcome.PROVEN_INFEASIBLE,
                f"proven: nothing fits in {num_bytes} bytes {EAGERS_ORDER}; {need}",
            )
        return _NoSchedule(
            RowOutcome.NOTHING_FOUND,
            f"nothing found that fits in {num_bytes} bytes; the least peak known to be possible is "
            f"{format_bytes(least)} ({least} bytes), and that nothing fits is not proven",
        )


def predict_all(
    predictor: Predictor,
    strategies: Mapping[str, Strategy],
    budgets: Sequence[NamedBudget],
    tell: Tell,
) -> tuple[list[Predicted], tuple[BudgetBound, ...]]:
    """Return the bounds, and a row for each strategy at each budget and at its own choice.

    Parameters
    ----------
    strategies
        The strategies that take part, in order.
    tell
        Is told what comes next, once for each row and each bound.
    """
    found: list[Predicted] = []
    for budget in budgets:
        tell(f"lower bound at {budget.label}")
        predictor.bound_of(budget)
        for strategy in strategies.values():
            tell(f"{strategy.name} at {budget.label}")
            found.append(predictor.predicted(strategy, budget))
    for strategy in strategies.values():
        if not strategy.needs_budget:
            tell(f"{strategy.name} at its own choice")
            found.append(predictor.predicted(strategy, None))
    bounds = tuple(predictor.bound_of(budget) for budget in budgets)
    return [_with_gap(one, bounds) for one in found], bounds


def _with_gap(predicted: Predicted, bounds: Sequence[BudgetBound]) -> Predicted:
    """Add the gap to the bound of a row's budget; below zero it would disprove the bound."""
    row = predicted.row
    asked = (row.budget, row.budget_bytes)
    bound = next((b for b in bounds if (b.budget, b.budget_bytes) == asked), None)
    if not row.fits or bound is None or not bound.lower_bound_us:
        return predicted
    assert row.predicted_step_us is not None
    gap = (row.predicted_step_us - bound.lower_bound_us) / bound.lower_bound_us
    return replace(predicted, row=replace(row, gap=gap))
