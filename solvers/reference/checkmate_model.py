"""Checkmate's mixed-integer program, for cost graphs.

Jain et al., *Checkmate: Breaking the Memory Wall with Optimal Tensor
Rematerialization* (MLSys 2020, arXiv:1910.02653), Section 4. The frontier
advances: stage t ends with the first run of operator t, and runs of the
operators before it what R says, in base order.

Legend. Stages t = 0 … n - 1; operators v, i; storages k; prod(k) the producer
of k, in(i) and out(i) what i reads and allocates. c costs, m sizes, w
workspaces, B the budget. Equation numbers are the paper's.

    R[t,i] ∈ {0, 1}   i runs in stage t
    S[t,k] ∈ {0, 1}   k stays in memory from stage t - 1 into stage t
    E[t,k,i] ∈ [0, 1] k is still needed after the place of i in stage t
    U[t,i]            bytes in memory while i runs in stage t, but its workspace

    minimize Σ c_i R[t,i]                                                       (1a)
    R[t,i] ≤ R[t,prod(k)] + S[t,k]               k ∈ in(i)                      (1b)
    S[t,k] ≤ R[t-1,prod(k)] + S[t-1,k]                                          (1c)
    R[t,t] = 1;  R[t,i] = 0 for i > t;  S[t,k] = 0 for prod(k) ≥ t              (8)
    S[t,k] + R[t,prod(k)] ≤ 1                                                   (a)
    U[t,first] = resident + kept + Σ_k m_k S[t,k] + m(out(first)) R[t,first]    (2)
    U[t,next] = U[t,i] - Σ_k m_k FREE[t,k,i] + m(out(next)) R[t,next]           (3)
    FREE[t,k,i] = (what there is of k before) - E[t,k,i]                        (b)
    E[t,k,i] ≥ S[t+1,k];  E[t,k,i] ≥ R[t,j] for j ∈ users(k), j > i             (b)
    U[t,i] + w_i R[t,i] ≤ B                                                     (1f)

(a) is ours: a storage that its producer makes anew in a stage is not read
before that, so its old version need not stay; with several storages for one
operator the paper's memory would count it twice.

(b) is the paper's FREE[t,k,i] = R[t,i] (1 - S[t+1,k]) Π_{j > i} (1 - R[t,j])
(its equation 5) in another linearization than its hazard counts (7b), (7c):
the same whole points, a relaxation that is tighter, and no binaries for FREE.
"What there is before" is S[t,k] + R[t,prod(k)] at the first place where k is
touched, and the E of the place before it later on.

What a cost graph says beyond the paper's DAG:

- several storages for one operator: one S for each, one R for all;
- pinned: R[t,i] = 0 for t > i; S of what it makes follows from (1b), (1c);
- kept: there from prod(k) to the end, in every U, and no input of (1b); a
  repetition's copy counts as workspace;
- no reader: E = 0 after its production.

R and S are left out where they cannot matter (``find_last_use`` in
``last_use.py``), so are the places of operators whose R is.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graph_capture.cost_graph import CostGraph

from ..arrays import GraphArrays
from ..highs import OBJECTIVE_SCALE
from ..last_use import find_last_use
from ..replay import replay
from ..schedule import Schedule
from ..slices.schedule import trim
from ..stages import order_of, stages_of
from .ortools_programs import ABSENT, ALWAYS, LinearBuilder, MixedIntegerProgram, Term

FLOAT_BUDGET = 1e4
"""Budgets of more units than this are scaled to it: HiGHS' tolerances are absolute, 1e-6."""


@dataclass(frozen=True)
class CheckmateModel:
    """The program and the meaning of its columns.

    ``r_col[t, i]`` and ``s_col[t, k]`` are columns, ``ABSENT`` or ``ALWAYS``.
    """

    program: MixedIntegerProgram
    r_col: NDArray[np.int64]
    s_col: NDArray[np.int64]


def count_columns(g: GraphArrays) -> int:
    """How many R and S a model has: of the order of n², so ask before building it."""
    last_use = find_last_use(g)
    storages = np.flatnonzero((g.producer >= 0) & (g.kept == 0))
    runs = np.maximum(0, last_use.operator - np.arange(g.num_operators))
    stays = np.maximum(0, last_use.storage[storages] - g.producer[storages])
    return int(runs.sum() + stays.sum())


