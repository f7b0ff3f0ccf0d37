"""Which kernels Inductor may join, and which results it has to store: as a graph's nodes say.

Imported when it is asked for, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .compiler import inductor_config, largest
from .replacing import Place

_KEY = "remat_kernel"  # in a node's meta
_FREED = "remat_freed"  # likewise, of an input that nobody else holds


class JoinOnce(Protocol):
    """Decides for one lowering, and remembers what it allowed."""

    def __call__(self, runs: Collection[int], num_bytes: int) -> bool:
        """Whether kernels of these runs, which touch so many bytes, may become one."""


class FusionRules(Protocol):
    """What may be joined."""

    def for_one_lowering(self) -> JoinOnce:
        """A judge that has allowed nothing so far."""

    def may_share_a_call(self, runs: Collection[int]) -> bool:
        """Whether kernels of these runs may be one function, which frees memory at its end."""


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


def put_freed(placeholder: Any) -> None:
    """Say that an input of a graph is freed at its last use, as what forward saves is; 2.11+."""
    placeholder.meta[_FREED] = True


def told(node: Any) -> tuple[int, bool, bool, int] | None:
    """What a node says, for comparison; ``None`` for nothing; 2.11+.

    Its run, whether it is stored, whether it is freed, and a hash of its rules.
    """
    place = node.meta.get(_KEY)
    if place is None:
        return (-1, False, True, 0) if _FREED in node.meta else None
    return place.run, place.stored, _FREED in node.meta, hash(place.rules)


@contextmanager
def fusing_as_told() -> Iterator[None]:
    """``V.set_choices_handler``, three methods of ``GraphLowering``: places are obeyed; 2.11+.

    In graphs of which nodes have places, a buffer is freed after its last use, and not kept for
    another one; calls of different runs are replaced by one (``mm`` and ``add`` by ``addmm``) only
    where the rules allow it (``pattern_matcher.is_match``), because the first then waits for the
    last; an input that a convolution reads is copied to its layout for that call only,
    where Inductor would hand the copy to backward in the input's place; and on the CPU a kernel
    goes into the function of those before it (``CppScheduling.codegen_node``) only where the rules
    allow it. Graphs without places are lowered as ever.
    """
    from torch._inductor import graph, ir, pattern_matcher
    from torch._inductor.choices import InductorChoices
    from torch._inductor.codegen.cpp import CppScheduling
    from torch._inductor.virtualized import V

    given = V.choices
    run_node, codegen = graph.GraphLowering.run_node, graph.GraphLowering.codegen
    is_match, write_kernel = pattern_matcher.is_match, CppScheduling.codegen_node
    preferring = graph.GraphLowering.find_nodes_prefer_channels_last

    class AsTold(type(given)):  # type: ignore[misc]
        """Inductor's own choices, less what the rules forbid."""

        def __init__(self) -> None:
            self.__dict__.update(vars(given))
            self._judged: tuple[Any, JoinOnce, _Touched] | None = None

        def can_fuse(self, scheduler: Any, node1: Any, node2: Any, score: int) -> bool:
            known = _places(node1, node2)
            if not given.can_fuse(scheduler, node1, node2, score):
                return False
            runs = {place.run for place in known}
            if len(runs) <= 1:
                return True
            if self._judged is None or self._judged[0] is not scheduler:
                touched = _Touched(scheduler.name_to_buf, _freed_inputs(V.graph))
                self._judged = scheduler, known[0].rules.for_one_lowering(), touched
            _, may_join, touched = self._judged
            return may_join(runs, touched.num_bytes(node1, node2))

    def matching_as_told(match: Any) -> bool:
        if not is_match(match):
            return False
        known = [n.meta[_KEY] for n in match.nodes if _KEY in n.meta]
        runs = {place.run for place in known}
        if len(runs) <= 1:
            return True
        return known[0].rules.for_one_lowering()(runs, _read_bytes(match.nodes))

    def storing(lowering: Any, node: Any) -> Any:
        made = run_node(lowering, node)
        place = node.meta.get(_KEY)
        if place is not None and place.stored and isinstance(made, ir.TensorBox):
            made.realize()
        return made

    def preferring_inputs_as_they_are(lowering: Any) -> Any:
        found = preferring(lowering)
        if _has_places(lowering):
            for node in lowering.module.graph.find_nodes(op="placeholder"):
                found.discard(node)
        return found

    def freeing(lowering: Any) -> Any:
        if not _has_places(lowering):
            return codegen(lowering)
        with inductor_config().patch(allow_buffer_reuse=False):
            return codegen(lowering)

    def writing_as_told(scheduling: Any, node: Any) -> Any:
        written = scheduling.kernel_group.scheduled_nodes
        places = _places(*written, node)
        runs = {place.run for place in places}
        if written and runs and not places[0].rules.may_share_a_call(runs):
            scheduler = scheduling.scheduler
            scheduler.buffer_names_to_free.difference_update(node.last_usage)  # not yet
            scheduler.flush()
            scheduler.buffer_names_to_free.update(node.last_usage)
        return write_kernel(scheduling, node)

    assert isinstance(given, InductorChoices)
    with ExitStack() as stack:
        stack.enter_context(V.set_choices_handler(AsTold()))
        stack.enter_context(Place(pattern_matcher, "is_match").holding(matching_as_told))
        stack.enter_context(Place(graph.GraphLowering, "run_node").holding(storing))
        stack.enter_context(Place(graph.GraphLowering, "codegen").holding(freeing))
        stack.enter_context(Place(CppScheduling, "codegen_node").holding(writing_as_told))
        stack.enter_context(
            Place(graph.GraphLowering, "find_nodes_prefer_channels_last").holding(
                preferring_inputs_as_they_are
            )
        )
        yield


