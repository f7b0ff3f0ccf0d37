"""``solve``: which methods run, in which order, and which passes hints to which."""

from __future__ import annotations

import threading
from collections.abc import Callable

from graph_capture.cost_graph import CostGraph
from graph_capture.suggestions import unknown_name

from .arrays import graph_arrays
from .backward_search import compile_backward_search, least_memory_bound
from .baseline_incumbents import BaselineSchedules
from .chains.chain_dp import chain_dp, is_plain_chain
from .checked import check_time_limit, checked_budget
from .gap_cover import gap_cover
from .incumbent import Incumbent
from .local_search import compile_annealing, local_search
from .parallel_search import ParallelSearch
from .progress import Progress
from .reference.checkmate import checkmate_lp_rounding, checkmate_milp
from .reference.moccasin import moccasin
from .result import SolveResult
from .retention_plan import find_gaps
from .schedule import Schedule
from .slices.refinement import slice_refinement
from .uniform import uniform_under_budget

BASELINE_SHARE = 0.1
"""Of the time left, what the field's simple strategies may take at most."""

OVERTIME_OPERATORS = 500
"""Up to which they are all tried, be the time over or not: it is some tenths of a second."""

OVERTIME_S = 1.0
"""Beyond the time limit, after which even that ends: a busy machine takes longer."""


def solve(
    graph: CostGraph,
    budget_bytes: int,
    *,
    solver: str = "auto",
    time_limit_s: float = 60.0,
    seed: int = 0,
    workers: int = 2,
    hint: Schedule | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    gap: float = 0.0,
) -> SolveResult:
    """Find the fastest schedule within ``budget_bytes``, and a lower bound.

    Parameters
    ----------
    solver
        One of :data:`SOLVERS`. ``"auto"`` keeps everything where that fits; otherwise
        it searches for a schedule and proves it by slice refinement. The others run
        alone.
    time_limit_s
        Wall clock; the best schedule found by then is returned. On graphs of up to
        :data:`OVERTIME_OPERATORS` operators, ``"auto"`` tries the field's simple
        strategies even after the limit, for a few tenths of a second
        (:data:`OVERTIME_S` at most). The first solve after an installation also
        compiles for some ten seconds, which the limit does not cover.
    seed
        The same graph, budget, seed and workers give the same result unless the clock
        intervenes: neither the time limit nor the limits of single searches cut the
        solve, and with two workers it ends within five seconds (after that, the second
        thread's findings count, too). CP-SAT guarantees this for one worker only.
    workers
        Number of threads. ``"auto"`` searches in a second one while HiGHS uses the first.
    hint
        A schedule to start from; its first runs keep the base order, like every
        schedule that the bounds cover.
    progress
        Called at every event.
    stop
        Once another thread, or ``progress``, sets it, the best schedule found so far is
        returned.
    gap
        Gap at which to stop; 0.01 % at least.

    Raises
    ------
    ValueError
        When ``solver`` is unknown, the budget or time limit is negative, or the
        first runs of ``hint`` leave the base order.
    """
    if solver not in SOLVERS:
        raise ValueError(unknown_name("solver", solver, sorted(SOLVERS)))
    if not gap >= 0:
        raise ValueError(f"gap must be >= 0, got {gap}")
    budget_bytes = checked_budget(budget_bytes)
    check_time_limit(time_limit_s)
    if hint is not None and list(dict.fromkeys(hint.order)) != sorted(set(hint.order)):
        raise ValueError("the first runs of the hint are not in base order")
    if graph.num_operators > 0:
        g = graph_arrays(graph)
        compile_annealing(g, find_gaps(g))
        compile_backward_search(g)
    state = Incumbent(graph, budget_bytes, time_limit_s, progress, stop, gap)
    state.offer(hint, "hint")
    SOLVERS[solver](state, seed, workers)
    return state.result()


def _keep_all(state: Incumbent, seed: int, workers: int) -> None:
    state.offer(Schedule.keep_all(state.graph), "keep_all")


def _uniform(state: Incumbent, seed: int, workers: int) -> None:
    state.offer(uniform_under_budget(state.graph, state.budget_bytes), "uniform")


def _gap_cover(state: Incumbent, seed: int, workers: int) -> None:
    bound = gap_cover(state.graph, state.budget_bytes, time_limit_s=max(0.1, state.left_s))
    state.raise_bound(bound.lower_bound_ns, "gap_cover")
    if bound.infeasible:
        state.exclude("gap_cover", "dropping everything that can be dropped does not suffice")


