"""Find the least memory that any schedule needs, with first runs in any order.

Search: find the least memory in the current order (``least_memory.py``), move the runs
so that the peak falls (``any_order/reorder.py``), find the least memory in the new
order, and so on while it falls. Bound: as in ``least_memory.py``, but what is forced to
be there while an operator runs is only what was made before it in every order; and at
the end everything that is kept is there.
"""

from __future__ import annotations

import time
from dataclasses import replace

from graph_capture.cost_graph import CostGraph

from ..least_memory import LeastMemory, least_memory
from ..replay import replay
from .permutation import first_runs, permuted, unpermuted
from .precedence import closure, predecessors
from .reorder import reorder_runs

MAX_ROUNDS = 5


def least_memory_in_any_order(
    graph: CostGraph,
    *,
    start: LeastMemory | None = None,
    time_limit_s: float = 10.0,
    seed: int = 0,
) -> LeastMemory:
    """Search for the schedule with the lowest peak; its bound holds in every order.

    Parameters
    ----------
    start
        What ``least_memory`` found in eager's order; the result is never
        higher. Without it half of the time goes there.

    Raises
    ------
    ValueError
        When the graph has no operators.
    """
    if graph.num_operators == 0:
        raise ValueError("a graph without operators needs no schedule")
    deadline_s = time.monotonic() + time_limit_s
    need = needs_in_any_order(graph)
    at_end = graph.resident_bytes + sum(s.size_bytes for s in graph.storages if s.kept)
    bound = max(*need, at_end)
    least = start or least_memory(graph, time_limit_s=0.5 * time_limit_s, seed=seed)
    for turn in range(MAX_ROUNDS):
        left_s = deadline_s - time.monotonic()
        if least.peak_bytes <= bound or left_s <= 0:
            break
        moved = reorder_runs(graph, least.schedule, seed=seed + turn)
        order = first_runs(moved)
        there = least_memory(permuted(graph, order), time_limit_s=left_s / 2, seed=seed)
        found = unpermuted(there.schedule, order)
        schedule = min(moved, found, key=lambda s: replay(graph, s).peak_bytes)
        outcome = replay(graph, schedule)
        if outcome.peak_bytes >= least.peak_bytes:
            break
        at_peak = {
            v
            for v, level in zip(schedule.order, outcome.memory_bytes, strict=True)
            if level == outcome.peak_bytes
        }
        least = replace(
            least,
            schedule=schedule,
            peak_bytes=outcome.peak_bytes,
            holding=tuple(sorted(at_peak)),
        )
    if least.peak_bytes <= bound == max(need):
        holding = tuple(v for v, num_bytes in enumerate(need) if num_bytes == bound)
        least = replace(least, holding=holding)
    return replace(least, lower_bound_bytes=bound)


def needs_in_any_order(graph: CostGraph) -> list[int]:
    """Return, for each operator, the bytes held while it first runs, in every order."""
    reach = closure(predecessors(graph))
    need = []
    for v, op in enumerate(graph.operators):
        there = {k for k in (*op.inputs, *op.outputs) if graph.storages[k].producer is not None}
        before = reach[v] | 1 << v
        for k, storage in enumerate(graph.storages):
            u = storage.producer
            if u is None or not before >> u & 1:
                continue
            read_later = any(reach[w] >> v & 1 for w in graph.consumers[k])
            if storage.kept or (graph.operators[u].pinned is not None and read_later):
                there.add(k)
        num_bytes = sum(graph.storages[k].size_bytes for k in there)
        num_bytes -= sum(graph.storages[old].size_bytes for old, _, _ in op.rewrites)
        need.append(graph.resident_bytes + op.workspace_bytes + num_bytes)
    return need
