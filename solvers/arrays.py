"""Cost graphs as flat arrays, for compiled search and sparse models.

Lists of indices are stored the CSR way: the inputs of operator ``v`` are
``in_idx[in_ptr[v]:in_ptr[v + 1]]``. Resident storages need no decision, so
they are left out of the inputs and counted in ``resident_bytes`` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from graph_capture.cost_graph import CostGraph

IntArray = NDArray[np.int64]
ByteArray = NDArray[np.uint8]


class GraphArrays(NamedTuple):
    """The figures of a :class:`CostGraph`, indexed by operator ``v`` or storage ``k``.

    A named tuple rather than a dataclass, because numba can pass it into compiled
    functions.
    """

    in_ptr: IntArray
    in_idx: IntArray
    """Distinct inputs of each operator that are not resident."""
    out_ptr: IntArray
    out_idx: IntArray
    pos_ptr: IntArray
    pos_idx: IntArray
    """Base positions at which each storage is produced or read, ascending."""
    size: IntArray
    producer: IntArray
    """-1 when resident."""
    kept: ByteArray
    cost: IntArray
    workspace: IntArray
    """Less what is written over: no less than this is needed beside inputs and outputs."""
    over_ptr: IntArray
    over_idx: IntArray
    """Inputs of each operator that it writes over where their value is not read again."""
    over_ns: IntArray
    """Time of a copy of each of them, where it is."""
    pinned: ByteArray
    ordered: ByteArray
    resident_bytes: int
    loss: int
    """Index of the operator between forward and backward; -1 when there is none."""

    @property
    def num_operators(self) -> int:
        return len(self.cost)

    @property
    def num_storages(self) -> int:
        return len(self.size)

    def inputs(self, v: int) -> IntArray:
        return self.in_idx[self.in_ptr[v] : self.in_ptr[v + 1]]

    def outputs(self, v: int) -> IntArray:
        return self.out_idx[self.out_ptr[v] : self.out_ptr[v + 1]]

    def written_over(self, v: int) -> IntArray:
        return self.over_idx[self.over_ptr[v] : self.over_ptr[v + 1]]

    def positions(self, k: int) -> IntArray:
        return self.pos_idx[self.pos_ptr[k] : self.pos_ptr[k + 1]]


def graph_arrays(graph: CostGraph) -> GraphArrays:
    """Flatten ``graph``."""
    inputs = [
        sorted({k for k in op.inputs if graph.storages[k].producer is not None})
        for op in graph.operators
    ]
    positions: list[list[int]] = [
        [] if s.producer is None else [s.producer] for s in graph.storages
    ]
    for v, ks in enumerate(inputs):
        for k in ks:
            positions[k].append(v)
    in_ptr, in_idx = _csr(inputs)
    out_ptr, out_idx = _csr([op.outputs for op in graph.operators])
    pos_ptr, pos_idx = _csr(positions)
    over = [[old for old, _, _ in op.rewrites] for op in graph.operators]
    over_ptr, over_idx = _csr(over)
    return GraphArrays(
        in_ptr=in_ptr,
        in_idx=in_idx,
        out_ptr=out_ptr,
        out_idx=out_idx,
        pos_ptr=pos_ptr,
        pos_idx=pos_idx,
        size=_ints(s.size_bytes for s in graph.storages),
        producer=_ints(-1 if s.producer is None else s.producer for s in graph.storages),
        kept=_ints(s.kept for s in graph.storages).astype(np.uint8),
        cost=_ints(op.cost_ns for op in graph.operators),
        workspace=_ints(
            op.workspace_bytes - sum(graph.storages[k].size_bytes for k in ks)
            for op, ks in zip(graph.operators, over, strict=True)
        ),
        over_ptr=over_ptr,
        over_idx=over_idx,
        over_ns=_ints(ns for op in graph.operators for _, _, ns in op.rewrites),
        pinned=_ints(op.pinned is not None for op in graph.operators).astype(np.uint8),
        ordered=_ints(op.ordered for op in graph.operators).astype(np.uint8),
        resident_bytes=graph.resident_bytes,
        loss=next((v for v, op in enumerate(graph.operators) if op.phase == "loss"), -1),
    )


def _ints(values: Iterable[int]) -> IntArray:
    return np.fromiter((int(x) for x in values), dtype=np.int64)


def _csr(rows: Sequence[Sequence[int]]) -> tuple[IntArray, IntArray]:
    ptr = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=ptr[1:])
    return ptr, _ints(x for row in rows for x in row)
