"""In which order autograd hands on gradients that leave one node together.

Each goes to the ``AccumulateGrad`` node of a leaf, and these have equal rank in the engine's
queue: which comes first is left to the heap behind it. Whoever frees a gradient when it
arrives (an optimizer in a hook) must know the order for an exact peak, so autograd itself is
asked, once for each number of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, TypeVar

import torch

from ..private_torch.dispatch import disable_current_modes

_T = TypeVar("_T")


@cache
def arrival_order(num_gradients: int, *, leads_on: bool) -> tuple[int, ...]:
    """Return the places of a node's gradients in the order in which they arrive.

    Parameters
    ----------
    num_gradients
        How many leaves get one from the node.
    leads_on
        Whether the node also leads on to another one, by an edge before all others.

    Examples
    --------
    >>> arrival_order(1, leads_on=True)
    (0,)
    """
    found: list[int] = []
    with disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
        leaves = [torch.zeros(1, requires_grad=True) for _ in range(num_gradients)]
        for place, leaf in enumerate(leaves):
            leaf.register_post_accumulate_grad_hook(partial(_note, found, place))
        link = _Node.apply(None, torch.zeros(1, requires_grad=True)) if leads_on else None
        torch.autograd.backward(_Node.apply(link, *leaves), torch.ones(1))
    return tuple(found)


def arranged(wanted: Sequence[_T], *, leads_on: bool) -> tuple[_T, ...]:
    """Return in which order a node must have its gradients so that they arrive as wanted."""
    placed = dict(zip(arrival_order(len(wanted), leads_on=leads_on), wanted, strict=True))
    return tuple(placed[place] for place in range(len(wanted)))


def _note(found: list[int], place: int, _leaf: torch.Tensor) -> None:
    found.append(place)


class _Node(torch.autograd.Function):
    """Has a gradient for each leaf, and perhaps one for what comes after it."""

    @staticmethod
    def forward(ctx: Any, link: torch.Tensor | None, *leaves: torch.Tensor) -> torch.Tensor:
        ctx.num_leaves, ctx.leads_on = len(leaves), link is not None
        return torch.zeros(1)

    @staticmethod
    def backward(ctx: Any, *_gradients: torch.Tensor) -> Any:
        link = torch.ones(1) if ctx.leads_on else None
        return (link, *(torch.ones(1) for _ in range(ctx.num_leaves)))


__all__ = ["arranged", "arrival_order"]
