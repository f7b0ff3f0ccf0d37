"""Walk an autograd graph in Python, making the same calls as PyTorch's engine.

The engine asks the device for its current stream, so it cannot differentiate
tensors of an absent device. Its nodes can be called from Python. The rest of the
engine's work is done here, after ``torch/csrc/autograd/engine.cpp`` and
``input_buffer.cpp``: the order in which ready nodes run, the sums of gradients
that meet, and the reduction and cast of gradients to what was differentiated.

Known differences:

- hooks on nodes cannot be seen. Hooks put on tensors during tracing are refused
  (:func:`hooks_refused`);
- a node computes the gradients of all its inputs, while the engine skips those
  that lead to nothing requested. Calls whose result nobody reads are dropped
  later, but a call with several results has them all.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from ..errors import NotFittingError
from ..private_torch.autograd import current_node, input_metadata_of, sequence_number_of
from ..private_torch.modules import has_backward_hooks
from .eager_formulas import as_eager

_Gradients = tuple[torch.Tensor | None, ...]
Arrived = Callable[[int], None]
Wanted = torch.Tensor | GradientEdge
"""What a gradient is asked of; an edge holds no memory."""


class Differentiator(Protocol):
    """Computes gradients, by PyTorch's engine or by the walk in its place."""

    def grad(
        self,
        outputs: list[torch.Tensor],
        inputs: Sequence[Wanted],
        grad_outputs: Sequence[torch.Tensor | None] | None = None,
        *,
        arrived: Arrived | None = None,
    ) -> _Gradients:
        """Return the gradients of ``inputs``; ``None`` where nothing depends on one.

        ``outputs`` is emptied, so that what only they keep alive can be freed. ``arrived``
        is called with the index of a leaf among ``inputs`` when its gradient is complete.
        """

    def current_node(self) -> Any:
        """Return the node that is being differentiated, or ``None``."""


class Engine:
    """PyTorch's own engine."""

    def grad(
        self,
        outputs: list[torch.Tensor],
        inputs: Sequence[Wanted],
        grad_outputs: Sequence[torch.Tensor | None] | None = None,
        *,
        arrived: Arrived | None = None,
    ) -> _Gradients:
        """See :class:`Differentiator`."""
        listening = []
        if arrived is not None:
            listening = [
                leaf.register_hook(_telling(arrived, i))
                for i, leaf in enumerate(inputs)
                if isinstance(leaf, torch.Tensor)
            ]
        try:
            wanted: Any = list(inputs)
            return torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True)
        finally:
            outputs.clear()
            for handle in listening:
                handle.remove()

    def current_node(self) -> Any:
        """See :class:`Differentiator`."""
        return current_node()


def _telling(arrived: Arrived, i: int) -> Callable[[torch.Tensor], None]:
    def tell(_gradient: torch.Tensor) -> None:
        arrived(i)

    return tell


class _Place:
    """Stands for a node that may be freed already: knows its sequence number."""

    def __init__(self, number: int) -> None:
        self._number = number

    def _sequence_nr(self) -> int:
        return self._number


_ROOT = _Place(-1)  # hands out the first gradients


