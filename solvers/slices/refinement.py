"""Slice refinement: enforce memory at a few moments, and add moments until the plan fits.

The relaxation is in ``slices/model.py``. The loop: solve it, turn the solution
into a schedule, replay that; where the replay exceeds the budget, enforce
memory there too, and solve again. Each relaxation bounds every schedule of its
scope, and so does the mixed-integer solver's own dual bound at any moment. When
a replay fits, its plan is optimal.

Where the excess lies

- at a base operator: it becomes a slice;
- at a recomputation in an interval of several base operators: the operator
  that it runs before, and the one before that, become slices;
- at a recomputation between two neighbouring slices: its transient is cut, and
  if it is already, its event is. Events speak of staged schedules only
  (``stages.py``), so from then on bounds have that narrower scope; what was
  proven before stays proven for every schedule in base order. With all slices
  and events the model is exact for staged schedules, so the loop ends.

Later relaxations are no lower than earlier ones. So a round stops at the first
solution that costs no more than the best bound of its scope: it cannot be
improved, only fit or not. Without such a solution a round is solved to a tenth
of what is open between incumbent and bound, and again tightly when its solution
fits. Solutions on the way become schedules too: they are offered, they are
annealed into schedules that fit, and their excess is cut with the last one's.
The first slices are those where the incumbent's memory binds.

HiGHS through highspy and not CP-SAT, because on the same model (ResNet-50
training step at 50 %, 12 slices, 3,522 columns) CP-SAT 9.15 with two workers
had a bound of 1.4 % after 30 s, and HiGHS 1.15 with one thread 7.2 % after
1 s. On G1 at 70 % with events (1,234 columns) HiGHS needs 4.0 s, SCIP 9.2 s
through OR-Tools' model builder, and CP-SAT is at a fifth of the optimum after
60 s. Neither MathOpt nor the model builder has the callback that this needs.

Known imperfections
-------------------
- A bound that a time limit or impatience cuts depends on the machine's
  speed, and so may the schedule; results are reproducible only where neither
  cut.
- Dense random graphs and low budgets of convolutional networks (G1 at 70 % in
  less than some minutes, G2 at 80 %, ResNet-50 at 50 % and below) need more
  slices than HiGHS solves in a minute.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from graph_capture.cost_graph import CostGraph

from ..arrays import GraphArrays, graph_arrays
from ..highs import OBJECTIVE_SCALE
from ..incumbent import Incumbent
from ..replay import Replay, replay
from ..retention_plan import base_fronts
from ..schedule import Schedule
from .model import SliceModel, build_slice_model
from .relaxation import Companion, bound_ns, solve_relaxation
from .repair import NAME, Repair
from .rounds import Observe, Round
from .slicing import Slicing

ABSOLUTE_GAP = 0.3
"""Units of the objective (0.01 % of the step) within which a relaxation counts as solved."""

LOOSE_GAP = 20.0
"""The same, as long as nothing is known to fit."""

FIRST_SLICES = 6
NEARLY = 0.97
"""Share of the budget from which a moment of the incumbent counts as tight."""

MOST_AHEAD = 8
"""Neighbours that a row of slices grows by at once."""

NEW_SLICES = 6
"""Stretches of excess, the worst first, that a round takes up; fewer where HiGHS is slow.

