"""MOCCASIN's constraint program of retention intervals, for cost graphs.

Bartan, Li, Teague, Lott and Dilkina, *Moccasin: Efficient Tensor
Rematerialization for Neural Networks* (ICML 2023, arXiv:2304.14463), Section 2.
Time is discrete: stage t = 0 … n - 1 has an event for each operator 0 … t, in
base order, n (n + 1) / 2 in all, and operator v may run only at its own events
(the paper's "input topological order", Section 2.4).

Legend. Operators v, producers u; storages k; prod(k) the producer of k, in(v)
and out(v) what v reads and allocates. j = 0 … C - 1 numbers the runs of an
operator. c costs, m sizes, w workspaces, B the budget less what is resident.

    a[v,j] ∈ {0, 1}   v has a run j; a[v,0] = 1
    s[v,j]            its event, among those of v; s[v,0] is the last of stage v
    e[k,j] ≥ s        event up to which run j of prod(k) is retained as k
    x[v,i,k,j]        run i of v reads the k of run j of prod(k)

    minimize Σ_v Σ_j c_v a[v,j]                                                 (1)
    a[v,j+1] ⇒ a[v,j];  a[v,j+1] ⇒ s[v,j+1] > s[v,j]                            (2)
    a[v,j+1] ⇒ s[v,j+1] > e[k,j]                 k ∈ out(v)                     (3)
    Σ_{k,j: s ≤ τ ≤ e} m_k a + Σ_{v,j: s = τ} w_v a ≤ B    for every event τ    (4)
    a[v,i] ⇒ Σ_j x[v,i,k,j] ≥ 1                  k ∈ in(v)                      (5)
    x[v,i,k,j] ⇒ a[u,j], s[u,j] < s[v,i] ≤ e[k,j]          u = prod(k)          (5)

(4) is a cumulative constraint over intervals [s, e], (5) the paper's
precedence, which it writes as a reservoir.

What a cost graph says beyond the paper's DAG:

- several storages for one operator: they share a and s, each has its own e;
- pinned, or of no use when it runs again: one run only;
- kept: the first version stays to the end and is what everybody reads; the
  copy of a repetition is there while it runs;
- workspace: an interval of a single event.

With C runs this is the staged class (``stages.py``) restricted to schedules
that run no operator more than C times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graph_capture.cost_graph import CostGraph

from ..arrays import GraphArrays
from ..last_use import (
    LastUse,
    find_last_use,
)
from ..replay import replay
from ..schedule import Schedule
from ..slices.schedule import trim
from ..stages import order_of, stages_of
from .ortools_programs import ABSENT, ALWAYS, Affine, ConstraintProgram


def event(t: int, v: int) -> int:
    """The event of operator ``v`` in stage ``t``."""
    return t * (t + 1) // 2 + v


@dataclass(frozen=True)
class MoccasinModel:
    """The program and its columns, by operator and run, or by storage and run.

    ``active`` and ``start`` lack run 0, which is given; ``end`` is empty for
    kept storages.
    """

    program: ConstraintProgram
    active: list[list[int]]
    start: list[list[int]]
    end: list[list[int]]
    length: dict[tuple[int, int], int]
    """e - s + 1 of a storage and run, where that is a column."""
    peak: int
    """Capacity of (4) in units, in phase 1; ``ABSENT`` in phase 2."""


def build_moccasin_model(
    g: GraphArrays,
    budget_bytes: int,
    *,
    num_runs: int = 2,
    least_peak: bool = False,
    hint: Schedule | None = None,
    graph: CostGraph | None = None,
) -> MoccasinModel:
    """Build the program.

    Parameters
    ----------
    num_runs
        C: how often an operator may run.
    least_peak
        Phase 1: minimize the peak, down to the budget, instead of the cost.
    hint
        A schedule of ``graph`` to begin with; what does not fit the form is lost.
    """
    last_use = find_last_use(g)
    program = ConstraintProgram()
    active, start = _runs(g, program, last_use, num_runs)
    end = _ends(g, program, last_use, start)
    reads = _Reads(g, program, active, start, end)
    for v in range(g.num_operators):
        for i in range(len(start[v]) + 1):
            for k in g.inputs(v):
                if not g.kept[k]:
                    reads.add(v, i, int(k))
    peak, length = _add_memory(g, program, active, start, end, budget_bytes, least_peak)
    if least_peak:
        program.objective = [(peak, 1)]
    else:
        program.objective = [(a, int(g.cost[v])) for v, cols in enumerate(active) for a in cols]
    model = MoccasinModel(program, active, start, end, length, peak)
    if hint is not None and graph is not None:
        _add_hint(graph, g, model, reads, hint)
    return model


def _start_of(start: list[list[int]], v: int, j: int) -> Affine:
    """s[v,j]: the first is a constant."""
    return (ABSENT, event(v, v)) if j == 0 else (start[v][j - 1], 0)


def _present(active: list[list[int]], v: int, j: int) -> int:
    """a[v,j]."""
    return ALWAYS if j == 0 else active[v][j - 1]


def _only_if(*literals: int) -> list[int]:
    return [literal for literal in literals if literal != ALWAYS]


def _runs(
    g: GraphArrays, program: ConstraintProgram, last_use: LastUse, num_runs: int
) -> tuple[list[list[int]], list[list[int]]]:
    """a and s, and equation (2)."""
    active: list[list[int]] = []
    start: list[list[int]] = []
    for v in range(g.num_operators):
        stages = range(v + 1, int(last_use.operator[v]) + 1)
        again = min(num_runs - 1, len(stages))
        active.append([program.literal() for _ in range(again)])
        start.append([program.whole([event(t, v) for t in stages]) for _ in range(again)])
        for j in range(1, again):
            program.some([active[v][j - 1]], [active[v][j]])
            later = ((start[v][j], 0), 1), ((start[v][j - 1], 0), -1)
            program.at_least(later, 1, [active[v][j]])
    return active, start


def _ends(
    g: GraphArrays, program: ConstraintProgram, last_use: LastUse, start: list[list[int]]
) -> list[list[int]]:
    """e, anywhere from production to the last use that may be; with e ≥ s.

    Anywhere, and not only at events that read k: domains full of holes cost
    CP-SAT's presolve ten times as long (G1 at 90 %: 20 s, and 2 s without).
    """
    end: list[list[int]] = [[] for _ in range(g.num_storages)]
    for k in np.flatnonzero((g.producer >= 0) & (g.kept == 0)):
        u = int(g.producer[k])
        positions = [int(v) for v in g.positions(int(k))]
        last = max(event(max(v, int(last_use.operator[v])), v) for v in positions)
        num = len(start[u]) + 1
        end[k] = [program.between(event(u, u), last) for _ in range(num)]
        for j, e in enumerate(end[k]):
            program.at_least((((e, 0), 1), (_start_of(start, u, j), -1)), 0, [])
    return end


class _Reads:
    """Equation (5), and which literal says who reads what."""

    def __init__(
        self,
        g: GraphArrays,
        program: ConstraintProgram,
        active: list[list[int]],
        start: list[list[int]],
        end: list[list[int]],
    ) -> None:
        self.g, self.program = g, program
        self.active, self.start, self.end = active, start, end
        self.chosen: dict[tuple[int, int, int, int], int] = {}

    def add(self, v: int, i: int, k: int) -> None:
        """Run ``i`` of ``v`` reads some version of ``k``."""
        u = int(self.g.producer[k])
        run = _only_if(_present(self.active, v, i))
        at = _start_of(self.start, v, i)
        if len(self.end[k]) == 1:
            self.program.at_least((((self.end[k][0], 0), 1), (at, -1)), 0, run)
            return
        literals = []
        for j, e in enumerate(self.end[k]):
            x = self.program.literal()
            self.chosen[v, i, k, j] = x
            literals.append(x)
            if j > 0:
                self.program.some([_present(self.active, u, j)], [x])
                self.program.at_least(((at, 1), (_start_of(self.start, u, j), -1)), 1, [x])
            self.program.at_least((((e, 0), 1), (at, -1)), 0, [x])
        self.program.some(literals, run)


def _add_memory(
    g: GraphArrays,
    program: ConstraintProgram,
    active: list[list[int]],
    start: list[list[int]],
    end: list[list[int]],
    budget_bytes: int,
    least_peak: bool,
) -> tuple[int, dict[tuple[int, int], int]]:
    """Equations (3) and (4); the columns of the peak and of the lengths."""
    length: dict[tuple[int, int], int] = {}
    num_events = event(g.num_operators, 0)
    unit = int(np.gcd.reduce(np.concatenate([g.size, g.workspace]))) or 1
    intervals: list[int] = []
    demands: list[int] = []

    def occupy(start: Affine, size: Affine, end: Affine, present: int, size_bytes: int) -> None:
        if size_bytes > 0:
            intervals.append(program.interval(start, size, end, present))
            demands.append(size_bytes // unit)

    for v in range(g.num_operators):
        for j in range(len(start[v]) + 1):
            s, present = _start_of(start, v, j), _present(active, v, j)
            scratch = int(g.workspace[v])
            for k in (int(k) for k in g.outputs(v)):
                if g.kept[k] and j == 0:
                    rest = (ABSENT, num_events - s[1])
                    occupy(s, rest, (ABSENT, num_events), ALWAYS, int(g.size[k]))
                elif g.kept[k]:
                    scratch += int(g.size[k])
                else:
                    if j < len(start[v]):
                        after = _start_of(start, v, j + 1)
                        beyond = ((after, 1), ((end[k][j], 0), -1))
                        program.at_least(beyond, 1, [_present(active, v, j + 1)])  # (3)
                    last = (end[k][j], 1)
                    size = program.length(s, last, num_events)
                    if j > 0:
                        length[k, j] = size[0]
                    occupy(s, size, last, present, int(g.size[k]))
            occupy(s, (ABSENT, 1), (s[0], s[1] + 1), present, scratch)
    room = (budget_bytes - g.resident_bytes) // unit
    if not least_peak:
        program.cumulative(intervals, demands, (ABSENT, room))
        return ABSENT, length
    peak = program.between(max(0, room), max(0, room, sum(demands)))
    program.cumulative(intervals, demands, (peak, 0))
    return peak, length


def _add_hint(
    graph: CostGraph, g: GraphArrays, model: MoccasinModel, reads: _Reads, schedule: Schedule
) -> None:
    """Values of all columns from the staged schedule nearest to ``schedule``."""
    stages = stages_of(schedule)
    order = order_of(stages)
    events = [event(t, v) for t, again in enumerate(stages) for v in (*again, t)]
    starts: list[list[int]] = [[] for _ in range(g.num_operators)]
    for v, at in zip(order, events, strict=True):
        starts[v].append(at)
    ends: list[list[int]] = [[] for _ in range(g.num_storages)]
    outcome = replay(graph, Schedule(tuple(order)))
    for k, _, last in outcome.live:
        ends[k].append(events[last])
    hint = model.program.hint
    for v in range(g.num_operators):
        for j, (a, s) in enumerate(zip(model.active[v], model.start[v], strict=True), 1):
            hint[a] = int(j < len(starts[v]))
            hint[s] = starts[v][j] if hint[a] else model.program.domains[s][0]
    for k, columns in enumerate(model.end):
        for j, column in enumerate(columns):
            begin = hint[model.start[int(g.producer[k])][j - 1]] if j else 0
            hint[column] = ends[k][j] if j < len(ends[k]) else begin
            if (k, j) in model.length:
                hint[model.length[k, j]] = hint[column] + 1 - begin
    for (v, i, k, j), x in reads.chosen.items():
        reader = starts[v][i] if i < len(starts[v]) else -1
        before = [at for at in starts[int(g.producer[k])] if at < reader]
        hint[x] = int(j == len(before) - 1)
    if model.peak != ABSENT:
        unit = int(np.gcd.reduce(np.concatenate([g.size, g.workspace]))) or 1
        least = model.program.domains[model.peak][0]
        hint[model.peak] = max(least, (outcome.peak_bytes - g.resident_bytes) // unit)


def schedule_of(g: GraphArrays, model: MoccasinModel, values: Sequence[float]) -> Schedule:
    """The runs in the order of their events, without repetitions that nobody reads."""
    runs = [(event(v, v), v) for v in range(g.num_operators)]
    for v in range(g.num_operators):
        for a, s in zip(model.active[v], model.start[v], strict=True):
            if values[a] > 0.5:
                runs.append((round(values[s]), v))
    return trim(g, [v for _, v in sorted(runs)])
