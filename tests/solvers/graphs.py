"""Small graphs for the solvers' tests: random ones, chains, and an exhaustive optimum."""

from __future__ import annotations

import heapq
from pathlib import Path

from hypothesis import strategies as st

from graph_capture.cost_graph import CostGraph, Operator, Storage

INSTANCES = Path(__file__).parent / "instances"


@st.composite
def cost_graphs(draw: st.DrawFn, max_operators: int = 6) -> CostGraph:
    """A random step with everything that a cost graph can say."""
    num_operators = draw(st.integers(1, max_operators))
    storages = [Storage(name="resident", size_bytes=draw(st.integers(0, 3)), producer=None)]
    operators: list[Operator] = []
    for v in range(num_operators):
        inputs = draw(st.sets(st.integers(0, len(storages) - 1), max_size=3))
        num_outputs = draw(st.sampled_from([1, 1, 1, 2, 0]))
        outputs = tuple(range(len(storages), len(storages) + num_outputs))
        for k in outputs:
            storages.append(
                Storage(
                    name=f"s{k}",
                    size_bytes=draw(st.integers(0, 6)),
                    producer=v,
                    kept=draw(st.sampled_from([False] * 5 + [True])),
                )
            )
        operators.append(
            Operator(
                name=f"o{v}",
                inputs=tuple(inputs),
                outputs=outputs,
                cost_ns=draw(st.integers(0, 5)),
                workspace_bytes=draw(st.sampled_from([0, 0, 0, 2])),
                pinned=draw(st.sampled_from([None] * 5 + ["test"])),
                ordered=draw(st.booleans()),
            )
        )
    return CostGraph(tuple(operators), tuple(storages))


def training_chain(
    num_layers: int, *, size_bytes: int = 10, cost_ns: int = 10, with_phases: bool = True
) -> CostGraph:
    """``f0 … f(L-1)`` forward, then ``b(L-1) … b0``; ``b_i`` reads ``f_i`` and ``b_(i+1)``."""
    storages = [
        Storage(name=f"x{v}", size_bytes=size_bytes, producer=v) for v in range(2 * num_layers)
    ]
    operators = [
        Operator(name=f"f{i}", inputs=(i - 1,) if i else (), outputs=(i,), cost_ns=cost_ns)
        for i in range(num_layers)
    ]
    for j in range(num_layers):
        i = num_layers - 1 - j
        v = num_layers + j
        operators.append(
            Operator(
                name=f"b{i}",
                inputs=(i,) if j == 0 else (i, v - 1),
                outputs=(v,),
                cost_ns=cost_ns,
                phase="backward" if with_phases else "forward",
            )
        )
    return CostGraph(tuple(operators), tuple(storages))


def exhaustive_optimum(graph: CostGraph, budget_bytes: int) -> int | None:
    """Least cost of all schedules whose first runs keep the base order; ``None``: nothing fits.

    Dijkstra over (first operator that has not run, storages in memory). Its
    steps are: forget a storage, run the next operator, run an earlier one again.
    """
    sizes = [s.size_bytes for s in graph.storages]
    resident = graph.resident_bytes
    start: tuple[int, frozenset[int]] = (0, frozenset())
    best = {start: 0}
    queue: list[tuple[int, int, tuple[int, ...]]] = [(0, 0, ())]
    while queue:
        cost, front, alive_list = heapq.heappop(queue)
        alive = frozenset(alive_list)
        if best[front, alive] < cost:
            continue
        if front == graph.num_operators:
            return cost
        steps: list[tuple[int, int, frozenset[int]]] = [
            (cost, front, alive - {k}) for k in alive if not graph.storages[k].kept
        ]
        for v in range(front + 1):
            op = graph.operators[v]
            if v < front and op.pinned is not None:
                continue
            inputs = {k for k in op.inputs if graph.storages[k].producer is not None}
            if not inputs <= alive:
                continue
            after = alive | set(op.outputs)
            duplicates = sum(sizes[k] for k in op.outputs if graph.storages[k].kept and v < front)
            used = resident + sum(sizes[k] for k in after) + op.workspace_bytes + duplicates
            if used <= budget_bytes:
                steps.append((cost + op.cost_ns, max(front, v + 1), after))
        for new_cost, new_front, new_alive in steps:
            state = (new_front, new_alive)
            if state not in best or new_cost < best[state]:
                best[state] = new_cost
                heapq.heappush(queue, (new_cost, new_front, tuple(sorted(new_alive))))
    return None
