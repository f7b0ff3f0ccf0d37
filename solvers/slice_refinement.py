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
  it is already, one more virtual interval is put there. With one for each
  recomputation of the chain the model is exact, so the loop is complete.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import highspy
import numpy as np
from numpy.typing import NDArray

from graph_capture.cost_graph import CostGraph

from .arrays import ByteArray, GraphArrays, graph_arrays
from .highs import OBJECTIVE_SCALE, quiet_highs, rounded_bound
from .incumbent import Incumbent
from .replay import Replay, replay
from .schedule import Schedule
from .slice_model import SliceModel, Slicing, build_slice_model
from .slice_schedule import schedule_of, solution_of

ABSOLUTE_GAP = 0.3
"""Units of the objective (0.01 % of the step) within which a relaxation counts as solved."""

NAME = "slice_refinement"


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
    """Refine until ``state`` is solved or its time is over."""
    graph = state.graph
    g = graph_arrays(graph)
    slicing = first_slices(graph, state.budget_bytes)
    for _ in range(max_rounds):
        if state.solved or state.left_s <= 0:
            return
        begin_s = time.monotonic()
        model = build_slice_model(g, slicing, state.budget_bytes)
        relaxed = solve_relaxation(state, g, model, seed=seed, workers=workers)
        if model.infeasible or relaxed.infeasible:
            state.exclude(NAME, f"the relaxation with {len(slicing.slices)} slices has no solution")
            return
        state.raise_bound(graph.base_cost_ns + rounded_bound(relaxed.bound, graph.base_cost_ns), NAME)
        if relaxed.values is None:
            state.note(f"{NAME}: no solution of {len(slicing.slices)} slices in time")
            return
        schedule = schedule_of(g, model, relaxed.values)
        if schedule is None:
            raise RuntimeError("a solution of the slice relaxation misses an input")
        outcome = replay(graph, schedule)
        state.offer(schedule, NAME)
        refined = refine(g, slicing, schedule, outcome, state.budget_bytes)
        base = graph.base_cost_ns
        state.note(
            f"{NAME}: {len(slicing.slices)} slices, {sum(n for _, n in slicing.num_virtual)} virtual, "
            f"{len(slicing.transients)} transients, {model.num_cols} columns, "
            f"{time.monotonic() - begin_s:.2f} s, bound {relaxed.bound / 100:.3f} %, solution "
            f"{100 * (outcome.cost_ns - base) / base:.3f} % at "
            f"{outcome.peak_bytes / max(1, state.budget_bytes):.3f} of the budget"
        )
        if refined == slicing:
            return
        slicing = refined


def first_slices(graph: CostGraph, budget_bytes: int, num: int = 6) -> Slicing:
    """A handful of moments over the budget when everything is kept: evenly spread, and the peak."""
    memory = np.array(replay(graph, Schedule.keep_all(graph)).memory_bytes)
    over = np.flatnonzero(memory > budget_bytes)
    if len(over) == 0:
        return Slicing(frozenset())
    chosen = {int(np.argmax(memory))}
    for group in np.array_split(over, min(num, len(over))):
        chosen.add(int(group[np.argmax(memory[group])]))
    return Slicing(frozenset(chosen))


def solve_relaxation(
    state: Incumbent, g: GraphArrays, model: SliceModel, *, seed: int, workers: int
) -> Relaxed:
    """Run HiGHS on the model, warm-started by the incumbent."""
    h = quiet_highs(time_limit_s=max(state.left_s, 0.05), seed=seed)
    h.setOptionValue("mip_abs_gap", ABSOLUTE_GAP)
    h.setOptionValue("mip_rel_gap", 1e-9)
    h.passModel(model.lp)
    if state.schedule is not None:
        solution = highspy.HighsSolution()
        solution.col_value = solution_of(state.graph, g, model, state.schedule).tolist()
        solution.value_valid = True
        h.setSolution(solution)
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


def refine(
    g: GraphArrays, slicing: Slicing, schedule: Schedule, outcome: Replay, budget_bytes: int
) -> Slicing:
    """Enforce memory where ``schedule`` exceeds the budget most, in each stretch."""
    intervals = slicing.intervals(g.num_operators)
    single = {i.begin for i in intervals if i.end == i.begin + 1}
    front_of: list[int] = []
    front = 0
    for v in schedule.order:
        front_of.append(front)
        front += v == front
    slices = set(slicing.slices)
    transients = set(slicing.transients)
    virtual = dict(slicing.num_virtual)
    for step in _peaks_of_excess(outcome, budget_bytes):
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
