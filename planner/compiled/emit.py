"""Turn a schedule into the two graphs that AOTAutograd compiles: forward and backward.

Runs before the turn become the forward graph, runs after it the backward graph, in the
schedule's order; a run that repeats an operator is written again. What backward reads from
before the turn is *saved*: forward returns it behind its own results. Views are written where
they are first needed, and again once their memory was made again.

AOTAutograd's order is kept: forward takes the step's inputs and returns its results, saved
tensors, saved numbers; backward takes saved numbers, saved tensors and the tangents.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, map_arg

from graph_capture.calls.draws import draws
from graph_capture.calls.storage_id import storage_id
from graph_capture.private_torch.compiler import saved_description
from graph_capture.private_torch.inductor_fusion import FusionRules, KernelPlace, put, put_freed
from solvers.replay import InvalidScheduleError, replay
from solvers.schedule import Schedule

from .drawn_again import draw_again, read_state
from .expected_peak import expected_memory
from .held_fusion import WithinMemory
from .joint_step import is_number, is_view, items_of, makes_memory, tensors_of
from .priced_step import PricedStep


def emit(
    priced: PricedStep, schedule: Schedule, rules: FusionRules | None = None
) -> tuple[GraphModule, GraphModule]:
    """Build forward and backward for a schedule, which must have passed replay.

    Parameters
    ----------
    rules
        Which runs Inductor may join; it then stores what the cost graph counts as stored.
        ``None`` leaves both to Inductor.

    Returns
    -------
    tuple
        Forward and backward as a partition function returns them.
    """
    step = priced.step
    at_turn = schedule.order.index(priced.turn)
    repeated = schedule.recomputed().keys()
    forward = _Region(priced, None, repeated, rules)
    for primal in step.primals:
        forward.declare(primal)
    forward.run(schedule.order[:at_turn], 0)
    outputs = [forward.result(value) for value in step.outputs]
    backward = _Region(priced, forward, repeated, rules)
    for tangent in step.tangents:
        backward.declare(tangent)
    backward.run(schedule.order[at_turn + 1 :], at_turn + 1)
    gradients = [backward.result(value) for value in step.gradients]

    numbers = [n for n in backward.taken if is_number(n)]
    tensors = [n for n in backward.taken if not is_number(n)]
    tensors.sort(key=lambda n: bool(n.meta.get("saved_tensor_with_no_vc_check")))
    saved = [*tensors, *numbers]
    _close(forward.graph, [*outputs, *(forward.value(n) for n in saved)], _described(step, saved))
    backward.order_placeholders([*numbers, *tensors, *step.tangents])
    descriptions = None if step.descriptions is None else step.descriptions[len(outputs) :]
    _close(backward.graph, gradients, descriptions)
    for node in backward.graph.nodes:
        if node.op in ("call_function", "get_attr"):
            node.meta["autograd_backward"] = True
    return GraphModule(step.module, forward.graph), GraphModule(step.module, backward.graph)


def emit_held(priced: PricedStep, schedule: Schedule) -> tuple[GraphModule, GraphModule]:
    """Emit a schedule for Inductor, which may join kernels only within the schedule's memory."""
    replayed = replay(priced.graph, schedule)
    rules = WithinMemory(
        memory_bytes=replayed.memory_bytes,
        limit_bytes=replayed.peak_bytes,
        expected=expected_memory(priced, schedule),
    )
    return emit(priced, schedule, rules)


def _described(step: Any, saved: Sequence[Node]) -> tuple[Any, ...] | None:
    if step.descriptions is None:
        return None
    own = step.descriptions[: len(step.outputs)]
    return (
        *own,
        *(
            saved_description(i, checked=not n.meta.get("saved_tensor_with_no_vc_check"))
            for i, n in enumerate(saved)
        ),
    )


def _close(graph: Graph, results: Sequence[Any], descriptions: Sequence[Any] | None) -> None:
    output = graph.output(tuple(results))
    if descriptions is not None:
        output.meta["desc"] = list(descriptions)
    output.meta["output_stack_traces"] = [
        r.meta.get("stack_trace") if isinstance(r, Node) else None for r in results
    ]
    graph.lint()


