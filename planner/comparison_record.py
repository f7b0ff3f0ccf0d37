"""The results of a comparison: rows by strategy and budget, compiled steps, and lower bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from solvers.result import OPTIMAL_GAP
from solvers.scopes import BoundScope

from .base.solve_options import DEFAULT_GAP
from .compiled_record import CompiledRecord

RowKind = Literal["strategy", "peer"]


class RowOutcome(StrEnum):
    """What a row came to, by a code that files keep."""

    FOUND = "found"  # it has figures
    OVER_BUDGET = "over_budget"  # it has, and its peak is above the budget
    PROVEN_INFEASIBLE = "proven_infeasible"  # nothing fits
    NOTHING_FOUND = "nothing_found"  # in time, and nothing proven
    OUT_OF_MEMORY = "out_of_memory"  # what it would do does not fit
    NOT_APPLICABLE = "not_applicable"  # to this step
    FAILED = "failed"  # it ended in an error


Bits = Literal[
    "equal", "right", "WRONG", "different", "other draws", "not repeatable", "not compared"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """Measured steps, run alternately with eager's.

    Parameters
    ----------
    peak_bytes
        Peak of a whole step, optimizer included.
    step_us, eager_us
        Medians, in microseconds, of the steps and of the eager steps they were paired with.
    ratio
        Step over eager step: median of pairs.
    quartiles
        Of the same.
    num_pairs
        How many pairs ran; none gives NaN in the figures of time.
    bits
        Compares loss, gradients, buffers and random state of successive steps with
        eager's, and for a schedule also the outputs: ``"equal"`` to the last bit;
        ``"WRONG"`` beyond rounding. Between the two, a schedule is ``"different"``, or
        ``"not repeatable"`` if eager steps differ among themselves, too; a peer is
        ``"right"``, or ``"other draws"`` if its dropout drew other numbers, so that
        there is nothing to compare.
    difference
        The first thing that differs; ``""`` if nothing does.
    """

    peak_bytes: int
    step_us: float
    eager_us: float
    ratio: float
    quartiles: tuple[float, float]
    num_pairs: int
    bits: Bits
    difference: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRow:
    """One strategy at one budget, or one peer.

    Parameters
    ----------
    strategy
        Its name in the registry, or the peer's.
    kind
        A ``"strategy"`` is a schedule of the captured step, replayed by the one
        judge; a ``"peer"`` is another tool that ran as its users run it, and
        has measured figures only.
    budget
        The budget as requested (``"60%"``, ``"12GB"``); ``""`` if the strategy had none
        and made its own choice.
    budget_bytes
        The same in bytes; ``None`` if there is none.
    setting, note
        The strategy's parameters, and a note.
    error
        Why there are no figures; ``""`` if there are any.
    outcome
        What the row came to; of a strategy before any schedule ran.
    off_order
        Whether first runs leave eager's order, so that the bounds say nothing of it.
    fits
        Whether the predicted peak is within the budget; ``None`` without budget or figures.
    predicted_peak_bytes, predicted_step_us, overhead
        By replay; ``overhead`` is the extra time over the step that recomputes
        nothing, as a fraction of it.
    gap
        ``(step - lower bound) / lower bound`` for this budget; ``None`` if the row does
        not fit, or has no budget. The bound covers only its scope: a schedule in another
        order (``off_order``) may be below it.
    num_recomputed
        Runs beyond the first of each operator.
    solve_s
        Wall clock of proposing, solving and replaying; without the search for
        the least peak, see :attr:`Comparison.least_solve_s`.
    measured
        Real steps, if they ran.
    """

    strategy: str
    kind: RowKind = "strategy"
    budget: str = ""
    budget_bytes: int | None = None
    setting: str = ""
    note: str = ""
    error: str = ""
    outcome: RowOutcome = RowOutcome.FOUND
    off_order: bool = False
    fits: bool | None = None
    predicted_peak_bytes: int | None = None
    predicted_step_us: float | None = None
    overhead: float | None = None
    gap: float | None = None
    num_recomputed: int | None = None
    solve_s: float | None = None
    measured: MeasuredStep | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetBound:
    """What is proven about every schedule within a budget.

    Parameters
    ----------
    budget, budget_bytes
        As in the rows.
    lower_bound_us
        No schedule of ``scope`` within the budget takes less; ``None`` if nothing fits.
    scope
        What the bound covers.
    """

    budget: str
    budget_bytes: int
    lower_bound_us: float | None
    scope: BoundScope


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRecord:
    """Figures of strategies and peers on one step, replayed the same way.

    :class:`planner.Comparison` adds tables, files and plots.

    Parameters
    ----------
    model
        The module's class, or what the caller named it.
    rows
        Budget after budget in the order they were given, strategies in the
        order of the registry, then rows without a budget, then peers.
    bounds
        For each budget.
    baseline_peak_bytes, baseline_step_us
        Predicted, of the step that recomputes nothing in eager's own order.
    least_bytes, least_bound_bytes
        The least peak known to be possible, and the proven lower bound on peaks.
    eager, eager_error
        Real eager steps beside eager steps: the spread of their ratio is the
        machine's noise. ``None`` if nothing was measured, or if they failed; the error
        then says why.
    device, cost_model
        The device of predicted times, and where they come from.
    ours
        Name of the strategy that the others are compared with.
    gap
        Gap at which its solves were allowed to stop.
    time_limit_s, workers
        Of each solve; ``None`` if not recorded.
    fingerprint
        Of the captured step.
    seed, versions, machine
        What is needed to repeat a figure; date and load average are those at the start
        of timing, if anything was executed.
    dtype, autocast, optimizer
        The dtype of most of the parameters' numbers, autocast's, and the
        optimizer; ``""`` if there is none, or it was not recorded.
    measured_on
        The CPU or the card that steps really ran on, which need not be the
        ``device`` of predicted times; ``""`` if nothing ran.
    num_threads
        Number of threads of PyTorch's kernels, if steps ran on a CPU.
    repeats
        Requested pairs of steps; 0 if nothing ran.
    least_solve_s
        Wall-clock time of the search for the least peak. Ours starts from the schedule
        that it found, and no row's ``solve_s`` includes it. ``None`` if this process had
        searched before.
    compiled
        The same step compiled, if that was asked for. Its rows are measured against the compiled
        step without a budget; all other rows are of eager steps.
    """

    model: str
    rows: tuple[ComparisonRow, ...]
    bounds: tuple[BudgetBound, ...]
    baseline_peak_bytes: int
    baseline_step_us: float
    least_bytes: int
    least_bound_bytes: int
    eager: MeasuredStep | None = None
    eager_error: str = ""
    device: str
    cost_model: str
    ours: str = "auto"
    gap: float = DEFAULT_GAP
    time_limit_s: float | None = None
    workers: int | None = None
    fingerprint: str
    seed: int
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = ""
    autocast: str = ""
    optimizer: str = ""
    measured_on: str = ""
    num_threads: int | None = None
    repeats: int = 0
    least_solve_s: float | None = None
    compiled: CompiledRecord | None = None

    # -- questions ---------------------------------------------------------------------

    def row(self, strategy: str, budget: str = "") -> ComparisonRow:
        """Return the row of a strategy or a peer; ``budget`` as it was requested, ``""`` for none.

        Raises
        ------
        KeyError
            When there is no such row.
        """
        for row in self.rows:
            if (row.strategy, row.budget) == (strategy, budget):
                return row
        raise KeyError(f"no row of {strategy!r} at budget {budget!r}")

    def bound(self, budget: str) -> BudgetBound:
        """Return what is proven for a budget.

        Raises
        ------
        KeyError
            When there is no such budget.
        """
        for bound in self.bounds:
            if bound.budget == budget:
                return bound
        raise KeyError(
            f"no budget {budget!r}; there are {', '.join(b.budget for b in self.bounds)}"
        )

    def below_ours(self, tolerance: float | None = None) -> tuple[ComparisonRow, ...]:
        """Return the rows whose predicted point lies below our curve; each is a fault of ours.

        A row counts when its peak is within one of our budgets and it takes less time
        than we do there, or we found nothing there.

        Parameters
        ----------
        tolerance
            How much less, as a fraction of our time, does not count; ``None`` for the
            gap at which our solves were allowed to stop, but at least 0.01 %.

        Raises
        ------
        ValueError
            When ours took no part.
        """
        ours = [r for r in self.rows if r.strategy == self.ours and r.budget_bytes is not None]
        if not ours and self.bounds:
            raise ValueError(f"{self.ours!r} took no part in this comparison: add it to strategies")
        if tolerance is None:
            tolerance = max(OPTIMAL_GAP, self.gap)
        return tuple(
            row for row in self.rows if any(_is_below(row, our, tolerance) for our in ours)
        )


def _is_below(row: ComparisonRow, our: ComparisonRow, tolerance: float) -> bool:
    assert our.budget_bytes is not None
    if row.kind != "strategy" or row.strategy == our.strategy or row.predicted_step_us is None:
        return False
    if row.predicted_peak_bytes is None or row.predicted_peak_bytes > our.budget_bytes:
        return False
    if our.predicted_step_us is None or not our.fits:
        return True
    return row.predicted_step_us < our.predicted_step_us * (1 - tolerance)
