"""Find the blocks of a model: the "layers" that people checkpoint.

Modules that repeat are children of one container and have numbers for names
(``transformer.h.0``, ``encoder.layer.3``, ``layer2.1``), and every operator knows
the path of its module. Of nested containers the outermost is taken, with one
exception: where its children hold little else than a container of their own, whose
children are alike and feed each other, those are the blocks (the stages of a
ResNet hold its blocks; the sublayers of a T5 block are not alike, and the experts
of a mixture do not feed each other).

A graph without such paths (an instance of another paper, a model that is not a stack)
is cut where its chain can be cut (``chains/chain.py``), or, where it has none either,
behind every operator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from graph_capture.cost_graph import CostGraph

from ..arrays import graph_arrays
from ..chains.chain import find_chain
from ..uniform import turning_point
from .strategy import StrategyError

Origin = Literal["module paths", "chain", "operators"]

ALIKE = 0.5
"""Overlap of the calls of two neighbours from which on they count as alike."""
LITTLE_ELSE = 0.75
"""Share of a child's operators that lie in a container of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A stretch of the forward pass: operators ``begin … end - 1``."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Blocks in forward order; they do not overlap.

    Parameters
    ----------
    origin
        Where the blocks come from. Blocks from module paths leave out what lies
        between, before and behind them (embeddings, head, loss); blocks from elsewhere
        cover the whole forward pass.
    """

    blocks: tuple[Block, ...]
    origin: Origin

    def __len__(self) -> int:
        return len(self.blocks)

    def groups(self, size: int) -> list[range]:
        """Group blocks into segments of ``size``; the last one may be smaller.

        What lies between the blocks of a group belongs to it.
        """
        if size < 1:
            raise StrategyError(f"a segment has at least one block, not {size}")
        return [
            range(group[0].begin, group[-1].end)
            for group in (self.blocks[i : i + size] for i in range(0, len(self), size))
        ]


def find_blocks(graph: CostGraph) -> Blocks:
    """Find blocks by module paths, else by the chain, else take the operators themselves.

    Raises
    ------
    StrategyError
        When the forward pass has fewer than two operators.
    """
    by_path = _by_path(graph)
    if by_path:
        return Blocks(blocks=by_path, origin="module paths")
    turn = turning_point(graph)
    if turn < 2:
        raise StrategyError(f"{turn} forward operators: there is nothing to divide into segments")
    chain = find_chain(graph_arrays(graph), turn)
    cuts: Sequence[int] = range(turn + 1) if chain is None else chain.cuts
    blocks = tuple(
        Block(name=f"{begin}:{end}", begin=begin, end=end) for begin, end in pairwise(cuts)
    )
    return Blocks(blocks=blocks, origin="operators" if chain is None else "chain")


def module_blocks(graph: CostGraph) -> Blocks:
    """Find blocks by module paths.

    Raises
    ------
    StrategyError
        When there are none.
    """
    by_path = _by_path(graph)
    if not by_path:
        raise StrategyError(
            "no repeated blocks: no two numbered children of one module have forward operators"
        )
    return Blocks(blocks=by_path, origin="module paths")


def _by_path(graph: CostGraph) -> tuple[Block, ...]:
    forward = range(turning_point(graph))
    parts = {v: tuple(graph.operators[v].module_path.split(".")) for v in forward}
    children = _Paths(graph, parts).chosen(list(forward))
    owner = {v: name for name, operators in children for v in operators}
    blocks: list[Block] = []
    for v in sorted(owner):
        if blocks and blocks[-1].name == owner[v]:
            blocks[-1] = Block(name=owner[v], begin=blocks[-1].begin, end=v + 1)
        else:  # a module that is called again is another block
            blocks.append(Block(name=owner[v], begin=v, end=v + 1))
    return tuple(blocks) if len(blocks) > 1 else ()


class _Paths:
    """Chooses among nested containers."""

    def __init__(self, graph: CostGraph, parts: dict[int, tuple[str, ...]]) -> None:
        self.graph, self.parts = graph, parts

    def chosen(self, operators: list[int]) -> list[tuple[str, list[int]]]:
        """The blocks among ``operators``."""
        result = []
        for container in self.containers(operators, 0).values():
            nested = [self.inner(child, name) for name, child in container.items()]
            if all(nested):
                result += [block for blocks in nested for block in blocks]
            elif len(container) > 1 or self.num_modules(next(iter(container.values()))) > 1:
                result += list(container.items())  # a lone module (a head's linear) is not a block
        return result

    def containers(self, operators: list[int], depth: int) -> dict[str, dict[str, list[int]]]:
        """Outermost containers below ``depth``: by path, their children by path."""
        found: dict[str, dict[str, list[int]]] = {}
        for v in operators:
            parts = self.parts[v]
            at = next((i for i in range(depth, len(parts)) if parts[i].isdigit()), None)
            if at is not None:
                container = found.setdefault(".".join(parts[:at]), {})
                container.setdefault(".".join(parts[: at + 1]), []).append(v)
        return found

    def inner(self, operators: list[int], name: str) -> list[tuple[str, list[int]]]:
        """Blocks within a child that holds little else than them; none otherwise."""
        containers = self.containers(operators, _depth(name))
        largest = max(containers.values(), key=lambda c: sum(map(len, c.values())), default={})
        children = list(largest.values())
        if len(children) < 2 or sum(map(len, children)) < LITTLE_ELSE * len(operators):
            return []
        pairs = list(pairwise(children))
        if not all(self.overlap(a, b) >= ALIKE and self.feeds(a, b) for a, b in pairs):
            return []
        return list(largest.items())

    def num_modules(self, operators: list[int]) -> int:
        return len({self.parts[v] for v in operators})

    def overlap(self, a: list[int], b: list[int]) -> float:
        """Share of calls that two children have in common."""
        calls_a = Counter(self.graph.operators[v].target for v in a)
        calls_b = Counter(self.graph.operators[v].target for v in b)
        return (calls_a & calls_b).total() / (calls_a | calls_b).total()

    def feeds(self, a: list[int], b: list[int]) -> bool:
        """Whether ``b`` reads what ``a`` makes."""
        made = {k for v in a for k in self.graph.operators[v].outputs}
        return any(not made.isdisjoint(self.graph.operators[v].inputs) for v in b)


def _depth(name: str) -> int:
    return name.count(".") + 1
