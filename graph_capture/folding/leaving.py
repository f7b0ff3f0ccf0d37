"""What leaves before a step has ended, though the step hands it out: outputs and gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from torch.fx import Node

from .blocks import Block, OperatorCode

ACCUMULATE = "accumulate"
"""Target of the operators that stand for autograd's adding to earlier gradients."""

CONSUME = "consume"
"""Target of the operators that stand for hooks which take gradients as they arrive."""

COPY_OUTPUTS = "copy_outputs"
"""Target of the operator that stands for the copies of outputs by a wrapper of the model."""

HANDED_ON = frozenset({ACCUMULATE, CONSUME})
"""Targets of operators after which gradients leave a planned backward pass."""

LARGEST_BYTES = 25 * 2**20
"""Gradients that leave together: a bucket of ``DistributedDataParallel``."""

SMALLEST_BYTES = 2**20
"""Another autograd node costs some 50 microseconds, which fewer bytes are not worth."""

MANY_GROUPS = 16
"""Groups of a step whose gradients are fewer than that many of the largest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiedOutput:
    """An output that a wrapper of the model copies.

    Parameters
    ----------
    node, block
        The output and its memory.
    replaced
        Whether the loop gets the copy; else it gets the output, and the copy is dropped.
    """

    node: Node
    block: int
    replaced: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    """What leaves before the step has ended.

    Parameters
    ----------
    outputs
        Blocks of outputs that the loop lets go of once it has the loss.
    copied
        Outputs that a wrapper of the model copies.
    replaced
        Blocks of outputs that nobody holds once they are copied.
    gradients
        Blocks of gradients that are added to earlier ones or consumed, and the block of what
        each is for.
    names
        The parameter that each of them is for.
    arrivals
        For each of them its turn among all that arrive in eager's backward pass, and the
        position in the traced graph of the last node before it arrives.
    at_once
        Whether each of these leaves when it is there, as in eager; a planned step hands
        them on in groups.
    """

    outputs: AbstractSet[int] = frozenset()
    copied: Sequence[CopiedOutput] = ()
    replaced: AbstractSet[int] = frozenset()
    gradients: Mapping[int, int] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)
    arrivals: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    at_once: bool = False


def least_group_bytes(total_bytes: int) -> int:
    """Return how many bytes of gradients leave a backward pass together, at least."""
    return max(SMALLEST_BYTES, min(LARGEST_BYTES, total_bytes // MANY_GROUPS))


def groups_of(
    codes: Sequence[OperatorCode],
    turn: int,
    gradients: Mapping[int, int],
    blocks: Sequence[Block],
) -> dict[int, list[int]]:
    """Return which gradients leave a planned backward pass together, by the place after which.

    A gradient leaves after the last operator that reads it or what it is for, since its
    hooks may write to both. What is left leaves after the last operator of all.

    Parameters
    ----------
    codes
        The operators in base order.
    turn
        The place of the loss.
    gradients
        Blocks of gradients, and the block of what each is for.
    """
    ready = _last_uses(codes, turn)
    by_place = sorted(
        (max(ready.get(k, 0), ready.get(owner, 0)), k) for k, owner in gradients.items()
    )
    least_bytes = least_group_bytes(sum(blocks[k].size_bytes for k in gradients))
    groups: dict[int, list[int]] = {}
    group: list[int] = []
    for i, (place, k) in enumerate(by_place):
        group.append(k)
        last = i == len(by_place) - 1
        full = sum(blocks[k].size_bytes for k in group) >= least_bytes
        if last or (full and turn < place < by_place[i + 1][0]):
            groups[len(codes) - 1 if last else place] = group
            group = []
    return groups


def arrivals_of(
    codes: Sequence[OperatorCode],
    turn: int,
    leaving: Leaving,
    position: Mapping[Node, int],
) -> dict[int, list[int]]:
    """Return which gradients eager hands on after which operator, in the order of arrival.

    Parameters
    ----------
    codes, turn
        As for :func:`groups_of`.
    position
        Of each node in the traced graph.
    """
    ready = _last_uses(codes, turn)
    begins = [min((position[call] for call in code.calls), default=-1) for code in codes]
    arriving: dict[int, list[int]] = {}
    for k, (_, last) in sorted(leaving.arrivals.items(), key=lambda item: item[1]):
        before = [p for p in range(turn + 1, len(codes)) if begins[p] <= last]
        arriving.setdefault(max([turn, ready.get(k, turn), *before]), []).append(k)
    return arriving


def _last_uses(codes: Sequence[OperatorCode], turn: int) -> dict[int, int]:
    """The place of the last operator of the backward pass that makes or reads each block."""
    last: dict[int, int] = {}
    for place, code in enumerate(codes):
        if place > turn:
            used = {*code.reads.values(), *code.outputs, *(old for old, _ in code.clones)}
            last.update((k, place) for k in used)
    return last


__all__ = [
    "ACCUMULATE",
    "CONSUME",
    "COPY_OUTPUTS",
    "CopiedOutput",
    "HANDED_ON",
    "Leaving",
    "arrivals_of",
    "groups_of",
    "least_group_bytes",
]
