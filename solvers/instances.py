"""Read the plain DAG instances of other papers as cost graphs.

The format: ``{"name", "resident", "nodes": [{"name", "cost", "size"}, …] in
execution order, "edges": [[producer, consumer], …]}``. Costs and sizes are in
the instance's own units.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graph_capture.cost_graph import CostGraph, Operator, Storage
from graph_capture.json_text import read_json
from graph_capture.regular_file import read_regular

from .replay import replay
from .schedule import Schedule

MAX_FILE_BYTES = 2**30


def load_instance(path: str | Path) -> CostGraph:
    """Read an instance, with one storage per node and all phases ``"forward"``.

    Raises
    ------
    OSError
        When the file cannot be read.
    ValueError
        When it is not an instance; the message names the file and the place.
    """
    try:
        return instance_from_dict(read_json(read_regular(path, MAX_FILE_BYTES)))
    except ValueError as error:
        raise ValueError(f"{path} is not an instance: {error}") from error


def instance_from_dict(data: dict[str, Any]) -> CostGraph:
    """Build the cost graph of a decoded instance.

    Raises
    ------
    ValueError
        When it is not an instance; the message names the place.
    """
    _check(data)
    nodes = data["nodes"]
    inputs: list[set[int]] = [set() for _ in nodes]
    for producer, consumer in data["edges"]:
        inputs[consumer].add(producer)
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


def _check(data: Any) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"must be an object, got {data!r:.100}")
    for key in ("nodes", "edges"):
        if not isinstance(data.get(key), list):
            raise ValueError(f"at {key}: must be a list, got {data.get(key)!r:.100}")
    _check_count("resident", data.get("resident", 0))
    for v, node in enumerate(data["nodes"]):
        if not isinstance(node, dict) or not {"name", "cost", "size"} <= set(node):
            raise ValueError(f"at nodes[{v}]: must have name, cost and size, got {node!r:.100}")
        if not isinstance(node["name"], str):
            raise ValueError(f"at nodes[{v}].name: must be a text, got {node['name']!r:.100}")
        _check_count(f"nodes[{v}].cost", node["cost"])
        _check_count(f"nodes[{v}].size", node["size"])
    num_nodes = len(data["nodes"])
    for i, edge in enumerate(data["edges"]):
        if not isinstance(edge, list) or len(edge) != 2:
            raise ValueError(f"at edges[{i}]: must be [producer, consumer], got {edge!r:.100}")
        for v in edge:
            _check_count(f"edges[{i}]", v)
            if v >= num_nodes:
                raise ValueError(f"at edges[{i}]: there are {num_nodes} nodes, got {v}")


def _check_count(place: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"at {place}: must be a whole number from 0 on, got {value!r:.100}")


def keep_all_peak_bytes(graph: CostGraph) -> int:
    """Return the peak of the schedule that recomputes nothing."""
    return replay(graph, Schedule.keep_all(graph)).peak_bytes


def budget_of(graph: CostGraph, fraction: float) -> int:
    """Return ``fraction`` of the keep-all peak, rounded down.

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