def build_checkmate_model(
    g: GraphArrays,
    budget_bytes: int,
    *,
    integer: bool = True,
    whole_bytes: bool = False,
    hint: Schedule | None = None,
    graph: CostGraph | None = None,
    deadline_s: float = math.inf,
) -> CheckmateModel:
    """Build the program, or its relaxation with ``integer=False``.

    Parameters
    ----------
    whole_bytes
        Write memory in whole units, for solvers that count in integers.
    hint
        A schedule of ``graph`` that R and S are hinted from.
    deadline_s
        By ``time.monotonic``; a step of six hundred operators takes long.

    Raises
    ------
    TimeoutError
        When the deadline comes before the end.
    """
    room = budget_bytes - g.resident_bytes
    unit = int(np.gcd.reduce(np.concatenate([g.size, g.workspace]))) or 1
    exact = whole_bytes or budget_bytes <= FLOAT_BUDGET * unit
    divisor = float(unit) if exact else budget_bytes / FLOAT_BUDGET
    top = float(room // unit) if exact else room / divisor
    builder = LinearBuilder()
    r_col, s_col = _decisions(g, builder, integer)
    lists = _Lists(g, divisor)
    for t in range(g.num_operators):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"only {t} of {g.num_operators} stages are built in time")
        stage = _Stage(t, r_col, s_col)
        _add_flow(lists, builder, stage)
        _add_memory(lists, builder, stage, top)
    values: dict[int, float] = {}
    if hint is not None and graph is not None:
        values = _hint(graph, r_col, s_col, hint)
    return CheckmateModel(builder.build(values), r_col, s_col)


