"""A bound that no reordering can beat.

The slice relaxation (``slices/model.py``) knows the base order by its intervals
alone: which operators first run before a slice, and which after. A *fixed*
operator (``any_order/precedence.py``) has the same ones before it in every order
that the runtime can follow, so the relaxation with slices at fixed operators
only, and neither transients nor events, is the same for all of these orders, and
its bound holds for all of them.

The loss is always fixed. In the steps of transformers it is where memory binds: what
backward needs is in memory there or made again later, whatever the order. Where the
bound meets a schedule in eager's order, reordering is proven useless. Where memory
binds inside backward (ResNets) it is weak.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import highspy
import numpy as np

from graph_capture.cost_graph import CostGraph

from ..arrays import GraphArrays, graph_arrays
from ..checked import checked_budget
from ..highs import quiet_highs, rounded_bound
from ..replay import replay
from ..schedule import Schedule
from ..slices.model import build_slice_model
from ..slices.slicing import Slicing
from .precedence import fixed_operators

ABSOLUTE_GAP = 0.3
"""Units of the objective (0.01 % of the step) within which the relaxation counts as solved."""

MAX_SLICES = 6


@dataclass(frozen=True, slots=True)
class OrderFreeBound:
    """``lower_bound_ns`` for the whole step; ``infeasible`` when nothing fits in any order."""

    lower_bound_ns: int
    infeasible: bool


def order_free_bound(
    graph: CostGraph, budget_bytes: int, *, time_limit_s: float = 10.0, seed: int = 0
) -> OrderFreeBound:
    """Bound the time of every schedule within ``budget_bytes``, whatever its order.

    Start with the fixed operator that has the most memory, and add the next ones if
    time is left.
    """
    budget_bytes = checked_budget(budget_bytes)
    deadline_s = time.monotonic() + time_limit_s
    memory = np.array(replay(graph, Schedule.keep_all(graph)).memory_bytes)
    over = [v for v in fixed_operators(graph) if memory[v] > budget_bytes]
    over.sort(key=lambda v: -memory[v])
    best = OrderFreeBound(graph.base_cost_ns, False)
    g = graph_arrays(graph)
    for num_slices in sorted({min(1, len(over)), min(MAX_SLICES, len(over))} - {0}):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or best.infeasible:
            break
        found = _relax(g, over[:num_slices], budget_bytes, left_s, seed)
        best = max(best, found, key=lambda bound: (bound.infeasible, bound.lower_bound_ns))
    return best


def _relax(
    g: GraphArrays, slices: list[int], budget_bytes: int, time_limit_s: float, seed: int
) -> OrderFreeBound:
    base_ns = int(g.cost.sum())
    model = build_slice_model(g, Slicing(frozenset(slices)), budget_bytes)
    if model.infeasible or model.num_cols == 0:
        return OrderFreeBound(base_ns, model.infeasible)
    h = quiet_highs(time_limit_s=time_limit_s, seed=seed)
    h.setOptionValue("mip_abs_gap", ABSOLUTE_GAP)
    h.setOptionValue("mip_rel_gap", 1e-9)
    h.passModel(model.lp)
    h.run()
    if h.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return OrderFreeBound(base_ns, True)
    bound = h.getInfo().mip_dual_bound
    return OrderFreeBound(base_ns + rounded_bound(bound, base_ns), False)
