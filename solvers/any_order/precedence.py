"""Which operators must come before which, in every order of first runs.

An operator first runs after the producers of what it reads, after the ordered
operators before it (random draws, effects), and on eager's side of the loss:
the training loop computes the loss from what forward returns and hands its
gradients to backward, so forward ends there. The optimizer comes last.

Writing over a dead argument adds no constraint: the call that writes is part of the
operator that allocates, so nothing ever reads the argument from outside (see
``graph_capture/folding/reuse.py``), and what it reads besides is an input of that operator.
"""

from __future__ import annotations

from graph_capture.cost_graph import CostGraph

BARRIERS = ("loss", "optimizer")
"""Phases whose operators nothing moves across."""


def predecessors(graph: CostGraph) -> tuple[tuple[int, ...], ...]:
    """Return, for each operator, those that must first run before it; not transitively closed."""
    before: list[set[int]] = [set() for _ in graph.operators]
    last_ordered = last_barrier = -1
    for v, op in enumerate(graph.operators):
        for k in op.inputs:
            producer = graph.storages[k].producer
            if producer is not None:
                before[v].add(producer)
        if op.ordered:
            if last_ordered >= 0:
                before[v].add(last_ordered)
            last_ordered = v
        if op.phase in BARRIERS:
            before[v].update(range(last_barrier + 1, v))
        if last_barrier >= 0:
            before[v].add(last_barrier)
        if op.phase in BARRIERS:
            last_barrier = v
    return tuple(tuple(sorted(b)) for b in before)


def closure(before: tuple[tuple[int, ...], ...]) -> list[int]:
    """Return, for each operator, all that must first run before it, as a set of bits."""
    reach: list[int] = []
    for direct in before:
        bits = 0
        for u in direct:
            bits |= reach[u] | 1 << u
        reach.append(bits)
    return reach


def fixed_operators(graph: CostGraph) -> tuple[int, ...]:
    """Return the operators before which the same operators have run in every order.

    Each other operator must come before or after them: the loss, what is
    between it and the trunk of the model, and where the trunk is all there is.
    """
    n = graph.num_operators
    reach = closure(predecessors(graph))
    successors = [0] * n
    for bits in reach:
        while bits:
            low = bits & -bits
            successors[low.bit_length() - 1] += 1
            bits ^= low
    return tuple(v for v in range(n) if reach[v].bit_count() + successors[v] == n - 1)
