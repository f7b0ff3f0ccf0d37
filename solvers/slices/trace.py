"""Slice refinement alone, with a record of its rounds."""

from __future__ import annotations

from graph_capture.cost_graph import CostGraph

from ..checked import check_time_limit, checked_budget
from ..incumbent import Incumbent
from ..result import SolveResult
from ..schedule import Schedule
from .refinement import slice_refinement
from .rounds import Round
from .slicing import Slicing


def trace_slice_refinement(
    graph: CostGraph,
    budget_bytes: int,
    *,
    time_limit_s: float = 60.0,
    seed: int = 0,
    slicing: Slicing | None = None,
) -> tuple[SolveResult, tuple[Round, ...]]:
    """Solve by slice refinement and tell its rounds.

    The same as ``solve(graph, budget_bytes, solver="slice_refinement")``, whose
    schedule and bound it finds. Rounds that end without a solution (nothing
    fits, or the time is over) are in the result's ``log`` only.

    Parameters
    ----------
    time_limit_s, seed
        As in :func:`solvers.solve`.
    slicing
        Where the first round enforces memory; ``None`` for the solver's choice.

    Returns
    -------
    tuple
        The result, and a :class:`Round` for each relaxation in the order in
        which they were solved; none where keeping everything fits.

    Raises
    ------
    ValueError
        When the budget or time limit is negative.

    Examples
    --------
    >>> from graph_capture.cost_graph import CostGraph, Operator, Storage
    >>> one = CostGraph(
    ...     (Operator(name="a", outputs=(0,), cost_ns=5),),
    ...     (Storage(name="x", size_bytes=9, producer=0),),
    ... )
    >>> result, rounds = trace_slice_refinement(one, budget_bytes=9)
    >>> str(result.status), rounds
    ('optimal', ())
    """
    budget_bytes = checked_budget(budget_bytes)
    check_time_limit(time_limit_s)
    state = Incumbent(graph, budget_bytes, time_limit_s)
    rounds: list[Round] = []
    state.offer(Schedule.keep_all(graph), "keep_all")
    if not state.done:
        slice_refinement(state, seed=seed, slicing=slicing, observe=rounds.append)
    return state.result(), tuple(rounds)
