"""Wrap the solvers of this package as strategies: ``solvers.solve`` by name."""

from __future__ import annotations

from collections.abc import Iterator

from graph_capture.cost_graph import CostGraph

from .. import portfolio  # as a module, because it imports strategies of this package itself
from ..result import SolveResult, SolveStatus
from ..scopes import BoundScope, short_words
from .strategy import Candidate, Strategy, StrategyError, StrategyFailure, StrategyOptions


def solver_strategy(name: str, solver: str, *, summary: str, source: str) -> Strategy:
    """Return a strategy that solves with ``solver`` for its budget.

    Where nothing is found it raises :class:`StrategyError`, which says whether
    that is proven, and what the solver noted last.
    """

    def propose(graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
        if options.budget_bytes is None:
            raise StrategyError(f"{name} needs a budget; give budget_bytes")
        result = portfolio.solve(
            graph,
            options.budget_bytes,
            solver=solver,
            time_limit_s=options.time_limit_s,
            seed=options.seed,
            workers=options.workers,
        )
        if result.schedule is None:
            proven = result.status is SolveStatus.INFEASIBLE
            scope = ", in eager's order" if proven else ""
            why = f" ({result.log[-1]})" if result.log else ""
            raise StrategyError(
                f"{name}: {'proven: nothing fits' if proven else 'no schedule found'} in "
                f"{options.budget_bytes} bytes within {options.time_limit_s:g} s{scope}{why}",
                StrategyFailure.PROVEN_INFEASIBLE if proven else StrategyFailure.NOTHING_FOUND,
            )
        gap = result.gap
        words = status_in_words(result)
        note = words if gap is None else f"{words}, gap to its own bound {100 * gap:.2f} %"
        yield Candidate(schedule=result.schedule, note=note)

    return Strategy(name=name, summary=summary, source=source, propose=propose, needs_budget=True)


def status_in_words(result: SolveResult) -> str:
    """The status of a solve, and of what it is where its bound does not speak of every schedule."""
    if result.status is SolveStatus.OPTIMAL and result.bound_scope is not BoundScope.BASE_ORDER:
        return f"{result.status} among {short_words(result.bound_scope)}"
    return str(result.status)


AUTO = solver_strategy(
    "auto",
    "auto",
    summary="slice refinement, helped by local search and chain dynamic programs: ours",
    source="this package, solvers/portfolio.py",
)
UNIFORM_BYTES = solver_strategy(
    "uniform_bytes",
    "uniform",
    summary="segments of equal bytes, cut where least crosses; number of segments searched",
    source="Chen et al., arXiv:1604.06174, Section 4.3, on operators",
)
ROTOR_MENUS = solver_strategy(
    "rotor_menus",
    "chain_dp",
    summary="optimal persistent schedule of a chain of blocks with menus of what they save",
    source="this package, after rotor and Rockmate (Zhao et al., ICML 2023); menus by annealing",
)
CHECKMATE_LP_ROUNDING = solver_strategy(
    "checkmate_lp_rounding",
    "checkmate_lp_rounding",
    summary="relaxation of Checkmate's program, rounded in two phases",
    source="Jain et al., arXiv:1910.02653, Section 5",
)
CHECKMATE_MILP = solver_strategy(
    "checkmate_milp",
    "checkmate_milp",
    summary="Checkmate's exact program: optimal among staged schedules where it ends",
    source="Jain et al., arXiv:1910.02653, Section 4",
)
MOCCASIN = solver_strategy(
    "moccasin",
    "moccasin",
    summary="at most two retention intervals an operator, by CP-SAT",
    source="Bartan et al., MOCCASIN (ICML 2023)",
)
