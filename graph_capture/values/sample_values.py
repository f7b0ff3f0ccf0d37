"""Values of a traced step's tensors on its sample.

A graph is traced on stand-ins, and code that asks for a value must get the value that
eager would get. So the part of the graph that the value depends on is run for real: on
the sample, the model's parameters and buffers, and constants, each copied if that part
writes to it. Random numbers are drawn in the step's own sequence, from the generators'
current state.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..calls.draws import draws
from ..costs.trial import REFUSALS, blank_arguments
from ..private_torch.dispatch import below_autograd, disable_current_modes, without_autocast
from ..private_torch.fake_tensors import FakeTensor
from ..private_torch.tensors import identity_of_storage
from ..private_torch.trees import tree_iter
from ..reads.isolation import generator_states, set_generator_states
from .origins import Origins, deciding, memory_of, written_by

CACHE_BYTES = 256 * 2**20
"""Bytes of values kept for the next question, which mostly depends on the same ones."""

_TALKS_TO_OTHERS = {"c10d", "_c10d_functional", "_c10d_functional_autograd"}
_States = tuple[np.ndarray, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Other:
    """How another step differs from the sample's.

    Parameters
    ----------
    state
        Values of buffers and attributes.
    seed
        The seed of all draws; ``None`` for the sample's own numbers.
    """

    state: Mapping[Node, torch.Tensor] = field(default_factory=dict)
    seed: int | None = None


class UnknowableError(Exception):
    """There are no values to compute with."""


class SampleValues:
    """Real values of nodes of one graph, while it is being traced.

    Parameters
    ----------
    graph
        Grows; a value is the one at the moment of the question.
    constants
        Real tensors of the placeholders whose role is ``"constant"``.
    """

    def __init__(self, graph: Graph, constants: Mapping[str, torch.Tensor]) -> None:
        self._graph = graph
        self._constants = constants
        self._given: dict[Node, torch.Tensor] = {}
        self._device_of: dict[torch.device, torch.device] = {}  # of the step -> of the values
        self._known: dict[Node, torch.Tensor] = {}
        self._known_bytes = 0
        with disable_current_modes():
            self._next_states = generator_states()
        self._state_before: dict[Node, _States] = {}

    def give(self, node: Node, tensor: torch.Tensor) -> None:
        """Set the value of a placeholder, if the tensor has one."""
        if not isinstance(tensor, FakeTensor) and tensor.device.type != "meta":
            self._given[node] = tensor
            device = node.meta["val"].device
            if device != tensor.device:
                self._device_of[device] = tensor.device

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of a call on nodes now, on made-up values if only the shape matters.

        Raises
        ------
        UnknowableError
            When there is no value to compute with, or the call does not run.
        """
        needed = _nodes_in(deciding(func, args, kwargs))
        env = self._evaluate(list(needed))
        with for_real():

            def value(node: Node) -> Any:
                return env[node] if node in env else self._blank(node)

            return self._run(func, map_arg(args, value), map_arg(kwargs, value))

    def _blank(self, node: Node) -> torch.Tensor:
        like = node.meta["val"]
        device = self._device_of.get(like.device, like.device)
        made, _ = blank_arguments(torch.ops.aten.clone.default, (like,), {}, device)
        return made[0]

    def tensor(self, node: Node) -> torch.Tensor:
        """Return the current value of a node, which must not be written to.

        Raises
        ------
        UnknowableError
            When there is no value to compute with.
        """
        return self._evaluate([node])[node]

    def tensors(self, nodes: list[Node]) -> dict[Node, torch.Tensor]:
        """The current values of nodes, as :meth:`tensor` returns them."""
        return self._evaluate(nodes)

    def again(
        self, part: frozenset[Node], call: tuple[Any, Any, Any], others: Iterable[Other]
    ) -> Iterator[Any]:
        """The result of a call with other state or other random numbers, for each of ``others``.

        Parameters
        ----------
        part
            All nodes that it depends on.
        call
            Operator, arguments and keyword arguments; without an operator, the value of
            its argument is wanted.
        """
        self._slice({})  # update who writes what
        order = [n for n in self._graph.nodes if n in part]
        func, args, kwargs = call
        for other in others:
            env: dict[Node, Any] = {}
            copies: dict[int, torch.UntypedStorage] = {}
            with for_real():
                if other.seed is not None:
                    torch.manual_seed(other.seed)
                for node in order:
                    if node in other.state:
                        env[node] = other.state[node].clone()
                    elif node.op == "placeholder":
                        env[node] = self._placeholder(node, copies)
                    else:
                        given = map_arg(node.args, env.get), map_arg(node.kwargs, env.get)
                        own = draws(node) and other.seed is None
                        env[node] = (
                            self._draw(node, *given) if own else self._run(node.target, *given)
                        )
                given = map_arg(args, env.get), map_arg(kwargs, env.get)
                yield given[0][0] if func is None else self._run(func, *given)

    def run_through(self, last: Node) -> None:
        """Run all calls up to one, with the step's own draws.

        Raises
        ------
        UnknowableError
            When there is no value to compute with.
        OutcomeChanged
            When a check finds another value than planned.
        """
        self._slice({})  # update who writes what
        order = list(itertools.takewhile(lambda n: n is not last, self._graph.nodes))
        last_use = {a: n for n in (*order, last) for a in n.all_input_nodes}
        env: dict[Node, Any] = {}
        copies: dict[int, torch.UntypedStorage] = {}
        with for_real():
            for node in (*order, last):
                if node.op == "placeholder":
                    if node in last_use:
                        env[node] = self._placeholder(node, copies)
                    continue
                args, kwargs = map_arg(node.args, env.get), map_arg(node.kwargs, env.get)
                run = self._draw if draws(node) else self._called
                env[node] = run(node, args, kwargs)
                for used in {node, *node.all_input_nodes}:
                    if last_use.get(used, node) is node:
                        env.pop(used, None)

    def _called(self, node: Node, args: Any, kwargs: Any) -> Any:
        return self._run(node.target, args, kwargs)

    def value(self, node: Node) -> torch.Tensor:
        """Return a copy of a node's current value, on the CPU."""
        with for_real():
            return self.tensor(node).detach().cpu().clone()

    def follows_from(self, *trees: Any) -> Origins:
        """What the nodes in ``trees`` depend on."""
        return Origins(self._slice(_nodes_in(trees)))

    def written_state(self) -> dict[str, Node]:
        """By name, the buffers and attributes that calls so far write to."""
        self._slice({})
        return {
            str(n.meta["target"]): n
            for n in self._graph.nodes
            if n.op == "placeholder"
            and n.meta["role"] in ("buffer", "attribute")
            and any(memory in self._writers for memory in memory_of(n))
        }

    # -- the part of the graph ---------------------------------------------------

    def _slice(self, asked: Mapping[Node, None], until: Mapping[Node, Any] | None = None) -> set:
        """The nodes that ``asked`` depend on; does not look behind those in ``until``."""
        writers: dict[int, list[Node]] = {}
        for node in self._graph.nodes:
            for written in written_by(node):
                for memory in memory_of(written):
                    writers.setdefault(memory, []).append(node)
        needed: set[Node] = set()
        todo = list(asked)
        while todo:
            node = todo.pop()
            if node in needed:
                continue
            needed.add(node)
            if until is not None and node in until:
                continue
            todo.extend(node.all_input_nodes)
            for memory in memory_of(node):
                todo.extend(writers.get(memory, ()))
        self._writers = writers
        return needed

    def _evaluate(self, asked: list[Node]) -> dict[Node, Any]:
        """The values of nodes; everything else is freed at its last use or kept for later."""
        self._slice({})  # update who writes what
        for node in [n for n in self._known if any(m in self._writers for m in memory_of(n))]:
            self._forget(node)
        part = self._slice(dict.fromkeys(asked), self._known)
        order = [n for n in self._graph.nodes if n in part]
        last = {a: n for n in order if n not in self._known for a in n.all_input_nodes}
        dies_at: dict[Node, list[Node]] = {}
        for node, user in last.items():
            if node not in asked:
                dies_at.setdefault(user, []).append(node)
        env: dict[Node, Any] = {}
        copies: dict[int, torch.UntypedStorage] = {}
        with for_real():
            for node in self._with_draws(order):
                if node not in part:
                    self._draw(node, None, None)
                elif node in self._known:
                    env[node] = self._known[node]
                elif node.op == "placeholder":
                    env[node] = self._placeholder(node, copies)
                else:
                    args, kwargs = map_arg(node.args, env.get), map_arg(node.kwargs, env.get)
                    if draws(node):
                        env[node] = self._draw(node, args, kwargs)
                    else:
                        env[node] = self._run(node.target, args, kwargs)
                    self._keep(node, env[node])
                for dead in dies_at.get(node, ()):
                    env.pop(dead, None)
        return {n: env[n] for n in asked}

    def _placeholder(self, node: Node, copies: dict[int, torch.UntypedStorage]) -> torch.Tensor:
        value = self._given.get(node)
        if value is None and node.meta.get("role") == "constant":
            value = self._constants[node.meta["target"]]
        if value is None:
            raise UnknowableError(node.name)
        value = value.detach()
        if not any(memory in self._writers for memory in memory_of(node)):
            return value
        storage = value.untyped_storage()
        if identity_of_storage(storage) not in copies:
            copies[identity_of_storage(storage)] = storage.clone()
        copy = torch.empty(0, dtype=value.dtype, device=value.device)
        return copy.set_(
            copies[identity_of_storage(storage)],
            value.storage_offset(),
            value.shape,
            value.stride(),
        )

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if getattr(func, "namespace", None) in _TALKS_TO_OTHERS:
            raise UnknowableError(str(func))
        try:
            return func(*self._placed(args), **self._placed(kwargs))
        except REFUSALS as error:  # such as out of memory, or a kernel of an absent device
            raise UnknowableError(f"{func}: {error}") from error

    def _placed(self, tree: Any) -> Any:
        if not self._device_of:
            return tree
        return torch.fx.node.map_aggregate(
            tree, lambda x: self._device_of.get(x, x) if isinstance(x, torch.device) else x
        )

    # -- what is kept for the next question ----------------------------------------

    def _keep(self, node: Node, value: Any) -> None:
        if not isinstance(value, torch.Tensor) or any(m in self._writers for m in memory_of(node)):
            return
        num_bytes = value.untyped_storage().nbytes()
        if num_bytes > CACHE_BYTES:
            return
        self._known[node] = value
        self._known_bytes += num_bytes
        while self._known_bytes > CACHE_BYTES:
            self._forget(next(iter(self._known)))

    def _forget(self, node: Node) -> None:
        self._known_bytes -= self._known.pop(node).untyped_storage().nbytes()

    # -- random numbers ------------------------------------------------------------

    def _with_draws(self, order: list[Node]) -> list[Node]:
        """The nodes, and all that draw before them, because numbers come in one sequence."""
        last = next((n for n in reversed(order) if draws(n) and n not in self._known), None)
        if last is None:
            return order
        wanted = set(order)
        merged = []
        before = True
        for node in self._graph.nodes:
            if node in wanted or (before and node not in self._state_before and draws(node)):
                merged.append(node)
            before = before and node is not last
        return merged

    def _draw(self, node: Node, args: Any, kwargs: Any) -> Any:
        """Draw at a node's place in the step's sequence of draws.

        How many numbers a call takes depends on shapes only, so a call whose values
        nobody asks for draws on made-up arguments.
        """
        first = node not in self._state_before
        if first:
            self._state_before[node] = self._next_states
        set_generator_states(self._state_before[node])
        if args is not None:
            result = self._run(node.target, args, kwargs)
        else:
            result = None
            values = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            devices = (t.device for t in tree_iter(values) if isinstance(t, torch.Tensor))
            device = next(devices, torch.device("cpu"))
            device = self._device_of.get(device, device)
            made = blank_arguments(node.target, *values, device)
            self._run(node.target, *made)
        if first:
            self._next_states = generator_states()
        return result


def _nodes_in(tree: Any) -> dict[Node, None]:
    found: dict[Node, None] = {}
    map_arg(tree, lambda n: found.setdefault(n))
    return found


@contextmanager
def for_real() -> Iterator[None]:
    """Run as a step's kernels do, below autograd and autocast; generators are restored."""
    with (
        disable_current_modes(),
        below_autograd(),
        without_autocast(),
        torch.no_grad(),
    ):
        states = generator_states()
        try:
            yield
        finally:
            set_generator_states(states)


__all__ = [
    "Other",
    "SampleValues",
    "UnknowableError",
    "for_real",
]
