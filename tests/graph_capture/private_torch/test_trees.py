"""Our own way through nested values is PyTorch's."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import pytest
import torch
from torch.fx import Graph
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree

from graph_capture.private_torch.trees import tree_iter, tree_leaves, tree_map

Pair = namedtuple("Pair", ("first", "second"))


class _Row(list):
    """A list that PyTorch does not go into."""


class _Line(tuple):
    """The same of a tuple."""


NESTED: dict[str, Any] = {
    "a leaf": 1,
    "none": None,
    "nothing": ((), [], {}),
    "a call": ((torch.ones(2), 3, [torch.ones(1), None]), {"dim": (0, 1), "dtype": torch.float32}),
    "in order": {"b": 1, "a": [2, {"d": 3, "c": 4}]},
    "named": [Pair(1, (2, [3])), torch.max(torch.ones(2, 2), 0)],
    "sizes": (torch.Size([2, 3]), torch.device("cpu"), slice(1, 2)),
    "other dicts": (OrderedDict(b=[1], a=2), defaultdict(list, {"c": [3]})),
    "of a graph": (immutable_list([1, [2]]), immutable_dict(a=Graph().placeholder("x"))),
    "own classes": (_Row([1, 2]), _Line((3, 4)), {5}, "text", 1.5, True),
}


@pytest.mark.parametrize("name", NESTED)
def test_leaves_and_maps_are_those_of_pytorch(name: str) -> None:
    """The same leaves in the same order, and the same structure around what takes their place."""
    tree, seen = NESTED[name], []  # type: Any, list[Any]

    def put(leaf: Any) -> tuple[str, int]:
        seen.append(leaf)
        return ("leaf", id(leaf))

    expected = _pytree.tree_leaves(tree)
    for found in (tree_leaves(tree), list(tree_iter(tree))):
        assert list(map(id, found)) == list(map(id, expected))
    made, theirs = tree_map(put, tree), _pytree.tree_map(lambda leaf: ("leaf", id(leaf)), tree)
    assert made == theirs
    assert list(map(id, seen)) == list(map(id, expected))
    assert _pytree.tree_structure(made) == _pytree.tree_structure(theirs)
