"""What consuming gradients takes that leave a backward pass together.

They arrive at their parameters one after the other. While one is consumed, the later ones are
still in memory, and the optimizer has its temporaries beside them. The smallest come first:
the largest temporaries then lie beside the fewest gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .optimizer_step import OptimizerStep, ParameterStep

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Consumption:
    """What a group of gradients takes to be consumed.

    Parameters
    ----------
    workspace_bytes
        The most bytes beside all gradients of the group.
    calls
        What the optimizer dispatches, for costing.
    """

    workspace_bytes: int
    calls: tuple[tuple[Any, tuple, dict, Any], ...]


def in_turn(gradients: Iterable[tuple[int, int, _T]]) -> list[_T]:
    """Return gradients in the order in which a planned step has them consumed.

    Parameters
    ----------
    gradients
        Bytes, index among all gradients of the step, and what to return.

    Examples
    --------
    >>> in_turn([(8, 0, "weight"), (4, 1, "bias")])
    ['bias', 'weight']
    """
    return [gradient for _, _, gradient in sorted(gradients, key=lambda item: item[:2])]


def consumption(
    gradients: Sequence[tuple[str, int]], optimizer: OptimizerStep | None, *, in_order: bool
) -> Consumption:
    """Return what it takes to consume a group of gradients.

    Parameters
    ----------
    gradients
        Name of the parameter and bytes of each, in the order in which they arrive.
    optimizer
        What updates a parameter; ``None`` where gradients are only let go of.
    in_order
        Whether the order is certain. If not, all may still be there when the one with the
        largest temporaries is consumed.
    """
    steps = [_step_of(optimizer, name) for name, _ in gradients]
    most = gone = 0
    for (_, size), step in zip(gradients, steps, strict=True):
        most = max(most, step.workspace_bytes - gone)
        gone += size if in_order else 0
    return Consumption(
        workspace_bytes=most, calls=tuple(call for step in steps for call in step.calls)
    )


def _step_of(optimizer: OptimizerStep | None, name: str) -> ParameterStep:
    if optimizer is None:
        return ParameterStep()
    if optimizer.for_parameter:
        return optimizer.for_parameter.get(name, ParameterStep())
    return ParameterStep(workspace_bytes=optimizer.workspace_bytes)  # a plan's file has the most


__all__ = ["Consumption", "consumption", "in_turn"]
