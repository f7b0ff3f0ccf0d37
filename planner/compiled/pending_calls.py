"""Calls of compiled graphs that wait for their backward pass, and what they hold.

One compiled graph may run several times in a step: Dynamo takes the same code for layers that
look the same, and a loop may call a model twice before ``backward()``. What runs as plain Python
between two graphs holds memory, too. None of this is known when a graph is planned. So each call
is compared with its plan before it runs: with what calls that wait hold now, found through
autograd's nodes and told apart by the identity of memory. A call with which the step would be
above its budget is refused.

What is compared once for a sequence of calls is not compared again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from graph_capture.calls.storage_id import storage_id
from graph_capture.costs.allocator import block_bytes
from graph_capture.private_torch.autograd import held_by, holds_anything, keeps_graph
from graph_capture.units import format_bytes

from ..errors import PlanError
from .loop_warnings import LoopWarnings
from .unplanned_calls import by_plan


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedGraph:
    """What a plan rests on, as far as other calls are concerned.

    Parameters
    ----------
    device
        Whose memory is counted.
    peak_bytes
        The predicted one.
    others_bytes
        What the plan counts of other graphs of the step, ``later_bytes`` included.
    usable_bytes
        The budget without its headroom.
    saved_bytes
        What its forward makes that is there until its backward.
    output_bytes
        Its results, where the loss is one of them: the caller has them until the step ends.
    accumulates
        Whether parameters have gradients when a step begins.
    has_loss
        Whether the loss is computed in this graph, so that ``later_bytes`` is not counted.
    has_more
        Whether it has other results beside it that a loop can differentiate.
    resident_bytes, later_bytes
        As the user said.
    """

    device: torch.device
    peak_bytes: int
    others_bytes: int
    usable_bytes: int
    saved_bytes: int
    output_bytes: int
    accumulates: bool
    has_loss: bool
    has_more: bool
    resident_bytes: int
    later_bytes: int

    def check(self, held_bytes: int, *, later: bool) -> None:
        """Refuse a step in which other calls hold more than the plan leaves.

        Parameters
        ----------
        later
            Whether calls after this one hold it, while its backward pass runs.
        """
        more_bytes = held_bytes - self.others_bytes
        over_bytes = self.peak_bytes + more_bytes - self.usable_bytes
        if over_bytes <= 0:
            return
        option, counted = "later_bytes", self.later_bytes + more_bytes
        if self.has_loss:
            option, counted = "resident_bytes", self.resident_bytes + more_bytes
        raise PlanError(
            f"other calls of compiled graphs hold {format_bytes(held_bytes)} while "
            f"{'the backward pass of a graph' if later else 'a graph'} runs, and its plan counts "
            f"{format_bytes(max(0, self.others_bytes))}: the step is {format_bytes(over_bytes)} "
            f"above its budget of {format_bytes(self.usable_bytes)}. A graph runs several times "
            "before its backward pass (layers of one code, or several calls before backward()), or "
            "plain Python between graphs holds memory. Let the plans count layers that are "
            "compiled each by itself by the option calls, how many there are; by "
            f"{option}={counted} anything else (if nothing fits with it, less may do); call "
            "backward() after each call; or compile without breaks (fullgraph=True shows them)"
        )


class PendingCalls:
    """The calls of one ``torch.compile``, in order, without those whose backward pass has run."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._compared: set[tuple[object, ...]] = set()
        self._loop = LoopWarnings()

    def held_bytes(
        self, inputs: Sequence[Tensor], device: torch.device, *, accumulates: bool
    ) -> int:
        """What is there for the backward passes of earlier calls, beside given tensors.

        Parameters
        ----------
        accumulates
            Whether parameters have gradients, too.
        """
        self._forget_those_that_ran()
        there, own = [*self._held(), *self._between(inputs)], _Memory(device, inputs)
        held_bytes = _Memory(device, there).bytes_without(own)
        if accumulates:
            held_bytes += _Memory(device, _with_gradients(there)).bytes_without(own)
        return held_bytes

    @property
    def num_waiting(self) -> int:
        """How many calls there are whose backward pass has not run."""
        self._forget_those_that_ran()
        return len(self._calls)

    def watched(self, graph: PlannedGraph, function: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled function of a graph, each call of which is compared with the plan."""
        run_by_plan = by_plan(function)

        def run(*inputs: Any) -> Any:
            if not torch.is_grad_enabled():
                return function(*inputs)
            tensors = [t for t in inputs if isinstance(t, Tensor)]
            self._forget_those_that_ran()
            key = (graph, *(t.numel() for t in tensors if not (t.requires_grad and t.is_leaf)))
            keys = (*(call.key for call in self._calls), key)
            if keys not in self._compared:
                self._compare(graph, tensors)
                self._compared.add(keys)
            if not graph.accumulates:
                self._look_at_gradients(graph, tensors)
            results = run_by_plan(*inputs)
            node = self._new_node(results)
            if node is not None:
                node.register_prehook(partial(self._look_at, graph))
                self._calls.append(_Call.of(graph, key, node, tensors, results))
            return results

        return run

    def _look_at(self, graph: PlannedGraph, gradients: Sequence[Tensor | None]) -> None:
        """Before a backward pass, when zeros for results that nobody used are not made yet."""
        if graph.has_more:
            self._loop.of_another_loss(gradients)
        if keeps_graph():
            self._loop.of_retained(graph.saved_bytes, graph.peak_bytes, graph.usable_bytes)

    def _look_at_gradients(self, graph: PlannedGraph, inputs: Sequence[Tensor]) -> None:
        there = [t.grad for t in _with_gradients(inputs) if t.grad is not None]
        if there:
            held_bytes = sum(_Memory(graph.device, there).sizes.values())
            self._loop.of_gradients(held_bytes, graph.peak_bytes, graph.usable_bytes)

    def _compare(self, graph: PlannedGraph, inputs: Sequence[Tensor]) -> None:
        held_bytes = self.held_bytes(inputs, graph.device, accumulates=graph.accumulates)
        graph.check(held_bytes, later=False)
        later_leaves: list[Tensor] = [*_leaves(inputs), *_leaves(self._between(inputs))]
        for i in reversed(range(len(self._calls))):
            call = self._calls[i]
            earlier, device = self._calls[:i], call.graph.device
            own = _Memory(device, call.inputs)
            before = _Memory(device, [t for c in earlier for t in (*c.held, *self._before(c))])
            before.add(self._before(call))
            held_bytes = before.bytes_without(own)
            held_bytes += _Memory(device, later_leaves).bytes_without(own, before)
            given = _Memory(device, _with_gradients(later_leaves))
            held_bytes += given.bytes_without(*([own] if call.graph.accumulates else []))
            call.graph.check(held_bytes + graph.output_bytes, later=True)
            later_leaves += [*_leaves(call.inputs), *_leaves(self._before(call))]

    def _held(self) -> list[Tensor]:
        return [t for call in self._calls for t in (*call.held, *self._before(call))]

    def _before(self, call: _Call) -> list[Tensor]:
        """What plain Python holds whose results a call took."""
        node = call.node()
        return [] if node is None else self._saved_from(n for n, _ in node.next_functions)

    def _between(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What plain Python holds from which given tensors were computed."""
        return self._saved_from(t.grad_fn for t in inputs)

    def _saved_from(self, nodes: Iterable[Any]) -> list[Tensor]:
        ours = [call.node() for call in self._calls]
        found: list[Tensor] = []
        seen, open_nodes = set(ours), list(nodes)
        while open_nodes:
            node = open_nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                found += held_by(node)
                open_nodes += [n for n, _ in node.next_functions]
        return found

    def _new_node(self, results: Any) -> Any:
        """The node of a call that just ran: the only one of a compiled function not known yet."""
        known = {call.node() for call in self._calls}
        results = results if isinstance(results, (tuple, list)) else [results]
        open_nodes = [t.grad_fn for t in results if isinstance(t, Tensor)]
        for node in open_nodes:
            if type(node).__name__ == "CompiledFunctionBackward":
                if node not in known:
                    return node
            elif node is not None:  # a view of a result
                open_nodes += [n for n, _ in node.next_functions]
        return None

    def _forget_those_that_ran(self) -> None:
        if self._calls:
            self._calls = [call for call in self._calls if call.waits]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """A call whose backward pass may be to come; it keeps nothing alive."""

    graph: PlannedGraph
    key: tuple[object, ...]
    node: Callable[[], Any]
    given: tuple[weakref.ref[Tensor], ...]
    made: tuple[weakref.ref[Tensor], ...]

    @classmethod
    def of(
        cls,
        graph: PlannedGraph,
        key: tuple[object, ...],
        node: Any,
        inputs: Sequence[Tensor],
        results: Iterable[Any],
    ) -> _Call:
        return cls(
            graph=graph,
            key=key,
            node=weakref.ref(node),
            given=tuple(map(weakref.ref, inputs)),
            made=tuple(weakref.ref(t) for t in results if isinstance(t, Tensor)),
        )

    @property
    def waits(self) -> bool:
        node = self.node()
        return node is not None and holds_anything(node)

    @property
    def inputs(self) -> list[Tensor]:
        return _alive(self.given)

    @property
    def held(self) -> list[Tensor]:
        node = self.node()
        return [*self.inputs, *_alive(self.made), *([] if node is None else held_by(node))]


class _Memory:
    """Distinct memory of tensors on a device, in bytes as the allocator hands them out."""

    def __init__(self, device: torch.device, tensors: Iterable[Tensor]) -> None:
        self._device = device
        self._sizes: dict[int, int] = {}
        self.add(tensors)

    def add(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor.device == self._device and tensor.layout == torch.strided:
                size_bytes = block_bytes(tensor.untyped_storage().nbytes(), self._device.type)
                self._sizes[storage_id(tensor)] = size_bytes

    @property
    def sizes(self) -> Mapping[int, int]:
        return self._sizes

    def bytes_without(self, *others: _Memory) -> int:
        return sum(
            size_bytes
            for memory, size_bytes in self._sizes.items()
            if not any(memory in other.sizes for other in others)
        )


def _alive(refs: Iterable[weakref.ref[Tensor]]) -> list[Tensor]:
    """The tensors that are still there, as ``TensorWeakRef`` hands them out.

    That is slower to make than a plain reference, which each call makes for each of its inputs.
    """
    found = (TensorWeakRef(t)() for ref in refs if (t := ref()) is not None)
    return [t for t in found if t is not None]


def _leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t for t in tensors if t.is_leaf]


def _with_gradients(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t for t in tensors if t.is_leaf and t.requires_grad]


__all__ = ["PendingCalls", "PlannedGraph"]
