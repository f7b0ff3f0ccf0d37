"""Find the schedule of a compiled graph within a budget."""

from __future__ import annotations

from solvers.replay import replay
from solvers.result import SolveResult
from solvers.schedule import Schedule

from ..base.budget import Budget, nothing_fits
from ..base.solve_options import SolveOptions
from ..errors import PlanError
from ..planning.known_least import fits_easily, known_least_memory
from ..planning.search import search, search_from_easy
from .priced_step import PricedStep, unplanned_peak_bytes


def solve_step(
    priced: PricedStep, budget: Budget, options: SolveOptions, *, hint: Schedule | None = None
) -> SolveResult:
    """Solve a priced step.

    Parameters
    ----------
    hint
        A schedule that fits, as a start.

    Raises
    ------
    InfeasibleBudgetError
        When nothing fits; the message says the least budget that would.
    PlanError
        When the time was too short to find what fits.
    """
    graph, budget_bytes = priced.graph, budget.usable_bytes
    if unplanned_peak_bytes(priced) <= budget_bytes:
        everything_bytes = replay(graph, Schedule.keep_all(graph)).peak_bytes
        budget_bytes = max(budget_bytes, everything_bytes)  # nothing draws again then
    elif hint is None and not fits_easily(graph, budget_bytes):
        least = known_least_memory(graph, options.seed)
        if least.peak_bytes > budget_bytes:
            raise nothing_fits(graph, budget, least)
        hint = least.schedule
    result = search(graph, budget_bytes, options, hint=hint)
    if result.schedule is None and hint is None:
        result = search_from_easy(graph, budget_bytes, options)
    if result.schedule is None:
        raise PlanError(
            f"no schedule was found within {options.time_limit_s} s, though one for "
            f"{known_least_memory(graph, options.seed).peak_bytes} bytes exists; give more time"
        )
    return result


__all__ = ["solve_step"]
