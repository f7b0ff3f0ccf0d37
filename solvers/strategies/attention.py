"""Selective recomputation of the attention core.

Korthikanti et al., *Reducing Activation Recomputation in Large Transformer Models*
(arXiv:2205.05198), Section 5: of each layer only the part between queries, keys and
values and the context is recomputed: the product to scores, scale and mask, softmax,
dropout, the product with the values. It holds the large storages (they grow with
the square of the sequence) and costs little.

A core is found from its softmax: what lies between it and the batched matrix product
before, and the one behind. What only prepares the core's arguments (scaled or
contiguous copies of queries and keys, masks made for the call, dropout masks)
joins it where no more bytes are saved for that. The whole core is run again,
context product included, as Megatron-LM's checkpointing is reentrant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from graph_capture.cost_graph import CostGraph

from ..schedule import Schedule
from ..uniform import turning_point
from .policies import FUSED_ATTENTION, calls_of, is_matrix_product
from .runs import Runs
from .segments import schedule_for_segments
from .strategy import Candidate, Strategy, StrategyError, StrategyOptions

SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
BATCHED_PRODUCTS = frozenset({"bmm", "baddbmm", "matmul", "einsum"})


def megatron_selective(graph: CostGraph) -> Schedule:
    """Recompute only the attention cores, each in one go."""
    return schedule_for_segments(graph, attention_cores(graph), early_stop=False)


def attention_cores(graph: CostGraph) -> list[list[int]]:
    """Return the operators of each attention core, in base order.

    Raises
    ------
    StrategyError
        When there is none; it says whether attention is fused.
    """
    cores = _Cores(graph).found()
    if cores:
        return cores
    if any(
        name.startswith(FUSED_ATTENTION)
        for op in graph.operators[: turning_point(graph)]
        for name in calls_of(op)
    ):
        raise StrategyError(
            "no attention core: attention is fused, and its kernel recomputes the scores itself"
        )
    raise StrategyError("no attention core: no softmax between two batched matrix products")


class _Cores:
    def __init__(self, graph: CostGraph) -> None:
        self.graph = graph
        self.turn = turning_point(graph)
        self.runs = Runs(graph)
        self.calls = [set(calls_of(op)) for op in graph.operators]
        self.readers = [
            [u for u in graph.consumers[k] if u < self.turn] for k in range(len(graph.storages))
        ]

    def found(self) -> list[list[int]]:
        cores: list[list[int]] = []
        taken: set[int] = set()
        for v in range(self.turn):
            if not self.calls[v] & SOFTMAX or v in taken:
                continue
            before, behind = self._toward_scores(v), self._toward_context(v)
            if before and behind:
                core = self._with_feeders(before | behind) - taken
                taken |= core
                cores.append(sorted(core))
        return cores

    def _toward_scores(self, v: int) -> set[int]:
        """From the batched products before ``v`` to ``v``; empty when there are none."""
        if self.calls[v] & BATCHED_PRODUCTS:
            return {v}
        return self._between(v, self._makers)

    def _toward_context(self, v: int) -> set[int]:
        """From ``v`` to the batched products behind it; empty when there are none."""
        return self._between(v, self._users)

    def _makers(self, v: int) -> list[int]:
        return [self.runs.producer(k) for k in self.runs.inputs[v]]

    def _users(self, v: int) -> list[int]:
        return [u for k in self.graph.operators[v].outputs for u in self.readers[k]]

    def _between(self, v: int, neighbours: Callable[[int], list[int]]) -> set[int]:
        """All on a way from ``v`` to a batched product that crosses no other matrix product."""
        came_from: dict[int, set[int]] = {v: set()}
        products: list[int] = []
        stack = [v]
        while stack:
            at = stack.pop()
            for u in neighbours(at):
                is_product = bool(self.calls[u] & BATCHED_PRODUCTS)
                passable = not is_matrix_product(self.graph.operators[u]) and self._may_rerun(u)
                if not (is_product or passable):
                    continue
                if u not in came_from:
                    came_from[u] = set()
                    (products if is_product else stack).append(u)
                came_from[u].add(at)
        ways: set[int] = set()
        stack = products
        while stack:
            at = stack.pop()
            if at not in ways:
                ways.add(at)
                stack.extend(came_from[at])
        return ways

    def _with_feeders(self, core: set[int]) -> set[int]:
        """Add what prepares the core's arguments, where that saves no more bytes."""
        while True:
            arguments = self._arguments(core)
            for u in sorted({self.runs.producer(k) for k in arguments}, reverse=True):
                if self._feeds_only(u, core):
                    more = self._arguments(core | {u})
                    if self._bytes(more) <= self._bytes(arguments):
                        core = core | {u}
                        break
            else:
                return core

    def _feeds_only(self, u: int, core: set[int]) -> bool:
        op = self.graph.operators[u]
        return (
            u < self.turn
            and not is_matrix_product(op)
            and self._may_rerun(u)
            and all(reader in core for k in op.outputs for reader in self.readers[k])
        )

    def _arguments(self, core: set[int]) -> set[int]:
        """Return what the core reads from outside, which would have to be saved for it."""
        return {
            k
            for v in core
            for k in self.runs.inputs[v]
            if k not in self.runs.fixed and self.runs.producer(k) not in core
        }

    def _bytes(self, storages: set[int]) -> int:
        return sum(self.graph.storages[k].size_bytes for k in storages)

    def _may_rerun(self, v: int) -> bool:
        return self.graph.operators[v].pinned is None


def _propose(graph: CostGraph, options: StrategyOptions) -> Iterator[Candidate]:
    num_cores = len(attention_cores(graph))
    yield Candidate(schedule=megatron_selective(graph), setting=f"cores={num_cores}")


MEGATRON_SELECTIVE = Strategy(
    name="megatron_selective",
    summary="everything saved but the attention core (scores, softmax, dropout), recomputed",
    source="Korthikanti et al., arXiv:2205.05198, Section 5; Megatron-LM selective",
    propose=_propose,
)