def _decisions(
    g: GraphArrays, builder: LinearBuilder, integer: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number R and S: (1a) and (8)."""
    last_use = find_last_use(g)
    num = g.num_operators
    r_col = np.full((num, num), ABSENT, dtype=np.int64)
    s_col = np.full((num + 1, g.num_storages), ABSENT, dtype=np.int64)
    cost_scale = OBJECTIVE_SCALE / max(1, int(g.cost.sum()))
    for t in range(num):
        r_col[t, t] = ALWAYS
        for i in np.flatnonzero(last_use.operator[:t] >= t):
            r_col[t, i] = builder.column(cost=g.cost[i] * cost_scale, integer=integer)
        made = (g.producer >= 0) & (g.producer < t)
        s_col[t, made & (g.kept > 0)] = ALWAYS
        for k in np.flatnonzero(made & (g.kept == 0) & (last_use.storage >= t)):
            s_col[t, k] = builder.column(integer=integer)
    return r_col, s_col


class _Lists:
    """The graph as Python's own lists, which are faster to read one by one than arrays."""

    def __init__(self, g: GraphArrays, divisor: float) -> None:
        operators = range(g.num_operators)
        self.producer: list[int] = g.producer.tolist()
        self.size: list[float] = (g.size / divisor).tolist()
        self.workspace: list[float] = (g.workspace / divisor).tolist()
        kept = g.kept > 0
        self.read = [[k for k in g.inputs(i).tolist() if not kept[k]] for i in operators]
        """Inputs that are not kept."""
        self.made = [[k for k in g.outputs(i).tolist() if not kept[k]] for i in operators]
        """Outputs that are not kept."""
        self.copied = [
            float((g.size[g.outputs(i)] * kept[g.outputs(i)]).sum()) / divisor for i in operators
        ]
        """Memory of outputs that are."""


class _Stage:
    """The columns of R and S that stage ``t`` speaks of."""

    def __init__(self, t: int, r_col: NDArray[np.int64], s_col: NDArray[np.int64]) -> None:
        self.r: list[int] = r_col[t].tolist()
        self.r_before: list[int] = r_col[t - 1].tolist() if t else []
        self.s: list[int] = s_col[t].tolist()
        self.s_before: list[int] = s_col[t - 1].tolist() if t else []
        self.s_next: list[int] = s_col[t + 1].tolist()
        self.runs: list[int] = np.flatnonzero(r_col[t] != ABSENT).tolist()
        self.stays: list[int] = np.flatnonzero(s_col[t] >= 0).tolist()
        self.kept: list[int] = np.flatnonzero(s_col[t] == ALWAYS).tolist()


def _add_flow(g: _Lists, builder: LinearBuilder, stage: _Stage) -> None:
    """Equations (1b), (1c) and (a)."""
    r, s = stage.r, stage.s
    for i in stage.runs:
        for k in g.read[i]:
            # (1b)  R[t,prod(k)] + S[t,k] ≥ R[t,i]
            builder.row([(r[g.producer[k]], 1.0), (s[k], 1.0), (r[i], -1.0)], lower=0.0)
    for k in stage.stays:
        producer = g.producer[k]
        # (1c)  S[t,k] ≤ R[t-1,prod(k)] + S[t-1,k]
        before = [(stage.r_before[producer], 1.0), (stage.s_before[k], 1.0)]
        builder.row([*before, (s[k], -1.0)], lower=0.0)
        # (a)  S[t,k] + R[t,prod(k)] ≤ 1
        if r[producer] != ABSENT:
            builder.row([(s[k], 1.0), (r[producer], 1.0)], upper=1.0)


def _add_memory(g: _Lists, builder: LinearBuilder, stage: _Stage, top: float) -> None:
    """Equations (2), (3), (b) and (1f). Memory is in units, see :data:`FLOAT_BUDGET`."""
    needed_after = _needed_after(g, builder, stage)
    constant = sum(g.size[k] for k in stage.kept)
    # What there is of each storage so far:
    level: dict[int, list[Term]] = {k: [(stage.s[k], 1.0)] for k in stage.stays if g.size[k] > 0}
    # (2)  U[t,first] = …, as the sum of these terms
    terms: list[Term] = [(stage.s[k], g.size[k]) for k in level]
    used = ABSENT  # U of the run before
    for i in stage.runs:
        run = (stage.r[i], 1.0)
        made = [k for k in g.made[i] if g.size[k] > 0]
        for k in made:
            terms.append((run[0], g.size[k]))
            level.setdefault(k, []).append(run)
        # (3)  U[t,i] = U[t,before] - Σ m FREE + Σ m(out(i)) R[t,i]
        now = builder.column(upper=max(0.0, top))
        fixed = constant if used == ABSENT else 0.0
        change = [(col, -factor) for col, factor in terms]
        builder.row([(now, 1.0), (used, -1.0), *change], lower=fixed, upper=fixed)
        # (1f)  U[t,i] + (w_i + m(copies of what is kept)) R[t,i] ≤ B
        builder.row([(now, 1.0), (run[0], g.workspace[i] + g.copied[i])], upper=top)
        # (b)  - FREE[t,k,i] = E[t,k,i] - (what there is of k)
        terms = []
        for k in (*made, *g.read[i]):
            if g.size[k] > 0:
                after = needed_after[k, i]
                terms.extend((col, -factor * g.size[k]) for col, factor in level[k])
                terms.append((after, g.size[k]))
                level[k] = [(after, 1.0)]
        used = now


def _needed_after(g: _Lists, builder: LinearBuilder, stage: _Stage) -> dict[tuple[int, int], int]:
    """E[t,k,i]: a column, ``ABSENT`` or ``ALWAYS`` for each storage and run that touches it.

    From the back: after the last place that touches k, E is S[t+1,k] itself.
    """
    later: dict[int, int] = {}  # E after the current place
    needed: dict[tuple[int, int], int] = {}
    for i in reversed(stage.runs):
        run = stage.r[i]
        for k in g.made[i]:
            needed[k, i] = later.get(k, stage.s_next[k])
        for k in g.read[i]:
            after = needed[k, i] = later.get(k, stage.s_next[k])
            # E before i ≥ E after i and ≥ R[t,i]
            if run == ALWAYS:
                later[k] = ALWAYS
            elif after == ABSENT:
                later[k] = run
            elif after != ALWAYS:
                later[k] = builder.column()
                builder.row([(later[k], 1.0), (after, -1.0)], lower=0.0)
                builder.row([(later[k], 1.0), (run, -1.0)], lower=0.0)
    return needed


def _hint(
    graph: CostGraph, r_col: NDArray[np.int64], s_col: NDArray[np.int64], schedule: Schedule
) -> dict[int, float]:
    """R and S of the staged schedule nearest to ``schedule``."""
    stages = stages_of(schedule)
    order = Schedule(tuple(order_of(stages)))
    alive = np.zeros(s_col.shape, dtype=bool)
    stage_of_step = [t for t, again in enumerate(stages) for _ in range(len(again) + 1)]
    for k, born, last in replay(graph, order).live:
        alive[stage_of_step[born] + 1 : stage_of_step[last] + 1, k] = True
    runs = np.zeros(r_col.shape, dtype=bool)
    for t, again in enumerate(stages):
        runs[t, again] = True
    pairs = ((r_col, runs), (s_col, alive))
    return {
        int(col): float(value)
        for cols, values in pairs
        for col, value in zip(cols[cols >= 0], values[cols >= 0], strict=True)
    }


def schedule_of(g: GraphArrays, model: CheckmateModel, values: NDArray[np.float64]) -> Schedule:
    """The schedule that R stands for, without the repetitions that nobody reads."""
    stages = [
        [int(i) for i in np.flatnonzero(row >= 0) if values[row[i]] > 0.5] for row in model.r_col
    ]
    return trim(g, order_of(stages))
