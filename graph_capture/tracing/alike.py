"""Decide whether two captures of a model are the same step."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..reads.snapshots import BY_VALUE, difference, same_atom, snapshot
from .traced_step import TracedStep


def calls_of(step: TracedStep) -> list[str]:
    """Describe every call and its arguments; equal calls get equal descriptions."""
    return [f"{n.name} {n.target} {n.args} {n.kwargs}" for n in step.graph.nodes]


def same_step(step: TracedStep, other: TracedStep) -> bool:
    """Whether two steps make the same calls, and store and return the same plain values."""
    return (
        calls_of(step) == calls_of(other)
        and _same_tensors(step.constants, other.constants)
        and all(map(_same_leaf, step.template.leaves, other.template.leaves))
        and len(step.left) == len(other.left)
        and all(
            a.target == b.target and difference(snapshot(a.value), b.value, "") is None
            for a, b in zip(step.left, other.left, strict=True)
        )
    )


def _same_tensors(some: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(
        tensor is others[name] or torch.equal(tensor, others[name]) for name, tensor in some.items()
    )


def _same_leaf(a: object, b: object) -> bool:
    return not isinstance(a, BY_VALUE) or same_atom(a, b)


__all__ = ["calls_of", "same_step"]
