"""One block of a chain as a small cost graph of its own.

The small graph holds an operator that hands in the block's boundary, the
block's forward part, then one operator that stands for everything between the
block's forward and backward parts, then its backward part. That middle operator
reads what the next block needs and hands in the gradients. What is alive across
it, and read after it, is what the block saves.

What is held at that moment under every plan is not counted inside. It is counted from
outside, by base position: kept storages, storages that the chain holds, and backward
storages between their production and their last use. Of these, the ones that die within
the block's backward part are counted inside, from the middle on.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np

from graph_capture.cost_graph import CostGraph, Operator, Storage

from ..arrays import GraphArrays, IntArray, graph_arrays
from .chain import Chain

MIDDLE = -1
"""In ``Block.operators``: the stand-in for all that runs between forward and backward."""
OWNER = -2
"""In ``Block.operators``: what hands in the boundary; it runs before everything else."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block's small graph; indices without a note are those of the small graph.

    Parameters
    ----------
    arrays
        The small graph.
    operators
        For each operator its index in the whole graph, or :data:`MIDDLE`, :data:`OWNER`.
    passed_on
        Storages of the next block's boundary.
    filler
        A storage of no bytes that is born in the middle and lives to the end;
        with bytes it lowers the budget of the backward part alone.
    outside_bytes
        What is held during the backward part and not counted inside.
    """

    arrays: GraphArrays
    operators: tuple[int, ...]
    passed_on: tuple[int, ...]
    filler: int
    outside_bytes: int

    @property
    def middle(self) -> int:
        return self.operators.index(MIDDLE)

    def key(self) -> Hashable:
        """Equal for blocks with equal small graphs: their menus are the same."""
        a = self.arrays
        parts = (a.in_ptr, a.in_idx, a.out_ptr, a.out_idx, a.size, a.kept, a.cost)
        return (*(part.tobytes() for part in (*parts, a.workspace, a.pinned)), self.passed_on)


class Held:
    """Bytes held at each base position under every plan, without resident ones."""

    def __init__(self, g: GraphArrays, chain: Chain) -> None:
        num = g.num_operators
        self.g = g
        self.last = np.full(g.num_storages, -1, dtype=np.int64)
        """Last base position at which a held storage is needed; -1 when it is not held."""
        delta = np.zeros(num + 1, dtype=np.int64)
        for k in range(g.num_storages):
            made = int(g.producer[k])
            if made < 0 or not (k in chain.held or g.kept[k] or made >= chain.turn):
                continue
            uses = g.positions(k)
            self.last[k] = num - 1 if g.kept[k] else int(uses[-1])
            if len(uses) > 1 and uses[1] < chain.turn:
                # A forward operator that reads it may run again in its block's backward part.
                reader = int(np.searchsorted(chain.cuts, uses[1], side="right")) - 1
                self.last[k] = max(self.last[k], chain.ends[reader] - 1)
            delta[made] += g.size[k]
            delta[self.last[k] + 1] -= g.size[k]
        self.bytes_at = np.cumsum(delta)[:num]

    def entering(self, position: int, done_before: int) -> int:
        """Bytes made before ``position`` that are needed at ``done_before`` or later."""
        made_before = (self.g.producer >= 0) & (self.g.producer < position)
        return int(self.g.size[made_before & (self.last >= done_before)].sum())


def cut_out(graph: CostGraph, g: GraphArrays, chain: Chain, held: Held, i: int) -> Block:
    """Cut block ``i`` out of ``chain``."""
    return _Cutting(graph, g, chain, held, i).block()


class _Cutting:
    """The storages and operators of the small graph while it is built."""

    def __init__(self, graph: CostGraph, g: GraphArrays, chain: Chain, held: Held, i: int) -> None:
        self.graph, self.g, self.held = graph, g, held
        self.forward = range(chain.cuts[i], chain.cuts[i + 1])
        self.backward = range(chain.ends[i + 1], chain.ends[i])
        self.boundary = frozenset(chain.boundaries[i])
        is_last = i + 1 == chain.num_blocks
        self.next_boundary = () if is_last else chain.boundaries[i + 1]
        self.storages: list[Storage] = []
        self.operators: list[Operator] = []
        self.at: dict[int, int] = {}  # storage of the graph -> of the small graph

    def block(self) -> Block:
        for k in sorted(self.boundary):
            self.at[k] = self._storage(int(self.g.size[k]), kept=False)
        handed_in = tuple(range(len(self.storages)))
        self.operators.append(Operator(name="owner", outputs=handed_in, pinned="once"))
        for v in self.forward:
            made_here = [k for k in self.graph.operators[v].inputs if k in self.at]
            self._operator(v, made_here, self._forward_outputs(v))
        passed_on = tuple(sorted(self.at[k] for k in self.next_boundary if k in self.at))
        for k in [k for k in self.at if self.held.last[k] >= 0]:
            del self.at[k]  # from the middle on it is one of the storages handed in
        handed_in = self._held_inputs()
        filler = self._storage(0, kept=True)
        self.operators.append(
            Operator(name="middle", inputs=passed_on, outputs=(*handed_in, filler), pinned="once")
        )
        for v in self.backward:
            read = [k for k in self.graph.operators[v].inputs if k in self.at]
            self._operator(v, read, self._backward_outputs(v))
        small = CostGraph(tuple(self.operators), tuple(self.storages))
        return Block(
            arrays=graph_arrays(small),
            operators=(OWNER, *self.forward, MIDDLE, *self.backward),
            passed_on=passed_on,
            filler=filler,
            outside_bytes=(
                self.held.entering(self.backward.start, self.backward.stop - 1)
                if self.backward
                else 0
            ),
        )

    def _storage(self, size_bytes: int, *, kept: bool) -> int:
        k = len(self.storages)
        self.storages.append(
            Storage(name=f"{k}", size_bytes=size_bytes, producer=len(self.operators), kept=kept)
        )
        return k

    def _operator(self, v: int, inputs: Iterable[int], outputs: tuple[int, ...]) -> None:
        op = self.graph.operators[v]
        self.operators.append(
            Operator(
                name=f"{len(self.operators)}",
                inputs=tuple(sorted({self.at[k] for k in inputs})),
                outputs=outputs,
                cost_ns=op.cost_ns,
                workspace_bytes=op.workspace_bytes,
                pinned=op.pinned,
            )
        )

    def _forward_outputs(self, v: int) -> tuple[int, ...]:
        outputs = []
        for k in self.graph.operators[v].outputs:
            is_held = self.held.last[k] >= 0
            self.at[k] = self._storage(0 if is_held else int(self.g.size[k]), kept=is_held)
            outputs.append(self.at[k])
        return tuple(outputs)

    def _backward_outputs(self, v: int) -> tuple[int, ...]:
        outputs = []
        for k in self.graph.operators[v].outputs:
            lives_on = self.held.last[k] >= self.backward.stop
            self.at[k] = self._storage(int(self.g.size[k]), kept=lives_on)
            outputs.append(self.at[k])
        return tuple(outputs)

    def _held_inputs(self) -> tuple[int, ...]:
        """Return what the backward part reads of the storages held when it begins."""
        outputs = []
        for v in self.backward:
            for k in self.graph.operators[v].inputs:
                made = self.g.producer[k]
                if k in self.at or not 0 <= made < self.backward.start:
                    continue
                dies_inside = self.held.last[k] < self.backward.stop - 1
                self.at[k] = self._storage(int(self.g.size[k]) if dies_inside else 0, kept=False)
                outputs.append(self.at[k])
        return tuple(outputs)


def needed_runs(g: GraphArrays, runs: Iterable[int], wanted: Iterable[int]) -> tuple[int, ...]:
    """Return those of ``runs`` that ``wanted`` storages need; pinned and kept ones are
    available."""
    need = {k for k in wanted if not g.kept[k]}
    taken = []
    for v in reversed(list(runs)):
        makes = need.intersection(int(k) for k in g.outputs(v))
        if makes and not g.pinned[v]:
            taken.append(v)
            need -= makes
            need.update(int(k) for k in g.inputs(v) if not g.kept[k])
    return tuple(reversed(taken))


def sweep_peak(
    g: GraphArrays,
    size: IntArray,
    runs: Iterable[int],
    wanted: Iterable[int],
    carried: Iterable[int] = (),
) -> int:
    """Return the peak of runs that begin with ``carried`` alive and leave ``wanted`` behind.

    ``carried`` storages die at their last use; others that were made before the
    runs are not counted. ``size`` stands in for the graph's own sizes.
    """
    order = list(runs)
    last = dict.fromkeys(carried, -1)
    for step, v in enumerate(order):
        last.update((int(k), step) for k in (*g.inputs(v), *g.outputs(v)))
    last.update((k, len(order)) for k in wanted)
    freed = np.zeros(len(order) + 1, dtype=np.int64)
    for k in carried:
        freed[last[k]] += size[k]
    alive = peak = int(size[list(carried)].sum())
    for step, v in enumerate(order):
        for k in g.outputs(v):
            alive += int(size[k])
            freed[last[int(k)]] += size[k]
        peak = max(peak, alive + int(g.workspace[v]))
        alive -= int(freed[step])
    return peak
