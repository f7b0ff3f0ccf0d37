"""Nested arguments and results: tuples, lists, dicts and what else PyTorch registers."""

from __future__ import annotations

from torch.utils._pytree import (
    TreeSpec,  # 2.11+; how a nested value is built, for putting its leaves back
    tree_flatten,  # 2.11+; leaves and structure
    tree_flatten_with_path,  # 2.11+; leaves with where they lie, to name outputs
    tree_iter,  # 2.11+; leaves one by one
    tree_leaves,  # 2.11+; leaves as a list
    tree_map,  # 2.11+; the same structure with other leaves
    tree_unflatten,  # 2.11+; undoes tree_flatten
)

__all__ = [
    "TreeSpec",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_iter",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
]