G2 at 80 %: 17 slices at once keep HiGHS busy for the whole time.
"""

QUICK_S = 2.0
"""A round that takes less lets the next one take up twice as many."""

MANY_COLUMNS = 2_000
"""A larger model lets the next one take up half as many."""

SOLUTIONS = 3
"""The last ones of a round whose excess is cut."""


def slice_refinement(
    state: Incumbent,
    *,
    seed: int = 0,
    companion: Companion | None = None,
    slicing: Slicing | None = None,
    candidates: NDArray[np.bool_] | None = None,
    observe: Observe | None = None,
) -> None:
    """Refine until ``state`` is solved or its time is over.

    Parameters
    ----------
    companion
        Heard after a round that the clock has cut, or later than
        five seconds, when reproducibility is lost anyway.
    slicing
        To begin with.
    candidates
        The operators that may run again; by default all. With fewer, bounds
        speak of them only, and so ``state`` must be one of its own.
    observe
        Told each round that has a solution.
    """
    graph = state.graph
    g = graph_arrays(graph)
    if slicing is None:
        slicing = first_slices(graph, state.budget_bytes, state.schedule)
    tight = False
    growth = NEW_SLICES
    # What is made of all operators would cross the bounds of some.
    repair = Repair(state, seed) if candidates is None else None
    while not state.done and state.left_s > 0:
        begin_s = time.monotonic()
        model = build_slice_model(g, slicing, state.budget_bytes, candidates=candidates)
        relaxed = solve_relaxation(
            state,
            g,
            model,
            staged=slicing.staged,
            seed=seed,
            absolute_gap=ABSOLUTE_GAP if tight else _loose_gap(state),
            companion=companion,
            repair=repair,
        )
        if companion is not None and relaxed.cut:
            companion.collect()
        if model.infeasible or relaxed.infeasible:
            reason = f"the relaxation with {len(slicing.slices)} slices has no solution"
            state.exclude(NAME, reason, staged=slicing.staged)
            return
        state.raise_bound(bound_ns(graph, relaxed.bound), NAME, staged=slicing.staged)
        if relaxed.outdated:
            state.note(NAME, "once more, from a better schedule")
            continue
        if not relaxed.solutions:
            state.note(NAME, f"no solution of {_describe(slicing, model)} in time")
            return
        schedule = relaxed.solutions[-1]
        outcome = replay(graph, schedule)
        state.note(
            NAME,
            f"{_describe(slicing, model)}, {time.monotonic() - begin_s:.2f} s: "
            f"bound {relaxed.bound / 100:.3f} %, solution "
            f"{100 * (outcome.cost_ns / max(1, graph.base_cost_ns) - 1):.3f} % at "
            f"{outcome.peak_bytes / max(1, state.budget_bytes):.3f} of the budget",
        )
        took_s = time.monotonic() - begin_s
        if relaxed.cut or model.num_cols > MANY_COLUMNS:
            growth = max(2, growth // 2)
        elif took_s < QUICK_S:
            growth = min(NEW_SLICES, 2 * growth)
        refined = slicing
        for other in relaxed.solutions[-(SOLUTIONS if growth == NEW_SLICES else 1) :]:
            refined |= refine(
                g, slicing, other, replay(graph, other), state.budget_bytes, most=growth
            )
        if observe is not None:
            observe(
                Round(
                    slicing=slicing,
                    num_columns=model.num_cols,
                    bound_ns=bound_ns(graph, relaxed.bound),
                    schedule=schedule,
                    cost_ns=outcome.cost_ns,
                    peak_bytes=outcome.peak_bytes,
                    best_bound_ns=state.bound_ns if slicing.staged else state.global_bound_ns,
                    incumbent_ns=state.cost_ns,
                    refined=refined,
                    elapsed_s=state.elapsed_s,
                )
            )
        if refined == slicing:
            if tight:
                return
            tight = True
            continue
        tight = False
        slicing = refined
        if companion is not None:
            companion.suggest(slicing)
        if repair is not None:
            repair.after_round(schedule)


def _loose_gap(state: Incumbent) -> float:
    """A tenth of what is open between incumbent and bound, in units of the objective."""
    if state.cost_ns is None:
        return LOOSE_GAP
    open_ns = state.cost_ns - state.bound_ns
    return max(ABSOLUTE_GAP, 0.1 * open_ns * OBJECTIVE_SCALE / max(1, state.graph.base_cost_ns))


def _describe(slicing: Slicing, model: SliceModel) -> str:
    return (
        f"{len(slicing.slices)} slices, {len(slicing.transients)} transients, "
        f"{len(slicing.events)} events, {model.num_cols} columns"
    )


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


def refine(
    g: GraphArrays,
    slicing: Slicing,
    schedule: Schedule,
    outcome: Replay,
    budget_bytes: int,
    *,
    most: int,
) -> Slicing:
    """Enforce memory where ``schedule`` exceeds the budget, in ``most`` stretches at most."""
    intervals = slicing.intervals(g.num_operators)
    single = {i.begin for i in intervals if i.single}
    front_of = base_fronts(schedule)
    worst = _peaks_of_excess(outcome, budget_bytes)
    worst.sort(key=lambda step: -outcome.memory_bytes[step])
    slices = set(slicing.slices)
    transients = set(slicing.transients)
    events = set(slicing.events)
    for step in worst[:most]:
        x = front_of[step]
        v = schedule.order[step]
        if v == x:
            slices.add(x)
            slices |= _ahead(slicing.slices, x, g.num_operators)
        elif x not in single:
            slices |= {x, max(0, x - 1)} | _ahead(slicing.slices, max(0, x - 1), g.num_operators)
        elif (v, x) not in transients and not slicing.staged:
            transients.add((v, x))
        else:
            events.add((v, x))
    return Slicing(frozenset(slices), frozenset(transients), frozenset(events))


def _ahead(slices: frozenset[int], x: int, num_operators: int) -> set[int]:
    """Positions beyond ``x``, as many as there are slices in a row right behind it.

    The excess that one slice forbids comes back at its neighbour; instead of
    following it one position a round, the row of slices doubles.
    """
    ahead: set[int] = set()
    for step in (-1, 1):
        behind, beyond = x - step, x + step
        while behind in slices and 0 <= beyond < num_operators and len(ahead) < MOST_AHEAD:
            ahead.add(beyond)
            behind, beyond = behind - step, beyond + step
    return ahead


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
