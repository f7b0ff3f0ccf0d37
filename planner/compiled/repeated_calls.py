"""One graph that runs for several layers before any backward pass, by one plan for all of them.

Dynamo compiles code once. Layers that are compiled each by itself (``layer.compile(...)``), or that
look the same between graph breaks, run one code, and what each call saves waits while the others
run. While the last call's forward and backward run, the others hold their weights and what they
saved. While the first call's backward runs, which is the last one, their gradients are there in its
place. So with *n* calls, each has to leave its budget ``n - 1`` times the larger of the two, and
how much a call saves is bounded as well as what it takes while it runs: to save less leaves more
room to run in.

A cost graph says that by two numbers: memory that is resident, and scratch of the turn between
forward and backward, where what is saved is all there is. For some bounds of what is saved the step
is solved, and the one of the fastest schedule is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from graph_capture.cost_graph import CostGraph, Storage
from graph_capture.units import format_bytes
from solvers.replay import replay
from solvers.schedule import Schedule

from ..base.budget import Budget
from ..base.solve_options import SolveOptions
from ..errors import InfeasibleBudgetError
from ..planning.known_least import known_least_memory
from ..planning.search import search
from .compiled_plan import saved_between
from .kept_choices import keep_bound, place_of, read_bound
from .priced_step import PricedStep

HELD_BY_OTHERS = "held by other calls of the graph"

NUM_BOUNDS = 8
"""For how many bounds of what a call saves the step is solved, evenly spaced up to all that may be
saved."""

NUM_HALVINGS = 2
"""How often two more are tried around the best, at half the distance each time."""

SHARE_OF_A_TRIAL = 0.1
"""Of the time for solving, for each of them."""

LEAST_LIMIT_S = 5.0
"""Of each search for the least memory of all calls."""


@dataclass(frozen=True, kw_only=True)
class RepeatedCalls:
    """How often a graph runs before its backward passes, and what each call has of its own.

    Parameters
    ----------
    num_calls
        At least 1.
    weight_bytes, gradient_bytes
        Of the parameters and buffers of one call, and of the gradients.
    taken_bytes
        What a call takes from an earlier one and keeps, where results are not held anyway.
    accumulates
        Whether the gradients are there from the beginning of the step.
    """

    num_calls: int = 1
    weight_bytes: int = 0
    gradient_bytes: int = 0
    taken_bytes: int = 0
    accumulates: bool = False

    def others_bytes(self, saved_bytes: int) -> int:
        """What the other calls hold at most while one of them runs.

        Parameters
        ----------
        saved_bytes
            By one call, its results included.
        """
        saved_bytes += self.taken_bytes
        if self.accumulates:
            changing_bytes = saved_bytes + self.gradient_bytes
        else:
            changing_bytes = max(saved_bytes, self.gradient_bytes)
        return (self.num_calls - 1) * (self.weight_bytes + changing_bytes)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A step whose schedules leave the other calls room, and one of them."""

    priced: PricedStep
    schedule: Schedule | None = None


