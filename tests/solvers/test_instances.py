from __future__ import annotations

import os
from pathlib import Path

import pytest

from solvers.instances import budget_of, instance_from_dict, keep_all_peak_bytes, load_instance
from tests.hostile import mutated

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


_INSTANCE = {
    "name": "three",
    "resident": 5,
    "nodes": [{"name": n, "cost": 1, "size": 2} for n in "abc"],
    "edges": [[0, 1], [1, 2]],
}


def test_whatever_is_no_instance_is_a_value_error(tmp_path: Path) -> None:
    """Of 500 damaged files each is read or refused with a ValueError that names the file."""
    path = tmp_path / "instance.json"
    refusals = []
    for text in mutated(_INSTANCE, 500, seed=4):
        path.write_bytes(text)
        try:
            load_instance(path)
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 250
    assert all("instance.json" in refusal for refusal in refusals)


def test_a_pipe_is_no_instance(tmp_path: Path) -> None:
    """It is refused at once instead of being waited for."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        load_instance(tmp_path / "pipe")