class BackwardWalk:
    """The engine, in Python."""

    def __init__(self) -> None:
        self._current: _Place | None = None
        self._without_zeros: list[Any] = []  # functions that want None for a missing gradient

    def current_node(self) -> Any:
        """See :class:`Differentiator`."""
        return self._current

    def grad(
        self,
        outputs: list[torch.Tensor],
        inputs: Sequence[Wanted],
        grad_outputs: Sequence[torch.Tensor | None] | None = None,
        *,
        create_graph: bool = False,
        arrived: Arrived | None = None,
    ) -> _Gradients:
        """See :class:`Differentiator`."""
        given = [None] * len(outputs) if grad_outputs is None else list(grad_outputs)
        first: list[torch.Tensor | None] = [
            torch.ones_like(t, memory_format=torch.preserve_format) if g is None else g
            for t, g in zip(outputs, given, strict=True)
        ]
        before = self._current
        self._current = _ROOT
        try:
            with torch.set_grad_enabled(create_graph):
                task = _Task(outputs, inputs, self, arrived)
                outputs.clear()
                return task.run(list(first))  # torch.autograd.grad also holds them meanwhile
        finally:
            self._current = before

    def enter(self, node: Any) -> None:
        """Record that ``node`` is now differentiated."""
        self._current = _Place(sequence_number_of(node))

    def wants_zeros(self, function: Any) -> bool:
        """Whether a Python function is given zeros for a missing gradient (the default)."""
        return all(function is not other for other in self._without_zeros)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While active, tracing notes what a walk could not see afterwards.

        ``torch.autograd.grad`` inside the model uses the walk, too.
        """
        contexts: Any = torch.autograd.function.FunctionCtx
        seen = contexts.set_materialize_grads
        own_grad = torch.autograd.grad

        def set_materialize_grads(ctx: Any, value: bool) -> None:
            seen(ctx, value)
            if not value:
                self._without_zeros.append(ctx)

        def grad(
            outputs: Any,
            inputs: Any,
            grad_outputs: Any = None,
            retain_graph: bool | None = None,
            create_graph: bool = False,
            allow_unused: bool | None = None,
            is_grads_batched: bool = False,
            materialize_grads: bool = False,
        ) -> _Gradients:
            if is_grads_batched or materialize_grads:
                raise NotFittingError(
                    "forward calls torch.autograd.grad with is_grads_batched or materialize_grads, "
                    "which cannot be captured for a CUDA device that is not present"
                )
            found = self.grad(
                _as_list(outputs),
                _as_list(inputs),
                None if grad_outputs is None else _as_list(grad_outputs),
                create_graph=create_graph,
            )
            if not allow_unused and any(g is None for g in found):
                raise RuntimeError(
                    "One of the differentiated Tensors appears to not have been used in the graph. "
                    "Set allow_unused=True if this is the desired behavior."
                )
            return found

        contexts.set_materialize_grads = set_materialize_grads
        torch.autograd.grad = grad  # type: ignore[assignment]
        try:
            with hooks_refused():
                yield
        finally:
            torch.autograd.grad = own_grad
            contexts.set_materialize_grads = seen


def refuse_backward_hooks(model: nn.Module) -> None:
    """Refuse a module with backward hooks, which a walk would not call.

    Raises
    ------
    NotFittingError
        Names the module.
    """
    for name, module in model.named_modules():
        if has_backward_hooks(module):
            raise NotFittingError(
                f"module {name!r} has backward hooks, which cannot be captured for a CUDA device "
                "that is not present; plan on the device, or without them"
            )


@contextmanager
def hooks_refused() -> Iterator[None]:
    """While active, registering a hook on a tensor raises."""
    names = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")
    before = {name: getattr(torch.Tensor, name) for name in names}

    def refusing(name: str) -> Callable[..., Any]:
        def refuse(*_args: Any, **_kwargs: Any) -> Any:
            raise NotFittingError(
                f"forward calls Tensor.{name}, which cannot be captured for a CUDA device that is "
                "not present; plan on the device, or without it"
            )

        return refuse

    for name in names:
        setattr(torch.Tensor, name, refusing(name))
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(torch.Tensor, name, method)


class _Task:
    """The state of one walk, which the engine keeps in a ``GraphTask``."""

    def __init__(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[Wanted],
        walk: BackwardWalk,
        arrived: Arrived | None,
    ) -> None:
        self._walk = walk
        self._arrived = arrived
        self._roots = [_edge_of(t) for t in outputs]
        self._num_inputs = len(inputs)
        self._captures: dict[int, list[tuple[int, int]]] = {}  # node -> [(its input, ours)]
        self._dependencies: dict[int, int] = {}
        self._buffers: dict[int, list[torch.Tensor | None]] = {}
        self._ready: list[tuple[int, int, Any]] = []
        self._num_pushed = 0
        nodes = self._explore()
        leaves = {id(n.variable): n for n in nodes if hasattr(n, "variable")}
        for i, sought in enumerate(inputs):
            node, slot = _edge_within(sought, leaves)
            if node is not None:
                self._captures.setdefault(id(node), []).append((slot, i))
        self._needed = self._lead_to_captures(nodes)

    def run(self, gradients: list[torch.Tensor | None]) -> _Gradients:
        """Pass ``gradients`` to the roots and walk; each node is released once it has run."""
        self._found: list[torch.Tensor | None] = [None] * self._num_inputs
        roots, self._roots = self._roots, []
        self._hand_on(roots, [_fitting(g, *edge) for g, edge in zip(gradients, roots, strict=True)])
        gradients.clear()
        del roots
        while self._ready:
            self._evaluate(heapq.heappop(self._ready)[2])
        return tuple(self._found)

    # -- the graph ---------------------------------------------------------------

    def _explore(self) -> list[Any]:
        """All nodes in the order in which they are found; counts the edges to each."""
        todo: list[Any] = []
        seen: set[int] = set()
        nodes: list[Any] = []

        def point_at(node: Any) -> None:
            if node is None:
                return
            self._dependencies[id(node)] = self._dependencies.get(id(node), 0) + 1
            if id(node) not in seen:
                seen.add(id(node))
                nodes.append(node)
                todo.append(node)

        for node, _ in self._roots:
            point_at(node)
        while todo:
            for following, _ in todo.pop().next_functions:
                point_at(following)
        self._alive = {id(n): n for n in nodes}  # an id is only good while its node lives
        return nodes

    def _lead_to_captures(self, nodes: list[Any]) -> set[int]:
        """Nodes that must run because they lead to a requested gradient."""
        parents: dict[int, list[int]] = {}
        for node in nodes:
            for following, _ in node.next_functions:
                if following is not None:
                    parents.setdefault(id(following), []).append(id(node))
        needed: set[int] = set()
        todo = [p for node in self._captures for p in parents.get(node, ())]
        while todo:
            node = todo.pop()
            if node not in needed:
                needed.add(node)
                todo.extend(parents.get(node, ()))
        return needed

    # -- the walk ------------------------------------------------------------------

    def _evaluate(self, node: Any) -> None:
        self._walk.enter(node)
        gradients = self._buffers.pop(id(node))
        self._alive.pop(id(node))
        for slot, i in self._captures.get(id(node), ()):
            self._found[i] = gradients[slot]
            if self._arrived is not None:
                self._arrived(i)
        if id(node) not in self._needed:
            return
        results = self._call(node, gradients)
        edges = node.next_functions
        if len(results) != len(edges):
            raise RuntimeError(
                f"{node.name()} returned {len(results)} gradients, {len(edges)} were expected"
            )
        fitting = [_fitting(g, *edge) for g, edge in zip(results, edges, strict=True)]
        del results, node  # what it has saved is freed before gradients are added up
        self._hand_on(edges, fitting)

    def _call(self, node: Any, gradients: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Call a node and return its gradients; ``gradients`` is emptied."""
        in_python = isinstance(node, torch.autograd.function.BackwardCFunction)
        if in_python and self._walk.wants_zeros(node):
            for i, meta in enumerate(input_metadata_of(node)):
                if gradients[i] is None:
                    gradients[i] = torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device)
        arguments = tuple(gradients)
        gradients.clear()
        made = node.apply(*arguments) if in_python else node(*arguments)
        returned = list(made) if isinstance(made, tuple) else [made]
        return _by_edge(node, returned) if in_python else list(as_eager(node, returned, arguments))

    def _hand_on(self, edges: Sequence[Any], gradients: list[torch.Tensor | None]) -> None:
        """Add gradients to the buffers of the next nodes; queue those that are ready.

        As in the engine, the node with the largest sequence number, which was made
        last, runs first. Leaves have the largest of all.
        """
        for i, (node, slot) in enumerate(edges):
            gradient, gradients[i] = gradients[i], None
            if node is None:
                continue
            key = id(node)
            self._dependencies[key] -= 1
            if key in self._needed or key in self._captures:
                if key not in self._buffers:
                    self._buffers[key] = [None] * len(input_metadata_of(node))
                self._add(self._buffers[key], slot, gradient)
                if self._dependencies[key] == 0:
                    heapq.heappush(self._ready, (-sequence_number_of(node), self._num_pushed, node))
                    self._num_pushed += 1

    @staticmethod
    def _add(buffer: list[torch.Tensor | None], slot: int, gradient: torch.Tensor | None) -> None:
        """Fake tensors are never added to in place (``can_accumulate_inplace``)."""
        if gradient is None:
            return
        present = buffer[slot]
        buffer[slot] = gradient if present is None else present + gradient


