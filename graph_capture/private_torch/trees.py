"""Nested arguments and results: tuples, lists, dicts and what else PyTorch registers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils import _pytree
from torch.utils._pytree import (
    SUPPORTED_NODES,
    TreeSpec,  # 2.11+; how a nested value is built, for putting its leaves back
    tree_flatten,  # 2.11+; leaves and structure
    tree_flatten_with_path,  # 2.11+; leaves with where they lie, to name outputs
    tree_unflatten,  # 2.11+; undoes tree_flatten
)

# A capture goes through the arguments of each call many times, most of which are flat tuples.
# PyTorch's own functions first find out what each of them is, and for a map make its structure.


def tree_iter(tree: Any) -> Iterator[Any]:
    """Leaves one by one (2.11+)."""
    return iter(tree_leaves(tree))


def tree_leaves(tree: Any) -> list[Any]:
    """Leaves as a list (2.11+)."""
    leaves: list[Any] = []
    _gather(tree, leaves)
    return leaves


def _gather(tree: Any, leaves: list[Any]) -> None:
    kind = type(tree)
    if kind is tuple or kind is list:
        for item in tree:
            _gather(item, leaves)
    elif kind is dict:
        for item in tree.values():
            _gather(item, leaves)
    elif _is_leaf(kind):
        leaves.append(tree)
    else:
        leaves.extend(_pytree.tree_iter(tree))


def tree_map(func: Callable[[Any], Any], tree: Any) -> Any:
    """The same structure with other leaves (2.11+)."""
    kind = type(tree)
    if kind is tuple:
        return tuple([tree_map(func, item) for item in tree])
    if kind is list:
        return [tree_map(func, item) for item in tree]
    if kind is dict:
        return {key: tree_map(func, item) for key, item in tree.items()}
    return func(tree) if _is_leaf(kind) else _pytree.tree_map(func, tree)


def _is_leaf(kind: type) -> bool:
    """Whether values of a class are surely not gone into: only tuples are without being listed."""
    return kind not in SUPPORTED_NODES and not issubclass(kind, tuple)


__all__ = [
    "TreeSpec",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_iter",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
]