def share_among(
    priced: PricedStep,
    calls: RepeatedCalls,
    budget: Budget,
    solving: SolveOptions,
    *,
    kept_for: str | None = None,
) -> Shared:
    """Find how much each call may save.

    Parameters
    ----------
    priced
        The step of one call.
    budget
        Of all calls together.
    kept_for
        The name under which that is kept for other processes, without a schedule; ``None`` where
        it is not.

    Raises
    ------
    InfeasibleBudgetError
        When nothing is found for any bound; the message names a budget that is known to work.
    """
    if calls.num_calls == 1:
        return Shared(priced=priced)
    usable_bytes = budget.usable_bytes
    trial = replace(solving, time_limit_s=solving.time_limit_s * SHARE_OF_A_TRIAL)
    most_bytes = saved_bytes(priced, Schedule.keep_all(priced.graph))
    place = None if kept_for is None else place_of(kept_for, calls, usable_bytes, solving)
    kept_bytes = None if place is None else read_bound(place, most_bytes)
    if kept_bytes is not None:
        return Shared(priced=bounded(priced, calls, kept_bytes, usable_bytes))
    found: dict[int, tuple[int, Shared]] = {}  # by the bound: the time in ns, and what takes it

    def attempt(bound_bytes: int, *hints: Schedule) -> None:
        step = bounded(priced, calls, bound_bytes, usable_bytes)
        known = [*hints, *(other.schedule for _, other in found.values() if other.schedule)]
        fitting = [s for s in known if replay(step.graph, s).peak_bytes <= usable_bytes]
        hint = min(fitting, key=lambda s: replay(step.graph, s).cost_ns, default=None)
        result = search(step.graph, usable_bytes, trial, hint=hint)
        if result.schedule is not None:
            assert result.cost_ns is not None
            found[bound_bytes] = result.cost_ns, Shared(priced=step, schedule=result.schedule)

    for part in range(NUM_BOUNDS, 0, -1):
        attempt(part * most_bytes // NUM_BOUNDS)
        if any(cost_ns <= priced.graph.base_cost_ns for cost_ns, _ in found.values()):
            break
    else:
        if not found:
            least_bytes, schedule = _least_of_all(priced, calls, solving.seed)
            if least_bytes > usable_bytes:
                raise _nothing_fits(budget, calls, least_bytes)
            attempt(saved_bytes(priced, schedule), schedule)
        for halving in range(1, NUM_HALVINGS + 1):
            best_bytes = min(found, key=lambda bound: found[bound][0])
            apart_bytes = most_bytes // (NUM_BOUNDS << halving)
            for bound_bytes in (best_bytes - apart_bytes, best_bytes + apart_bytes):
                if 0 < bound_bytes < most_bytes:
                    attempt(bound_bytes)
    best_bytes = min(found, key=lambda bound: found[bound][0])
    if place is not None:
        keep_bound(place, best_bytes)
    return found[best_bytes][1]


def bounded(
    priced: PricedStep, calls: RepeatedCalls, bound_bytes: int, usable_bytes: int
) -> PricedStep:
    """The step of one call, whose schedules within ``usable_bytes`` save no more than a bound and
    leave the other calls as much."""
    counted = counting(priced, calls, bound_bytes)
    turn = counted.graph.operators[priced.turn]
    made_bytes = sum(counted.graph.storages[k].size_bytes for k in turn.outputs)
    free_bytes = usable_bytes - counted.graph.resident_bytes - made_bytes - bound_bytes
    return _with_scratch_at_turn(counted, max(0, free_bytes))


def counting(priced: PricedStep, calls: RepeatedCalls, saved_bytes: int) -> PricedStep:
    """The step of one call, with what the others hold where each saves ``saved_bytes``."""
    if calls.num_calls == 1:
        return priced
    others = Storage(
        name=HELD_BY_OTHERS,
        size_bytes=calls.others_bytes(saved_bytes),
        producer=None,
        category="resident",
    )
    graph = priced.graph
    return replace(priced, graph=CostGraph(graph.operators, (*graph.storages, others)))


def counting_everything(priced: PricedStep, calls: RepeatedCalls) -> PricedStep:
    """The same where each call saves all that it can."""
    return counting(priced, calls, saved_bytes(priced, Schedule.keep_all(priced.graph)))


def held_by_others(graph: CostGraph) -> int:
    """What a step counts of other calls."""
    return sum(s.size_bytes for s in graph.storages if s.name == HELD_BY_OTHERS)


def saved_bytes(priced: PricedStep, schedule: Schedule) -> int:
    """What one call saves, its results included."""
    return saved_between(priced.graph, schedule, priced.turn)


def needed_at_turn(priced: PricedStep, saved_bytes: int) -> int:
    """What a step that saves so much has to have free for all calls; 0 where it has only one."""
    turn = priced.graph.operators[priced.turn]
    if not turn.workspace_bytes:
        return 0
    made_bytes = sum(priced.graph.storages[k].size_bytes for k in turn.outputs)
    return priced.graph.resident_bytes + saved_bytes + made_bytes + turn.workspace_bytes


def _with_scratch_at_turn(priced: PricedStep, scratch_bytes: int) -> PricedStep:
    operators = list(priced.graph.operators)
    operators[priced.turn] = replace(operators[priced.turn], workspace_bytes=scratch_bytes)
    return replace(priced, graph=CostGraph(tuple(operators), priced.graph.storages))


def _least_of_all(priced: PricedStep, calls: RepeatedCalls, seed: int) -> tuple[int, Schedule]:
    """The least memory of all calls that is found, and a schedule that takes it.

    The more scratch a turn has, the less is saved where the peak is the least.
    """
    everything_bytes = replay(priced.graph, Schedule.keep_all(priced.graph)).peak_bytes
    span_bytes = everything_bytes - priced.graph.resident_bytes
    totals = []
    for share in (0.0, 0.25, 0.5, 1.0):
        weighed = _with_scratch_at_turn(priced, round(share * span_bytes)).graph
        schedule = known_least_memory(weighed, seed, time_limit_s=LEAST_LIMIT_S).schedule
        counted = counting(priced, calls, saved_bytes(priced, schedule))
        totals.append((replay(counted.graph, schedule).peak_bytes, schedule))
    return min(totals, key=lambda pair: pair[0])


def _nothing_fits(budget: Budget, calls: RepeatedCalls, least_bytes: int) -> InfeasibleBudgetError:
    min_budget_bytes = budget.total_for(least_bytes)
    return InfeasibleBudgetError(
        f"No schedule was found by which {calls.num_calls} calls of one graph stay within "
        f"{format_bytes(budget.total_bytes)} ({budget.total_bytes} bytes). The least budget known "
        f"to work is {format_bytes(min_budget_bytes)} (budget_bytes={min_budget_bytes}); whether a "
        "lower one exists is not proven. A smaller batch or a shorter sequence lowers it.",
        budget_bytes=budget.total_bytes,
        min_budget_bytes=min_budget_bytes,
        lower_bound_bytes=0,
    )


__all__ = [
    "RepeatedCalls",
    "Shared",
    "counting",
    "counting_everything",
    "held_by_others",
    "needed_at_turn",
    "saved_bytes",
    "share_among",
]