def _edge_within(sought: Wanted, leaves: dict[int, Any]) -> tuple[Any, int]:
    """The node that a gradient is asked of, and its input; no node where none depends on it."""
    if isinstance(sought, GradientEdge):
        return sought.node, sought.output_nr
    if sought.is_leaf:
        return leaves.get(id(sought)), 0
    return sought.grad_fn, sought.output_nr


def _edge_of(tensor: torch.Tensor) -> tuple[Any, int]:
    if tensor.grad_fn is not None:
        return tensor.grad_fn, tensor.output_nr
    return tensor.view_as(tensor).grad_fn.next_functions[0]  # type: ignore[union-attr]


def _fitting(gradient: torch.Tensor | None, node: Any, slot: int) -> torch.Tensor | None:
    """A gradient in the shape and dtype, and on the device, of what was differentiated."""
    if gradient is None or node is None:
        return gradient
    meta = input_metadata_of(node)[slot]
    if tuple(gradient.shape) != tuple(meta.shape):
        gradient = gradient.sum_to_size(meta.shape)
    if gradient.dtype != meta.dtype:
        gradient = gradient.to(meta.dtype)
    if gradient.device != meta.device:
        if gradient.dim() > 0:
            raise RuntimeError(
                f"{node.name()} gets a gradient on {gradient.device}, expected on {meta.device}"
            )
        gradient = gradient.to(meta.device)
    return gradient


def _by_edge(function: Any, returned: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Gradients of a Python function, one for each edge instead of one for each argument.

    The function returns one for each argument of its forward, and has an edge for
    each argument that is a tensor. The edge leads somewhere if that tensor required grad.
    """
    wanted = list(function.needs_input_grad)
    extra = returned[len(wanted) :]
    if len(returned) < len(wanted) or any(g is not None for g in extra):
        raise RuntimeError(
            f"{function.name()} returned {len(returned)} gradients, {len(wanted)} were expected"
        )
    of_tensors = iter([g for g, wants in zip(returned, wanted, strict=False) if wants])
    return [None if node is None else next(of_tensors) for node, _ in function.next_functions]


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, torch.Tensor) else list(value)
