"""Slice refinement: enforce memory at a few moments, and add moments until the plan fits.

The relaxation is in ``slice_model.py``. The loop: solve it, turn the solution
into a schedule, replay that; where the replay exceeds the budget, enforce
memory there too, and solve again. Each relaxation bounds every schedule whose
first runs keep the base order, and so does the mixed-integer solver's own dual
bound at any moment. When a replay fits, its plan is optimal.

Where the excess lies

- at a base operator: it becomes a slice;
- at a recomputation in an interval of several base operators: the operator
  that it runs before, and the one before that, become slices;
- at a recomputation between two neighbouring slices: its transient is cut; if
  it is already, one more virtual interval is put there.

A round is solved only to a tenth of what is open between incumbent and bound,
and again tightly when its solution fits. Its solutions, those on the way too,
become schedules and are offered; one that does not fit is annealed into one
that does. The first slices are those where the incumbent's memory binds.

HiGHS through highspy and not CP-SAT, because on the same model (ResNet-50
training step at 50 %, 12 slices, 3,522 columns) CP-SAT 9.15 with two workers
had a bound of 1.4 % after 30 s, and HiGHS 1.15 with one thread 7.2 % after
1 s. MathOpt was not measured: with these versions ortools cannot be imported
in a process that has imported highspy (an undefined symbol).

Known imperfections
-------------------
- Recomputations in the first of a row of virtual intervals are not told apart,
  so memory among them is not enforced exactly. A relaxation may then keep a
  solution that no schedule matches, and the loop goes on to its time limit
  without a proof, mostly where nothing fits. The bounds stay valid.
- A bound that a time limit or :class:`_Watch` cuts depends on the machine's
  speed, and so may the schedule; results are reproducible only where neither
  cut.
- Low budgets of networks with many tight moments (ResNet-50 at 42 %, chains
  at 20 %) need more slices than HiGHS solves in half a minute.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import highspy
import numpy as np
from numpy.typing import NDArray

from graph_capture.cost_graph import CostGraph

from .arrays import GraphArrays, graph_arrays
from .expand import base_fronts
from .highs import OBJECTIVE_SCALE, quiet_highs, rounded_bound
from .incumbent import Incumbent
from .local_search import COOL, HEAT, local_search
from .replay import Replay, replay
from .result import OPTIMAL_GAP
from .schedule import Schedule
from .slice_model import SliceModel, Slicing, build_slice_model
from .slice_schedule import schedule_of, solution_of

ABSOLUTE_GAP = 0.3
"""Units of the objective (0.01 % of the step) within which a relaxation counts as solved."""

LOOSE_GAP = 20.0
"""The same, as long as nothing is known to fit."""

NAME = "slice_refinement"

FIRST_SLICES = 6
NEARLY = 0.97
"""Share of the budget from which a moment of the incumbent counts as tight."""

NEW_SLICES = 3
"""Stretches of excess, the worst first, that a round takes up."""

REPAIR_MOVES = 40_000
REPAIR_S = 2.0
BESIDE_S = 10.0


@dataclass(frozen=True)
class Relaxed:
    """What the mixed-integer solver says of one relaxation.

    ``bound`` is scaled like the objective; ``values`` is ``None`` when no
    solution was found.
    """

    bound: float
    values: NDArray[np.float64] | None
    infeasible: bool
    solved: bool


def slice_refinement(
    state: Incumbent, *, seed: int = 0, workers: int = 1, max_rounds: int = 1000
) -> None:
    """Refine until ``state`` is solved or its time is over.

    Parameters
    ----------
    workers
        With two or more, annealing runs in a second thread beside HiGHS; what
        it finds counts only in rounds that are cut by time.
    """
    graph = state.graph
    g = graph_arrays(graph)
    slicing = first_slices(graph, state.budget_bytes, state.schedule)
    tight = False
    for turn in range(max_rounds):
        if state.solved or state.left_s <= 0:
            return
        begin_s = time.monotonic()
        model = build_slice_model(g, slicing, state.budget_bytes)
        gap = ABSOLUTE_GAP if tight else _loose_gap(state)
        with _annealing_beside(state, seed + turn, wanted=workers > 1) as found:
            relaxed = solve_relaxation(state, g, model, seed=seed, absolute_gap=gap)
        if not relaxed.solved:
            state.offer(found(), f"local_search beside {NAME}")
        if model.infeasible or relaxed.infeasible:
            state.exclude(NAME, f"the relaxation with {len(slicing.slices)} slices has no solution")
            return
        state.raise_bound(_bound_ns(graph, relaxed.bound), NAME)
        if relaxed.values is None:
            state.note(f"{NAME}: no solution of {_describe(slicing, model)} in time")
            return
        schedule = schedule_of(g, model, relaxed.values)
        if schedule is None:
            raise RuntimeError("a solution of the slice relaxation misses an input")
        outcome = replay(graph, schedule)
        state.note(
            f"{NAME}: {_describe(slicing, model)}, {time.monotonic() - begin_s:.2f} s: "
            f"bound {relaxed.bound / 100:.3f} %, solution "
            f"{100 * (outcome.cost_ns / max(1, graph.base_cost_ns) - 1):.3f} % at "
            f"{outcome.peak_bytes / max(1, state.budget_bytes):.3f} of the budget"
        )
        state.offer(schedule, NAME)
        refined = refine(g, slicing, schedule, outcome, state.budget_bytes)
        if refined == slicing:
            if tight:
                return
            tight = True
            continue
        tight = False
        slicing = refined
        _repair(state, schedule, seed)


def _loose_gap(state: Incumbent) -> float:
    """A tenth of what is open between incumbent and bound, in units of the objective."""
    if state.cost_ns is None:
        return LOOSE_GAP
    open_ns = state.cost_ns - state.bound_ns
    return max(ABSOLUTE_GAP, 0.1 * open_ns * OBJECTIVE_SCALE / max(1, state.graph.base_cost_ns))


def _bound_ns(graph: CostGraph, scaled: float) -> int:
    return graph.base_cost_ns + rounded_bound(scaled, graph.base_cost_ns)


def _describe(slicing: Slicing, model: SliceModel) -> str:
    return (
        f"{len(slicing.slices)} slices, {sum(n for _, n in slicing.num_virtual)} virtual, "
        f"{len(slicing.transients)} transients, {model.num_cols} columns"
    )


@contextmanager
def _annealing_beside(
    state: Incumbent, seed: int, *, wanted: bool
) -> Iterator[Callable[[], Schedule | None]]:
    """Anneal the incumbent in a second thread; afterwards the value says what came of it."""
    start = state.schedule
    if not wanted or start is None:
        yield lambda: None
        return
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as pool:
        search = pool.submit(
            local_search,
            state.graph,
            state.budget_bytes,
            time_limit_s=max(0.1, min(BESIDE_S, state.left_s)),
            num_moves=1_000_000_000,
            seed=seed,
            start=start,
            heat=HEAT if seed % 2 else COOL,
            stop=stop,
        )
        try:
            yield lambda: search.result().schedule
        finally:
            stop.set()


def _repair(state: Incumbent, schedule: Schedule, seed: int) -> None:
    """Anneal a solution that may not fit into a schedule that does."""
    if state.solved:
        return
    outcome = local_search(
        state.graph,
        state.budget_bytes,
        time_limit_s=min(REPAIR_S, max(0.0, state.left_s)),
        num_moves=REPAIR_MOVES,
        seed=seed,
        start=schedule,
        heat=COOL,
    )
    state.offer(outcome.schedule, f"local_search after {NAME}")


def first_slices(graph: CostGraph, budget_bytes: int, incumbent: Schedule | None) -> Slicing:
    """A handful of moments to begin with.

    With an incumbent, the base operators where its memory is nearly the budget:
    a few moments that bind are worth more than many that do not (chain64h at
    20 %: 19.66 % proven with five of them, 17.61 % with six spread evenly).
    Without one, or where its memory binds nowhere, moments over the budget when
    everything is kept, evenly spread.
    """
    if incumbent is not None:
        outcome = replay(graph, incumbent)
        fronts = base_fronts(incumbent)
        tight = _peaks_of_excess(outcome, int(NEARLY * budget_bytes))
        tight.sort(key=lambda step: -outcome.memory_bytes[step])
        if tight:
            return Slicing(frozenset(fronts[step] for step in tight[:FIRST_SLICES]))
    memory = np.array(replay(graph, Schedule.keep_all(graph)).memory_bytes)
    over = np.flatnonzero(memory > budget_bytes)
    if len(over) == 0:
        return Slicing(frozenset())
    chosen = {int(np.argmax(memory))}
    for group in np.array_split(over, min(FIRST_SLICES, len(over))):
        chosen.add(int(group[np.argmax(memory[group])]))
    return Slicing(frozenset(chosen))


def solve_relaxation(
    state: Incumbent, g: GraphArrays, model: SliceModel, *, seed: int, absolute_gap: float
) -> Relaxed:
    """Run HiGHS on the model, warm-started by the incumbent.

    Each better solution on the way becomes a schedule and is offered. The run
    is cut when its bound proves the incumbent, and when it takes long while its
    own solutions do not fit: then other slices are worth more than its proof.
    """
    if model.num_cols == 0:
        return Relaxed(0.0, np.zeros(0), model.infeasible, True)
    h = quiet_highs(time_limit_s=max(state.left_s, 0.05), seed=seed)
    h.setOptionValue("mip_abs_gap", absolute_gap)
    h.setOptionValue("mip_rel_gap", 1e-9)
    h.passModel(model.lp)
    if state.schedule is not None:
        solution = highspy.HighsSolution()
        solution.col_value = solution_of(state.graph, g, model, state.schedule).tolist()
        solution.value_valid = True
        h.setSolution(solution)
    watch = _Watch(state, g, model)
    h.cbMipImprovingSolution.subscribe(watch.improving_solution)
    h.cbMipInterrupt.subscribe(watch.interrupt)
    h.run()
    status = h.getModelStatus()
    info = h.getInfo()
    if status == highspy.HighsModelStatus.kInfeasible:
        return Relaxed(0.0, None, True, True)
    has_solution = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    return Relaxed(
        bound=info.mip_dual_bound,
        values=np.array(h.getSolution().col_value) if has_solution else None,
        infeasible=False,
        solved=status == highspy.HighsModelStatus.kOptimal,
    )


class _Watch:
    """Looks on while HiGHS runs: takes its solutions, and tells it when to stop."""

    def __init__(self, state: Incumbent, g: GraphArrays, model: SliceModel) -> None:
        self.state, self.g, self.model = state, g, model
        self.patience_s = max(2.0, 0.25 * state.left_s)
        self.begin_s = time.monotonic()
        self.fits = False

    def improving_solution(self, event: highspy.HighsCallbackEvent) -> None:
        schedule = schedule_of(self.g, self.model, np.array(event.data_out.mip_solution))
        if schedule is None:
            return
        self.state.offer(schedule, NAME)
        self.fits = replay(self.state.graph, schedule).peak_bytes <= self.state.budget_bytes

    def interrupt(self, event: highspy.HighsCallbackEvent) -> None:
        state = self.state
        bound_ns = _bound_ns(state.graph, event.data_out.mip_dual_bound)
        proven = state.cost_ns is not None and state.cost_ns <= (1 + OPTIMAL_GAP) * bound_ns
        slow = time.monotonic() - self.begin_s > self.patience_s and not self.fits
        if proven or slow or state.left_s <= 0:
            event.interrupt()


def refine(
    g: GraphArrays, slicing: Slicing, schedule: Schedule, outcome: Replay, budget_bytes: int
) -> Slicing:
    """Enforce memory where ``schedule`` exceeds the budget most, in each stretch."""
    intervals = slicing.intervals(g.num_operators)
    single = {i.begin for i in intervals if i.end == i.begin + 1}
    front_of = base_fronts(schedule)
    worst = _peaks_of_excess(outcome, budget_bytes)
    worst.sort(key=lambda step: -outcome.memory_bytes[step])
    slices = set(slicing.slices)
    transients = set(slicing.transients)
    virtual = dict(slicing.num_virtual)
    for step in worst[:NEW_SLICES]:
        x = front_of[step]
        v = schedule.order[step]
        if v == x:
            slices.add(x)
        elif x not in single:
            slices.add(x)
            if x > 0:
                slices.add(x - 1)
        elif (v, x) not in transients:
            transients.add((v, x))
        else:
            virtual[x] = virtual.get(x, 0) + 1
    return Slicing(frozenset(slices), tuple(sorted(virtual.items())), frozenset(transients))


def _peaks_of_excess(outcome: Replay, budget_bytes: int) -> list[int]:
    """The highest moment of each stretch of moments over the budget."""
    peaks: list[int] = []
    memory = outcome.memory_bytes
    best = -1
    for i, level in enumerate((*memory, 0)):
        if level > budget_bytes:
            if best < 0 or level > memory[best]:
                best = i
        elif best >= 0:
            peaks.append(best)
            best = -1
    return peaks
