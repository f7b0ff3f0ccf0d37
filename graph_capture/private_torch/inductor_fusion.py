"""Which kernels Inductor may join, and which results it has to store: as a graph's nodes say.

Imported when it is asked for, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from .compiler import inductor_config
from .replacing import Place

_KEY = "remat_kernel"  # in a node's meta


class JoinOnce(Protocol):
    """Decides for one lowering, and remembers what it allowed."""

    def __call__(self, runs: Collection[int], num_bytes: int) -> bool:
        """Whether kernels of these runs, which touch so many bytes, may become one."""


class FusionRules(Protocol):
    """What may be joined."""

    def for_one_lowering(self) -> JoinOnce:
        """A judge that has allowed nothing so far."""


@dataclass(frozen=True, slots=True)
class KernelPlace:
    """Where a node stands in the order that its graph was written for.

    Parameters
    ----------
    run
        Nodes of one run are to be one kernel, or calls of libraries.
    stored
        Whether the result needs memory of its own, even where loops could compute it again.
    rules
        Which runs may be joined nevertheless.
    """

    run: int
    stored: bool
    rules: FusionRules


def put(node: Any, place: KernelPlace) -> None:
    """Write a place into a node's ``meta``, which copies of its graph keep; 2.11+."""
    node.meta[_KEY] = place


@contextmanager
def fusing_as_told() -> Iterator[None]:
    """``V.set_choices_handler`` and two methods of ``GraphLowering``: places are obeyed; 2.11+.

    In graphs of which nodes have places, a buffer is freed after its last use, and not kept for
    another one. Graphs without places are lowered as ever.
    """
    from torch._inductor import graph, ir
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    given = V.choices
    run_node, codegen = graph.GraphLowering.run_node, graph.GraphLowering.codegen

    class AsTold(type(given)):  # type: ignore[misc]
        """Inductor's own choices, less what the rules forbid."""

        def __init__(self) -> None:
            self.__dict__.update(vars(given))
            self._judged: tuple[Any, JoinOnce] | None = None

        def can_fuse(self, scheduler: Any, node1: Any, node2: Any, score: int) -> bool:
            places = [_place(node) for one in (node1, node2) for node in one.get_nodes()]
            known = [place for place in places if place is not None]
            if not given.can_fuse(scheduler, node1, node2, score):
                return False
            runs = {place.run for place in known}
            if len(runs) <= 1:
                return True
            if self._judged is None or self._judged[0] is not scheduler:
                self._judged = scheduler, known[0].rules.for_one_lowering()
            return self._judged[1](runs, _touched_bytes(scheduler, node1, node2))

    def storing(lowering: Any, node: Any) -> Any:
        made = run_node(lowering, node)
        place = node.meta.get(_KEY)
        if place is not None and place.stored and isinstance(made, ir.TensorBox):
            made.realize()
        return made

    def freeing(lowering: Any) -> Any:
        if not any(_KEY in node.meta for node in lowering.module.graph.nodes):
            return codegen(lowering)
        with inductor_config().patch(allow_buffer_reuse=False):
            return codegen(lowering)

    assert isinstance(given, InductorChoices)
    with ExitStack() as stack:
        stack.enter_context(V.set_choices_handler(AsTold()))
        stack.enter_context(Place(graph.GraphLowering, "run_node").holding(storing))
        stack.enter_context(Place(graph.GraphLowering, "codegen").holding(freeing))
        yield


def _place(node: Any) -> KernelPlace | None:
    """The last place among those whose calls went into a kernel."""
    origin = getattr(node.node, "origin_node", None)
    origins = [origin] if origin is not None and _KEY in origin.meta else node.node.origins
    places = [o.meta[_KEY] for o in origins if _KEY in o.meta]
    return max(places, key=lambda place: place.run, default=None)


def _touched_bytes(scheduler: Any, *nodes: Any) -> int:
    """Bytes of the buffers that kernels read or write, the graph's inputs apart."""
    touched = {
        dep.name: dep.numbytes_hint()
        for node in nodes
        for dep in (*node.read_writes.reads, *node.read_writes.writes)
        if dep.name in scheduler.name_to_buf
    }
    return sum(touched.values())


__all__ = ["KernelPlace", "fusing_as_told", "put"]
