"""Operators and storages while a traced step is being folded into them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node


@dataclass(kw_only=True, eq=False)
class OperatorCode:
    """The fx nodes of one operator under construction; equal only to itself.

    Parameters
    ----------
    calls
        Call nodes in order; tuple getters of theirs are in ``carriers``.
    reads
        External argument nodes and the storage that each looks at.
    outputs
        Storages that it allocates.
    clones
        ``(old, new)`` storages: it starts by cloning the old one into the new one,
        because the call that follows overwrites what others have read and may have to
        read again. A run after which nobody reads it writes in place
        (``Operator.rewrites``).
    blanks
        Storages of ``outputs`` that it allocates without a value: the call that follows
        overwrites every part of them that is ever read.
    draws
        Whether it takes numbers from the default generator.
    pinned, ordered
        As in :class:`~graph_capture.cost_graph.Operator`.
    repeats
        Whether it stands for a repetition of another operator. Then even its first
        run draws from the recorded state and writes no statistics.
    place
        Its position while the step is folded; grows along the base order.
    hungriest_bytes
        The most that any one of its calls reads of other operators' results.
    """

    calls: list[Node]
    reads: dict[Node, int] = field(default_factory=dict)
    outputs: list[int] = field(default_factory=list)
    clones: list[tuple[int, int]] = field(default_factory=list)
    blanks: list[int] = field(default_factory=list)
    draws: bool = False
    pinned: str | None = None
    ordered: bool = False
    repeats: bool = False
    place: int = -1
    hungriest_bytes: int = 0


@dataclass(kw_only=True, eq=False)
class Block:
    """One storage, while the step is being folded."""

    name: str
    size_bytes: int
    carriers: list[Node]  # nodes whose value owns the memory: everything else is a view of one
    producer: OperatorCode | None = None
    readers: set[OperatorCode] = field(default_factory=set)
    overwritten: set[Node] = field(default_factory=set)  # carriers whose value is gone
    device_type: str = "cpu"
    last_writer: OperatorCode | None = None  # of those that write to it in place