def _local_search(state: Incumbent, seed: int, workers: int) -> None:
    _keep_all(state, seed, workers)
    if not state.done:
        _anneal(state, seed, state.left_s, 400_000)


def _chain_dp(state: Incumbent, seed: int, workers: int) -> None:
    _keep_all(state, seed, workers)
    if not state.done:
        _chain(state, seed, state.left_s)


def _slice_refinement(state: Incumbent, seed: int, workers: int) -> None:
    _keep_all(state, seed, workers)
    if not state.done:
        slice_refinement(state, seed=seed)


def _checkmate_milp(state: Incumbent, seed: int, workers: int) -> None:
    checkmate_milp(state, seed=seed, workers=workers)


def _checkmate_lp_rounding(state: Incumbent, seed: int, workers: int) -> None:
    checkmate_lp_rounding(state, seed=seed)


def _moccasin(state: Incumbent, seed: int, workers: int) -> None:
    moccasin(state, seed=seed, workers=workers)


def _auto(state: Incumbent, seed: int, workers: int) -> None:
    """Run the methods in turn; they share bounds and schedules through ``state``.

    Cheap bounds and schedules come first, including the field's simple strategies. The
    chain's dynamic program, where it takes no time, and a short annealing then give an
    incumbent near which slice refinement begins. A second thread searches in parallel.
    """
    for step in (_keep_all, _gap_cover, _uniform):
        step(state, seed, workers)
        if state.done or state.left_s <= 0:
            return
    baselines = BaselineSchedules(state.graph, state.budget_bytes)
    until_s = state.elapsed_s + BASELINE_SHARE * state.left_s
    for schedule, name in baselines.singles(lambda: state.stopped or state.elapsed_s > until_s):
        state.offer(schedule, name)
    if state.done:
        return
    if is_plain_chain(state.graph):
        _chain(state, seed, 0.1 * state.left_s)
    with ParallelSearch(state, seed=seed, wanted=workers > 1, baselines=baselines) as parallel:
        _anneal(state, seed, min(2.0, 0.2 * state.left_s), 60_000, known=state.schedule)
        if workers == 1:
            until_s = state.elapsed_s + BASELINE_SHARE * state.left_s
            for schedule, name in baselines.families(
                lambda: state.stopped or state.elapsed_s > until_s
            ):
                state.offer(schedule, name)
        if state.schedule is None:
            _fit_or_exclude(state, 0.25 * state.left_s)
        if not state.done:
            slice_refinement(state, seed=seed, companion=parallel)
    if not state.done and state.graph.num_operators <= OVERTIME_OPERATORS:
        for schedule, name in baselines.families(
            lambda: state.stopped or state.left_s <= -OVERTIME_S
        ):
            state.offer(schedule, name)


def _fit_or_exclude(state: Incumbent, time_limit_s: float) -> None:
    """Where annealing finds nothing, search a schedule backward or prove that there is none."""
    too_much = state.budget_bytes + 1
    least = least_memory_bound(
        state.graph, peak_bytes=too_much, time_limit_s=time_limit_s, stop=state.stop
    )
    if least.lower_bound_bytes >= too_much:
        state.exclude("backward_search", "every schedule needs more")
    state.offer(least.schedule, "backward_search")


def _anneal(
    state: Incumbent,
    seed: int,
    time_limit_s: float,
    num_moves: int,
    *,
    known: Schedule | None = None,
) -> None:
    outcome = local_search(
        state.graph,
        state.budget_bytes,
        time_limit_s=time_limit_s,
        num_moves=num_moves,
        seed=seed,
        known=known,
        stop=state.stop,
    )
    state.offer(outcome.schedule, "local_search")


def _chain(state: Incumbent, seed: int, time_limit_s: float) -> None:
    outcome = chain_dp(
        state.graph, state.budget_bytes, time_limit_s=time_limit_s, seed=seed, stop=state.stop
    )
    state.offer(outcome.schedule, "chain_dp")
    if outcome.schedule is None:
        state.note("chain_dp", outcome.reason)


SOLVERS: dict[str, Callable[[Incumbent, int, int], None]] = {
    "auto": _auto,
    "slice_refinement": _slice_refinement,
    "local_search": _local_search,
    "chain_dp": _chain_dp,
    "gap_cover": _gap_cover,
    "uniform": _uniform,
    "keep_all": _keep_all,
    "checkmate_milp": _checkmate_milp,
    "checkmate_lp_rounding": _checkmate_lp_rounding,
    "moccasin": _moccasin,
}
"""Methods by name; each works on the shared incumbent with a seed and a number of threads."""