class _Region:
    """Writes runs into one graph and knows the current value of each node of the joint graph."""

    def __init__(
        self,
        priced: PricedStep,
        earlier: _Region | None,
        repeated: Collection[int],
        rules: FusionRules | None,
    ) -> None:
        self._priced = priced
        self._rules = rules
        self._run = 0
        self._wanted_states = {priced.state_of[v] for v in repeated if v in priced.state_of}
        self._earlier = earlier
        self.graph = Graph()
        self._now: dict[Node, Node] = {}
        self._inputs: dict[Node, Node] = {}
        self._views: dict[int, set[Node]] = {}  # memory -> views of it that are written
        self.taken: list[Any] = []  # what is taken over from forward
        self._first_call: Node | None = None
        self._has_run: set[int] = set() if earlier is None else set(earlier._has_run)
        self._kept = {
            memory for memory, k in priced.storage_of.items() if priced.graph.storages[k].kept
        }

    # -- values ------------------------------------------------------------------------

    def declare(self, node: Node) -> None:
        """Add an input of this graph."""
        self._now[node] = self._inputs[node] = self._placeholder(node)

    def result(self, value: Any) -> Any:
        """The current value of a result, or the constant that it is."""
        return self.value(value) if isinstance(value, Node) else value

    def value(self, node: Node) -> Node:
        """The current value of a node of the joint graph."""
        if node in self._now:
            return self._now[node]
        if self._earlier is not None and is_number(node):
            return self._take_over(node)
        if node.op == "get_attr" or is_number(node) or self._is_view(node):
            new = self._copy(node)
            self._now[node] = new
            for tensor in tensors_of(node.meta.get("val")):
                self._views.setdefault(storage_id(tensor), set()).add(node)
            return new
        if self._earlier is None or not self._earlier.has(node):
            raise InvalidScheduleError(f"{node.name!r} is read before it is computed")
        return self._take_over(node)

    def has(self, node: Node) -> bool:
        """Whether a node's value was made here."""
        return node in self._now

    def _is_view(self, node: Node) -> bool:
        if node.target is operator.getitem:
            source = node.args[0]
            return isinstance(source, Node) and not makes_memory(source)
        return node.op == "call_function" and is_view(node) and not makes_memory(node)

    def _take_over(self, node: Node) -> Node:
        self.taken.append(node)
        self.declare(node)
        return self._now[node]

    def _placeholder(self, node: Node) -> Node:
        if self._first_call is None:
            new = self.graph.placeholder(node.name)
        else:
            with self.graph.inserting_before(self._first_call):
                new = self.graph.placeholder(node.name)
        new.target = new.name  # the name of the argument: another node may have the asked one
        new.meta = dict(node.meta)
        if self._earlier is not None and node not in self._priced.step.primals:
            put_freed(new)
        return new

    def _copy(self, node: Node) -> Node:
        new = self._noted(self.graph.node_copy(node, self.value))
        if self._rules is not None:
            put(new, KernelPlace(self._run, self._is_stored(node), self._rules))
        return new

    def _is_stored(self, node: Node) -> bool:
        """Whether a call makes one tensor, whose memory the cost graph counts."""
        made = node.meta.get("val")
        return (
            isinstance(made, torch.Tensor)
            and makes_memory(node)
            and storage_id(made) in self._priced.storage_of
        )

    def _noted(self, new: Node) -> Node:
        if self._first_call is None:
            self._first_call = new
        return new

    def order_placeholders(self, nodes: Sequence[Node]) -> None:
        """Put the inputs into AOTAutograd's order."""
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            mark = self.graph.placeholder("start")
        for node in nodes:
            mark.prepend(self._inputs[node])
        self.graph.erase_node(mark)

    # -- runs --------------------------------------------------------------------------

    def run(self, order: Sequence[int], first: int) -> None:
        """Write runs in order; ``first`` is the place of the first one in the schedule."""
        for self._run, v in enumerate(order, first):
            if v in self._wanted_states:
                self._record(self._priced.state_nodes[v])
            again = v in self._has_run
            for call in self._priced.groups[v]:
                self._write(v, call, again)
            self._has_run.add(v)

    def _write(self, v: int, call: Node, again: bool) -> None:
        """Write a call and its results; of what is kept, every use reads the first version."""
        new = self._draw_again(v, call) if again and draws(call) else self._copy(call)
        if isinstance(call.meta["val"], torch.Tensor):
            self._set(call, new, again)
            return
        self._now[call] = new
        for item in items_of(call):
            taken = self.graph.create_node(
                "call_function", operator.getitem, (new, item.args[1]), name=item.name
            )
            taken.meta = dict(item.meta)
            self._set(item, self._noted(taken), again)

    def _set(self, node: Node, new: Node, again: bool) -> None:
        memories = [storage_id(t) for t in tensors_of(node.meta.get("val"))]
        if again and self._exists(node) and not self._kept.isdisjoint(memories):
            return
        self._now[node] = new
        for memory in memories:
            for view in self._views.pop(memory, ()):
                self._now.pop(view, None)

    def _exists(self, node: Node) -> bool:
        return node in self._now or (self._earlier is not None and self._earlier.has(node))

    # -- generators --------------------------------------------------------------------

    def _record(self, state: Node) -> None:
        """Record the generator's state, as a tensor that can be saved."""
        new = self.graph.create_node(
            "call_function", read_state, (self._priced.device.type,), name=state.name
        )
        new.meta = dict(state.meta)
        self._now[state] = self._noted(new)

    def _draw_again(self, v: int, call: Node) -> Node:
        """The same numbers again, from the state that the first draw found."""
        state = self.value(self._priced.state_nodes[self._priced.state_of[v]])
        args: tuple[Any, ...] = (state, call.target, *map_arg(call.args, self.value))
        new = self.graph.call_function(draw_again, args, map_arg(dict(call.kwargs), self.value))
        new.meta = dict(call.meta)
        return self._noted(new)
