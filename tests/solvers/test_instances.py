from __future__ import annotations

from pathlib import Path

import pytest

from solvers.instances import budget_of, instance_from_dict, keep_all_peak_bytes, load_instance

from .graphs import INSTANCES


def test_reads_costs_sizes_edges_and_resident_bytes() -> None:
    """Each node becomes an operator with one storage; resident bytes count always."""
    graph = instance_from_dict(
        {
            "resident": 5,
            "nodes": [
                {"name": "a", "cost": 1, "size": 2},
                {"name": "b", "cost": 3, "size": 4},
            ],
            "edges": [[0, 1]],
        }
    )
    assert graph.base_cost_ns == 4
    assert graph.operators[1].inputs == (0,)
    assert keep_all_peak_bytes(graph) == 11
    assert budget_of(graph, 0.5) == 5


@pytest.mark.parametrize("path", sorted(INSTANCES.glob("*.json")), ids=lambda path: path.stem)
def test_every_instance_loads(path: Path) -> None:
    """The instances that the tests carry are valid graphs."""
    assert load_instance(path).num_operators > 10