def _has_places(lowering: Any) -> bool:
    return any(_KEY in node.meta for node in lowering.module.graph.nodes)


def _places(*nodes: Any) -> list[KernelPlace]:
    found = [_place(part) for node in nodes for part in node.get_nodes()]
    return [place for place in found if place is not None]


def _place(node: Any) -> KernelPlace | None:
    """The last place among those whose calls went into a kernel."""
    origin = getattr(node.node, "origin_node", None)
    origins = [origin] if origin is not None and _KEY in origin.meta else node.node.origins
    places = [o.meta[_KEY] for o in origins if _KEY in o.meta]
    return max(places, key=lambda place: place.run, default=None)


def _freed_inputs(lowering: Any) -> set[str]:
    found = lowering.module.graph.find_nodes(op="placeholder")
    return {str(node.target) for node in found if _FREED in node.meta}


class _Touched:
    """What kernels read or write of a graph's buffers, and of the inputs that are freed.

    Pairs of the same kernels are asked for again and again, so each kernel is looked at once.
    """

    def __init__(self, *counted: Collection[str]) -> None:
        self._counted = counted
        self._known: dict[Any, tuple[Any, dict[str, int]]] = {}  # by kernel, for its accesses

    def num_bytes(self, *nodes: Any) -> int:
        """Bytes that any of the nodes touches."""
        touched: dict[str, int] = {}
        for node in nodes:
            touched |= self._of(node)
        return sum(touched.values())

    def _of(self, node: Any) -> dict[str, int]:
        accesses = node.read_writes  # another object once they change
        known, touched = self._known.get(node, (None, {}))
        if known is not accesses:
            touched = {
                dep.name: dep.numbytes_hint()
                for dep in (*accesses.reads, *accesses.writes)
                if any(dep.name in names for names in self._counted)
            }
            self._known[node] = accesses, touched
        return touched


def _read_bytes(nodes: Sequence[Any]) -> int:
    """Bytes of what calls read and others of the graph made, by the sample's sizes."""
    read = {n for node in nodes for n in node.all_input_nodes} - set(nodes)
    made = [n.meta.get("val") for n in read if n.op == "call_function" or _FREED in n.meta]
    tensors = [value for value in made if isinstance(value, torch.Tensor)]
    return sum(largest(tensor.numel()) * tensor.itemsize for tensor in tensors)


__all__ = ["KernelPlace", "fusing_as_told", "put", "put_freed", "told"]
