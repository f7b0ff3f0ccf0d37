"""Turn a schedule back into torch.fx: one forward and one backward graph.

The schedule's runs before the loss become the forward graph, and those after it the
backward graph, in that order. A run that repeats an operator emits its calls again.
Names are kept if fx allows it. Views are emitted where they are first needed, and
again after their storage was recomputed. What the backward graph reads from before the
loss is *saved*: forward returns it in addition to the outputs. Memory is freed at its
last use in the generated code, which matches the frees that the schedule implies.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.fx.graph import CodeGen

from graph_capture.calls.draws import draws
from graph_capture.calls.storage_id import storage_id
from graph_capture.captured_step import CapturedStep
from graph_capture.folding.blocks import OperatorCode
from graph_capture.folding.leaving import HANDED_ON
from graph_capture.folding.purity import repeated_arguments
from graph_capture.private_torch.autograd import set_grad_enabled
from graph_capture.private_torch.operators import OpOverload
from solvers.replay import InvalidScheduleError, replay
from solvers.schedule import Schedule

from .fast_calls import fast_call
from .generators import (
    READS,
    RESUMES,
    REWINDS,
)

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class PlannedGraphs:
    """The rewritten step.

    Parameters
    ----------
    forward, backward
        Each takes one list of tensors, which it empties, and returns a list.
        ``forward`` takes the values of ``forward_inputs`` and returns the outputs,
        then the saved tensors. ``backward`` takes the tangents, the exposed saved
        tensors, the values of ``saved_inputs`` and the other saved tensors, and
        returns the gradients.
    forward_inputs
        Placeholders of the traced step that forward takes.
    saved_inputs
        Placeholders that backward reads, passed on beside the saved tensors.
    num_outputs
        How many of forward's results are outputs of the model.
    num_exposed
        How many of the saved tensors share memory with an output or an input of the
        step, so that others may write to them; these come first.
    cuts
        Runs of the schedule after which gradients leave, where the schedule says so.
    """

    forward: GraphModule
    backward: GraphModule
    forward_inputs: tuple[Node, ...]
    saved_inputs: tuple[Node, ...]
    num_outputs: int
    num_exposed: int
    cuts: tuple[int, ...] = ()


def rewrite(captured: CapturedStep, schedule: Schedule) -> PlannedGraphs:
    """Build the graphs that run ``schedule``, which must have passed replay."""
    at_loss = schedule.order.index(captured.loss)
    repeated = set(schedule.recomputed())
    in_place = replay(captured.graph, schedule).in_place
    forward = _Emitter(captured, repeated, in_place, earlier=None)
    forward.run(schedule.order[:at_loss])
    outputs = [forward.value(node) for node in captured.step.outputs]

    backward = _Emitter(captured, repeated, in_place, earlier=forward)
    for tangent in captured.step.tangents:
        backward.declare(tangent)
    backward.run(schedule.order[at_loss + 1 :], at_loss + 1)
    gradients = backward.values_where_made([node for _, node in captured.step.gradients])
    backward.graph.output(gradients)
    exposed = {forward.storage_of(node) for node in (*captured.step.outputs, *forward.inputs)}
    public = [key for key in backward.taken_over if key[0] in exposed]
    private = [key for key in backward.taken_over if key[0] not in exposed]
    backward.order_placeholders(public, private)
    forward.order_placeholders()

    saved = [*public, *private]
    forward.graph.output([*outputs, *(forward.value_at(key) for key in saved)])
    return PlannedGraphs(
        forward=compile_boxed(forward.graph, "PlannedForward"),
        backward=compile_boxed(backward.graph, "PlannedBackward"),
        forward_inputs=tuple(forward.inputs),
        saved_inputs=tuple(backward.inputs),
        num_outputs=len(outputs),
        num_exposed=len(public),
        cuts=tuple(
            i
            for i, v in enumerate(schedule.order)
            if captured.graph.operators[v].target in HANDED_ON
        ),
    )


_Key = tuple[int, Node]  # a storage and the node of the traced step whose value owns it


class _Emitter:
    """Emits operators into one graph and knows where every storage's value is."""

    def __init__(
        self,
        captured: CapturedStep,
        repeated: set[int],
        in_place: Collection[tuple[int, int, int]],
        earlier: _Emitter | None,
    ) -> None:
        self._captured = captured
        self._repeated = repeated
        self._in_place = in_place  # runs of the schedule that write an output over an input
        self._earlier = earlier
        self._has_run: set[int] = set() if earlier is None else set(earlier._has_run)
        self.graph = Graph()
        self._values: dict[_Key, Node] = {}
        self._views: dict[int, dict[Node, Node]] = {}
        self.inputs: dict[Node, Node] = {}
        self.taken_over: dict[_Key, Node] = {}
        self._grad_enabled = earlier is None
        self._declared: list[Node] = []
        self._first_call: Node | None = None
        self._num_placeholders = 0
        self._moment = 0
        self._storage_by_id: dict[int, int] = {}
        for k, carriers in enumerate(captured.carriers):
            for carrier in carriers:
                self._storage_by_id[storage_id(carrier.meta["val"])] = k  # the last write wins
        self._states = {
            state
            for v, state in captured.state_of.items()
            if v in repeated or captured.code[v].repeats
        }

    # -- values ----------------------------------------------------------------

    def declare(self, node: Node) -> None:
        """Add a tangent as the next input of the backward graph."""
        k = self.storage_of(node)
        self._values[k, node] = _held(self._placeholder(node.name, node))
        self._declared.append(self._values[k, node])

    def order_placeholders(self, public: Iterable[_Key] = (), private: Iterable[_Key] = ()) -> None:
        """Order inputs: tangents, exposed saved tensors, the step's inputs, other saved ones."""
        ordered = [
            *self._declared,
            *(_held(self.taken_over[key]) for key in public),
            *self.inputs.values(),
            *(self.taken_over[key] for key in private),
        ]
        for before, after in itertools.pairwise(ordered):
            before.append(after)

    def value(self, node: Node) -> Node:
        """The final value of a node of the traced step."""
        return self._lookup(node, self.storage_of(node))

    def values_where_made(self, nodes: Iterable[Node]) -> list[Node]:
        """The final values, with views right behind what they look at instead of at the end."""
        before = len(self.graph.nodes)
        found = [self.value(node) for node in nodes]
        place = {node: i for i, node in enumerate(self.graph.nodes)}
        for view in list(self.graph.nodes)[before:]:
            source = max(view.all_input_nodes, key=place.__getitem__, default=view)
            if source is not view and source.op != "placeholder":
                source.append(view)
                view.meta["moment"] = source.meta["moment"]
                place[view] = place[source]
        return found

    def storage_of(self, node: Node) -> int:
        """The storage that holds a node of the traced step."""
        return self._storage_by_id[storage_id(node.meta["val"])]

    def value_at(self, key: _Key) -> Node:
        """The latest value that carries a storage."""
        return self._values[key]

    def _placeholder(self, name: str, like: Node) -> Node:
        """A new input; its target is the name in the generated signature, so it must be new."""
        self._num_placeholders += 1
        with self.graph.inserting_before(self._first_call):
            node = self.graph.placeholder(f"{name}_{self._num_placeholders}")
        return _with_memory(node, like)

    def _carrier(self, k: int, node: Node) -> Node:
        key = (k, node)
        if key in self._values:
            return self._values[key]
        if node.op == "placeholder" and node.meta["role"] not in ("tangent", "generator"):
            self.inputs[node] = _held(self._placeholder(node.name, node))
            self._values[key] = self.inputs[node]
        else:
            if self._earlier is None or key not in self._earlier._values:
                raise InvalidScheduleError(f"{node.name!r} is read before it is computed")
            self.taken_over[key] = self._values[key] = self._placeholder(f"saved_{node.name}", node)
        return self._values[key]

    def _lookup(self, node: Node, k: int) -> Node:
        """The value of ``node``, which looks at storage ``k``: its owner or a view of it."""
        if node in self._captured.carriers[k]:
            return self._carrier(k, node)
        views = self._views.setdefault(k, {})
        if node not in views:
            args = map_arg(node.args, lambda n: self._lookup(n, k))
            kwargs = map_arg(node.kwargs, lambda n: self._lookup(n, k))
            views[node] = self._call_like(node, args, kwargs)
        return views[node]

    def _read(self, node: Node, k: int) -> Node:
        """As :meth:`_lookup`, for a call that depends on elements, not on tensor objects.

        ``w.t().t()``, which backward formulas use, is ``w``.
        """
        return self._lookup(_first_alike(node, self._captured.carriers[k]), k)

    def _set(self, k: int, carrier: Node, value: Node) -> None:
        if self._captured.graph.storages[k].kept and self._exists(k, carrier):
            return  # every use reads the first version
        self._values[k, carrier] = value
        self._views.pop(k, None)

    def _exists(self, k: int, carrier: Node) -> bool:
        earlier = self._earlier is not None and (k, carrier) in self._earlier._values
        return earlier or (k, carrier) in self._values

    # -- operators ---------------------------------------------------------------

    def run(self, order: tuple[int, ...], start: int = 0) -> None:
        """Emit the runs of one part of the schedule; its first is run ``start``."""
        for self._moment, v in enumerate(order, start):
            code = self._captured.code[v]
            if code.calls:
                forward = code.repeats or self._captured.graph.operators[v].phase == "forward"
                self._set_grad_mode(forward)
                self._emit(v, code, first=v not in self._has_run and not code.repeats)
            elif v in self._states:
                self._record_state(v)
            elif self._captured.graph.operators[v].target in HANDED_ON:
                self._set_grad_mode(False)  # autograd goes on in its own
            self._has_run.add(v)
        self._set_grad_mode(self._earlier is None)

    def _set_grad_mode(self, enabled: bool) -> None:
        """Repeat forward's operators in forward's grad mode: some kernels save more then."""
        if enabled != self._grad_enabled:
            self._call(set_grad_enabled, (enabled,), {}, "grad_mode")
            self._grad_enabled = enabled

    def _emit(self, v: int, code: OperatorCode, *, first: bool) -> None:
        """Emit one run. Its own calls see its results at once, later runs after its end.

        A repetition must not touch a kept storage's first version, which the user
        holds. If one of its calls writes over the result of another, it writes over
        the repetition's own.
        """
        fresh: dict[_Key, Node] = {}
        views: dict[Node, Node] = {}
        own = {
            storage_id(carrier.meta["val"]): k
            for k in code.outputs
            for carrier in self._captured.carriers[k]
        }
        for old, new in code.clones:
            for carrier in self._captured.carriers[new]:
                source = self._lookup(carrier, old)
                if (self._moment, old, new) not in self._in_place:
                    copy = self._call(aten.clone.default, (source,), {}, f"{carrier.name}_copy")
                    source = _with_memory(copy, carrier)
                fresh[new, carrier] = source
        for k in code.blanks:
            for carrier in self._captured.carriers[k]:
                fresh[k, carrier] = self._blank(carrier)

        def own_value(node: Node, k: int) -> Node:
            if node in self._captured.carriers[k]:
                return fresh[k, node]
            if node not in views:
                args = map_arg(node.args, lambda n: own_value(n, k))
                kwargs = map_arg(node.kwargs, lambda n: own_value(n, k))
                views[node] = self._call_like(node, args, kwargs)
            return views[node]

        def argument(node: Node) -> Node:
            k = own.get(storage_id(node.meta["val"]))
            return self._read(node, code.reads[node]) if k is None else own_value(node, k)

        replayed = None if first else self._captured.state_of.get(v)
        drawing = [] if replayed is None else [call for call in code.calls if draws(call)]
        for call in code.calls:
            given = call.args if first else repeated_arguments(call.target, call.args)
            args = map_arg(given, argument)
            kwargs = map_arg(call.kwargs, argument)
            if replayed is not None and call in drawing[:1]:
                state = self._carrier(*self._state_key(replayed))
                where = self._generator()
                rewind = REWINDS[self._captured.device_type]
                before = self._call(rewind, (state, *where), {}, "generator_before")
            result = self._call_like(call, args, kwargs, given)
            if call in drawing[-1:]:  # each goes on where the last ended
                resume = RESUMES[self._captured.device_type]
                self._call(resume, (before, *where), {}, "generator_after")
            fresh.update(self._owned(call, result, own))
        for (k, carrier), value in fresh.items():
            self._set(k, carrier, value)

    def _blank(self, carrier: Node) -> Node:
        """Memory like that of a carrier; a call writes to it before anybody reads it."""
        like = carrier.meta["val"]
        args = (list(like.shape), list(like.stride()))
        kwargs = {"dtype": like.dtype, "device": like.device}
        blank = self._call(aten.empty_strided.default, args, kwargs, f"{carrier.name}_again")
        return _with_memory(blank, carrier)

    def _owned(self, call: Node, result: Node, own: dict[int, int]) -> dict[_Key, Node]:
        """The results of a call that own memory."""
        if isinstance(call.meta["val"], torch.Tensor):
            k = own.get(storage_id(call.meta["val"]))
            return {(k, call): result} if k is not None and self._carries(k, call) else {}
        owned = {}
        for item in call.users:
            if item.target is not operator.getitem:
                continue
            k = own.get(storage_id(item.meta["val"]))
            if k is not None and self._carries(k, item):
                value = self._call(operator.getitem, (result, item.args[1]), {}, item.name)
                owned[k, item] = _with_memory(value, item)
        return owned

    def _carries(self, k: int, node: Node) -> bool:
        return node in self._captured.carriers[k]

    def _state_key(self, v: int) -> _Key:
        k = self._captured.graph.operators[v].outputs[0]
        return k, self._captured.state_node

    def _record_state(self, v: int) -> None:
        read = READS[self._captured.device_type]
        state = self._call(read, self._generator(), {}, "generator_state")
        self._values[self._state_key(v)] = state

    def _generator(self) -> tuple[torch.device, ...]:
        """The device whose generator is used: each CUDA device has its own."""
        device = self._captured.target.torch_device
        return (device,) if device.type == "cuda" else ()

    def _call_like(self, call: Node, args: Any, kwargs: Any, given: tuple | None = None) -> Node:
        """A call of the traced step, on the values that stand for its arguments here.

        ``given`` replaces its own arguments, for repetitions that need others.
        """
        fast = fast_call(call.target, call.args if given is None else given, call.kwargs)
        node = self._call(call.target if fast is None else fast, args, kwargs, call.name)
        node.meta["operator"] = call.target
        return _with_memory(node, call)

    def _call(self, target: Any, args: Any, kwargs: Any, name: str) -> Node:
        kind = "call_method" if isinstance(target, str) else "call_function"
        node = self.graph.create_node(kind, target, tuple(args), dict(kwargs), name)
        node.meta["moment"] = self._moment  # the run of the schedule that it belongs to
        if isinstance(target, OpOverload):
            node.meta["operator"] = target
        if self._first_call is None:
            self._first_call = node
        return node


