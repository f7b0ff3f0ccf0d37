"""Call the solver as a user's options say."""

from __future__ import annotations

from dataclasses import replace

from graph_capture.cost_graph import CostGraph
from solvers.any_order.solve import solve_in_any_order
from solvers.portfolio import solve
from solvers.progress import Progress
from solvers.result import SolveResult
from solvers.schedule import Schedule

from ..base.solve_options import SolveOptions
from .known_least import easy_schedule


def search(
    graph: CostGraph,
    budget_bytes: int,
    options: SolveOptions,
    *,
    hint: Schedule | None = None,
    progress: Progress | None = None,
) -> SolveResult:
    """Search for the fastest schedule within a budget, in every allowed order if asked for.

    Parameters
    ----------
    hint
        A schedule that is known to fit, as a start.
    """
    by = solve_in_any_order if options.reorder else solve
    return by(
        graph,
        budget_bytes,
        solver=options.solver,
        time_limit_s=options.time_limit_s,
        seed=options.seed,
        workers=options.workers,
        hint=hint,
        progress=progress,
        gap=options.gap,
    )


def search_from_easy(graph: CostGraph, budget_bytes: int, options: SolveOptions) -> SolveResult:
    """What is found without any time from a schedule that needs no search, if one fits.

    For a search that its time was too short for.
    """
    hint = easy_schedule(graph, budget_bytes)
    return search(graph, budget_bytes, replace(options, time_limit_s=0.0), hint=hint)


__all__ = ["search", "search_from_easy"]
