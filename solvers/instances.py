"""Plain DAG instances of other papers, read as cost graphs.

The format: ``{"name", "resident", "nodes": [{"name", "cost", "size"}, …] in
execution order, "edges": [[producer, consumer], …]}``. Costs and sizes are in
the instance's own units.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graph_capture.cost_graph import CostGraph, Operator, Storage

from .replay import replay
from .schedule import Schedule


def load_instance(path: str | Path) -> CostGraph:
    """Read an instance: one storage for each node, all phases ``"forward"``."""
    return instance_from_dict(json.loads(Path(path).read_text()))


def instance_from_dict(data: dict[str, Any]) -> CostGraph:
    """The cost graph of a decoded instance."""
    nodes = data["nodes"]
    inputs: list[list[int]] = [[] for _ in nodes]
    for producer, consumer in data["edges"]:
        inputs[consumer].append(producer)
    storages = [
        Storage(name=f"{v}", size_bytes=node["size"], producer=v) for v, node in enumerate(nodes)
    ]
    resident = data.get("resident", 0)
    if resident:
        storages.append(
            Storage(name="resident", size_bytes=resident, producer=None, category="parameter")
        )
    operators = tuple(
        Operator(
            name=f"{v}",
            target=node["name"],
            inputs=tuple(sorted(inputs[v])),
            outputs=(v,),
            cost_ns=node["cost"],
        )
        for v, node in enumerate(nodes)
    )
    return CostGraph(operators, tuple(storages))


def keep_all_peak_bytes(graph: CostGraph) -> int:
    """Peak of the schedule that recomputes nothing."""
    return replay(graph, Schedule.keep_all(graph)).peak_bytes


def budget_of(graph: CostGraph, fraction: float) -> int:
    """``fraction`` of the keep-all peak, rounded down.

    Examples
    --------
    >>> from graph_capture.cost_graph import CostGraph, Operator, Storage
    >>> one = CostGraph(
    ...     (Operator(name="a", outputs=(0,)),),
    ...     (Storage(name="x", size_bytes=9, producer=0),),
    ... )
    >>> budget_of(one, 0.5)
    4
    """
    return int(fraction * keep_all_peak_bytes(graph))
