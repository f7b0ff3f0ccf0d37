"""A lower bound in milliseconds: the least that must be dropped and made again.

Let ``v`` range over the storages that may be made again and ``(a, b)`` over
the gaps between their consecutive uses in base order. In a schedule whose
first runs keep the base order, a storage that is not in memory while operator
``p`` first runs, with ``a < p < b``, is made again before ``b``: its producer
runs again within the gap. Gaps of one storage do not overlap, so its producer
runs again once for each gap that is dropped, and a producer with several
outputs runs again at least as often as the most dropped of them:

    minimize    Σ_f c_f r_f
    subject to  r_f ≥ Σ_{gaps (a, b) of k} x_k,a                    for each output k of f
                Σ_{gaps covering p} m_k x_k,a ≥ keep-all memory(p) - B    for each p over B
                0 ≤ x ≤ 1

Every such schedule satisfies it, so the optimum is a lower bound on the time that
recomputation adds. It sees no recomputation chains (what is made again needs its own
inputs), so it is weak where chains are long. This linear program is solved by HiGHS.
Its moments are those over the budget, thinned to the highest of every few neighbours.
What p writes over, where it is not read again, does not count in memory(p): no gap is
needed to let go of it there.
"""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np
from scipy.sparse import coo_array

from graph_capture.cost_graph import CostGraph

from .arrays import GraphArrays, graph_arrays
from .checked import checked_budget
from .highs import OBJECTIVE_SCALE, build_lp, quiet_highs, rounded_bound
from .replay import replay
from .retention_plan import find_gaps
from .schedule import Schedule

MAX_MOMENTS = 200


@dataclass(frozen=True, slots=True)
class GapCoverBound:
    """``lower_bound_ns`` is for the whole step; ``infeasible`` when nothing can fit."""

    lower_bound_ns: int
    infeasible: bool


def gap_cover(graph: CostGraph, budget_bytes: int, *, time_limit_s: float = 10.0) -> GapCoverBound:
    """Bound the time of every schedule within ``budget_bytes`` in this base order from below."""
    budget_bytes = checked_budget(budget_bytes)
    g = graph_arrays(graph)
    kept = replay(graph, Schedule.keep_all(graph))
    excess = np.array(kept.memory_bytes) - budget_bytes
    for p, op in enumerate(graph.operators):
        for old, new, _ in op.rewrites:
            if (p, old, new) not in kept.in_place:
                excess[p] -= graph.storages[old].size_bytes
    moments = _thin(np.flatnonzero(excess > 0), excess)
    if len(moments) == 0:
        return GapCoverBound(graph.base_cost_ns, False)
    return _solve(g, moments, excess, budget_bytes, time_limit_s)


def _thin(moments: np.ndarray, excess: np.ndarray) -> np.ndarray:
    if len(moments) <= MAX_MOMENTS:
        return moments
    groups = np.array_split(moments, MAX_MOMENTS)
    return np.array([group[np.argmax(excess[group])] for group in groups])


def _solve(
    g: GraphArrays,
    moments: np.ndarray,
    excess: np.ndarray,
    budget_bytes: int,
    time_limit_s: float,
) -> GapCoverBound:
    gaps = find_gaps(g)
    n = g.num_operators
    inner = np.flatnonzero((gaps.end < n) & (gaps.fixed == 0) & (g.size[gaps.storage] > 0))
    num_gaps = len(inner)
    covered = (gaps.begin[inner][None, :] < moments[:, None]) & (
        moments[:, None] < gaps.end[inner][None, :]
    )
    freed = covered * (g.size[gaps.storage[inner]][None, :] / max(1, budget_bytes))
    if np.any(freed.sum(axis=1) < excess[moments] / max(1, budget_bytes) - 1e-9):
        return GapCoverBound(int(g.cost.sum()), True)

    producers, producer_col = np.unique(g.producer[gaps.storage[inner]], return_inverse=True)
    storages, storage_row = np.unique(gaps.storage[inner], return_inverse=True)
    num_cols = num_gaps + len(producers)
    cover = coo_array(freed)
    first_of_storage = np.array([np.argmax(storage_row == r) for r in range(len(storages))])
    m = len(moments)
    rows = np.concatenate([cover.coords[0], m + storage_row, m + np.arange(len(storages))])
    cols = np.concatenate(
        [cover.coords[1], np.arange(num_gaps), num_gaps + producer_col[first_of_storage]]
    )
    values = np.concatenate([cover.data, -np.ones(num_gaps), np.ones(len(storages))])
    scale = OBJECTIVE_SCALE / max(1, int(g.cost.sum()))
    lp = build_lp(
        cost=np.concatenate([np.zeros(num_gaps), g.cost[producers] * scale]),
        upper=np.concatenate([np.ones(num_gaps), np.full(len(producers), highspy.kHighsInf)]),
        matrix=coo_array((values, (rows, cols)), shape=(m + len(storages), num_cols)),
        row_lower=np.concatenate([excess[moments] / max(1, budget_bytes), np.zeros(len(storages))]),
        row_upper=np.full(m + len(storages), highspy.kHighsInf),
        integer=np.zeros(num_cols, dtype=bool),
    )
    h = quiet_highs(time_limit_s=time_limit_s)
    h.passModel(lp)
    h.run()
    base_cost = int(g.cost.sum())
    if h.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return GapCoverBound(base_cost, False)
    value = h.getInfo().objective_function_value
    return GapCoverBound(base_cost + rounded_bound(value, base_cost), False)