def _with_memory(node: Node, like: Node) -> Node:
    """Note in an emitted node its stand-in and which memory it is in: the traced node's."""
    value = like.meta.get("val")
    node.meta["val"] = value
    node.meta["memory"] = storage_id(value) if isinstance(value, torch.Tensor) else None
    return node


def _held(placeholder: Node) -> Node:
    """Note in an input that others hold it, so that its last use frees nothing."""
    placeholder.meta["held"] = True
    return placeholder


def _first_alike(node: Node, carriers: Collection[Node]) -> Node:
    """The first view between a carrier and ``node`` with the same offset and layout."""
    wanted, first = _layout(node), node
    while node not in carriers and isinstance(source := node.args[0], Node):
        node = source
        if _layout(node) == wanted:
            first = node
    return first


def _layout(node: Node) -> Any:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):  # several results at once
        return None
    return (
        value.shape,
        value.stride(),
        value.storage_offset(),
        value.dtype,
        value.is_conj(),
        value.is_neg(),
    )


# -- generated code ----------------------------------------------------------------


class BoxedCodeGen(CodeGen):
    """Generates code that takes its arguments in one list and empties it.

    The code then holds the only references, and can free each argument at its last use.
    """

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **_: Any) -> str:
        names = [v.split(":")[0].split("=")[0].strip() for v in free_vars if v != "self"]
        lines = [f"def {self._func_name}(self, boxed){maybe_return_annotation}:"]
        if names:
            lines += [f"    {', '.join(names)}, = boxed", "    boxed.clear()"]
        return "\n".join(lines)


def compile_boxed(graph: Graph, name: str) -> GraphModule:
    """Compile a graph to code that takes one list of tensors and empties it."""
    graph.set_codegen(BoxedCodeGen())
    graph.lint()
    return GraphModule(torch.nn.Module(), graph, class_name=name)
