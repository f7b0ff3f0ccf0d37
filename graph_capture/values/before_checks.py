"""What a step has changed by the time of its last check.

When a check fails, the step is abandoned and these changes are undone, with the generator's.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch.fx import Graph, Node

from ..calls.writes import hidden_writes
from ..private_torch.tensors import identity_of_storage
from .checks import is_check


@dataclass(frozen=True, slots=True, kw_only=True)
class BeforeChecks:
    """Effects before the last check.

    Parameters
    ----------
    written
        Placeholders whose memory is written to.
    """

    written: tuple[Node, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of the copies needed to undo them."""
        values = [node.meta["val"] for node in self.written]
        return sum(value.numel() * value.element_size() for value in values)


def before_checks(graph: Graph) -> BeforeChecks:
    """Return a traced graph's effects before its last check; none if it has no check."""
    nodes = list(graph.nodes)
    last = max((i for i, node in enumerate(nodes) if is_check(node.target)), default=0)
    calls = [
        node
        for node in nodes[:last]
        if node.op == "call_function" and node.target is not operator.getitem
    ]
    memory = {_memory(n): n for n in reversed(nodes) if n.op == "placeholder"}
    written: dict[Node, None] = {}
    for call in calls:
        for node in (*call.meta["writes"], *hidden_writes(call.target, call.args)):
            if isinstance(node, Node) and _memory(node) in memory:
                written.setdefault(memory[_memory(node)])
    return BeforeChecks(written=tuple(written))


def _memory(node: Node) -> int:
    return identity_of_storage(node.meta["val"].untyped_storage())


__all__ = ["BeforeChecks", "before_checks"]
