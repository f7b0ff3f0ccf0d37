"""Write a joint graph as a cost graph: operators, the memory they make, and what both cost.

Operators are groups of calls. With eager kernels a group is one call; under Inductor it is what
becomes one kernel (:mod:`planner.compiled.fused_groups`), and what lies inside a group takes no
memory. Between forward and backward stands one more operator, the *turn*: the caller's part of
the step, which makes the gradients of the outputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from graph_capture.calls.draws import draws
from graph_capture.calls.storage_id import storage_id
from graph_capture.cost_graph import Category, CostGraph, Operator, Phase, Storage
from graph_capture.costs.allocator import block_bytes
from graph_capture.costs.cost_model import Call
from graph_capture.costs.devices import device_for
from graph_capture.costs.library_workspace import STORAGE_NAME, library_workspace_bytes
from graph_capture.costs.roofline import LONGEST_TRIAL_NS, Roofline
from graph_capture.costs.workspace import WorkspaceProbe
from graph_capture.errors import CaptureError
from graph_capture.private_torch.compiler import frees_tangents
from graph_capture.private_torch.dispatch import disable_current_modes
from graph_capture.private_torch.operators import OpOverload, schema_of
from graph_capture.private_torch.trees import tree_map
from solvers.replay import replay
from solvers.schedule import Schedule

from .joint_step import JointStep, is_number, is_tangent, tensors_of, written_nodes
from .sizes import concrete, num_bytes
from .subgraphs import inside_bytes

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class PricedStep:
    """A joint step and its cost graph.

    Parameters
    ----------
    step
        The joint graph.
    graph
        Its operators are in the order of ``groups``.
    groups
        The calls of each operator; none for the turn and for records of a generator's state.
    turn
        The operator between forward and backward.
    state_of
        For each operator that draws, the one that records the generator's state.
    state_nodes
        For each that records a state, a node that stands for it; the joint graph has none.
    storage_of
        From the identity of a memory to its storage; what lies inside a group has none.
    device
        Whose memory is counted.
    """

    step: JointStep
    graph: CostGraph
    groups: tuple[tuple[Node, ...], ...]
    turn: int
    state_of: Mapping[int, int]
    state_nodes: Mapping[int, Node]
    storage_of: Mapping[int, int]
    device: torch.device


def without_unused_states(priced: PricedStep, schedule: Schedule) -> CostGraph:
    """The cost graph of the graphs that are emitted: no state is recorded for a draw that
    does not run again."""
    graph, repeated = priced.graph, schedule.recomputed()
    unused = {s for v, s in priced.state_of.items() if v not in repeated}
    storages = tuple(
        replace(storage, size_bytes=0) if storage.producer in unused else storage
        for storage in graph.storages
    )
    return CostGraph(graph.operators, storages)


def unplanned_peak_bytes(priced: PricedStep) -> int:
    """The peak of the step that keeps everything."""
    everything = Schedule.keep_all(priced.graph)
    return replay(without_unused_states(priced, everything), everything).peak_bytes


GroupCost = Callable[[Sequence[Node], Sequence[Node]], int | None]
"""Nanoseconds of a group, from its calls and the nodes outside of it that they read."""


def price_step(
    step: JointStep,
    *,
    groups: Sequence[Sequence[Node]] | None = None,
    inner: frozenset[int] = frozenset(),
    replays_draws: bool = True,
    resident_bytes: int = 0,
    scratch: bool = True,
    group_ns: GroupCost | None = None,
    releases_outputs: bool = False,
) -> PricedStep:
    """Return the cost graph of a joint step.

    Parameters
    ----------
    groups
        The calls of each operator, in base order; ``None`` for one call each.
    inner
        Memory that lies inside of a group.
    replays_draws
        Whether a call that draws may run again, on the generator's recorded state.
    resident_bytes
        What else the caller has on the device.
    scratch
        Whether the scratch memory of kernels is measured.
    group_ns
        Time of a group of several calls, or of one that is elementwise or reduces; ``None``
        from it, or in its place, for the sum of its calls by the roofline.
    releases_outputs
        Whether the caller lets go of what forward returns, but for the loss, when forward ends.
    """
    with disable_current_modes():  # AOTAutograd partitions under its fake tensors' mode
        return _Pricing(step, inner, replays_draws, scratch, group_ns, releases_outputs).finish(
            [tuple(g) for g in groups] if groups is not None else [(n,) for n in step.calls],
            resident_bytes,
        )


def device_of(step: JointStep) -> torch.device:
    """The one device of a step, beside which numbers may lie on the CPU.

    Raises
    ------
    CaptureError
        When there are several.
    """
    found = {t.device for n in step.module.graph.nodes for t in tensors_of(n.meta.get("val"))}
    others = {d for d in found if d.type not in ("cpu", "meta")}
    if len(others) > 1:
        names = ", ".join(sorted(map(str, others)))
        raise CaptureError(f"a compiled graph lies on several devices ({names}); plan one each")
    return others.pop() if others else torch.device("cpu")


class _Pricing:
    """Gives operators and storages their indices, sizes and costs."""

    def __init__(
        self,
        step: JointStep,
        inner: frozenset[int],
        replays_draws: bool,
        scratch: bool,
        group_ns: GroupCost | None,
        releases_outputs: bool,
    ) -> None:
        self._step = step
        self._inner = inner
        self._replays_draws = replays_draws
        self._group_ns = group_ns
        self._device = device_of(step)
        entry = device_for(self._device.type)
        self._entry = entry
        self._roofline = Roofline(entry)
        self._probe = WorkspaceProbe(
            self._device,
            at_hand=True,
            scratch=scratch,
            too_long=lambda call: self._roofline.time_ns(call) > LONGEST_TRIAL_NS,
        )
        self._operators: list[Operator] = []
        self._storages: list[Storage] = []
        self._groups: list[tuple[Node, ...]] = []
        self._storage_of: dict[int, int] = {}
        self._state_of: dict[int, int] = {}
        self._state_nodes: dict[int, Node] = {}
        self._outputs = _memories(step.outputs)
        self._gradients = _memories(step.gradients)
        held = [n for n in step.outputs if not releases_outputs or _is_scalar(n)]
        self._kept = _memories(held) | self._gradients

    def finish(self, groups: list[tuple[Node, ...]], resident_bytes: int) -> PricedStep:
        step = self._step
        for node in step.module.graph.nodes:
            if (node.op == "placeholder" and not is_tangent(node)) or node.op == "get_attr":
                self._add_resident(node)
        targets = [call.target for call in step.calls if isinstance(call.target, OpOverload)]
        workspace_bytes = library_workspace_bytes(targets, self._entry)
        if workspace_bytes:
            self._add(STORAGE_NAME, workspace_bytes, None, "buffer")
        if resident_bytes:
            self._add("held by the caller", resident_bytes, None, "resident")
        forward = set(step.calls[: step.num_forward])
        turn = -1
        for group in groups:
            if turn < 0 and group[-1] not in forward:
                turn = self._add_turn()
            self._add_group(group, "forward" if turn < 0 else "backward")
        if turn < 0:
            turn = self._add_turn()
        return PricedStep(
            step=step,
            graph=CostGraph(tuple(self._operators), tuple(self._storages)),
            groups=tuple(self._groups),
            turn=turn,
            state_of=self._state_of,
            state_nodes=self._state_nodes,
            storage_of=self._storage_of,
            device=self._device,
        )

    # -- operators ---------------------------------------------------------------------

    def _add_group(self, group: tuple[Node, ...], phase: Phase) -> None:
        own = {storage_id(t) for call in group for t in tensors_of(call.meta["val"])}
        read = [n for call in group for n in call.all_input_nodes]
        inputs = {
            self._storage_of[s] for n in read for s in _memories([n]) if s in self._storage_of
        }
        pinned = self._why_once(group)
        drawing = any(map(draws, group))
        if drawing and pinned is None:
            inputs.add(self._add_state(group[-1], phase))
            self._state_of[len(self._operators)] = len(self._operators) - 1
        v = len(self._operators)
        records = [self._record(call) for call in group]
        outputs = [
            self._add_memory(call.name, t, v, "activation", size_bytes=size_bytes)
            for call, record in zip(group, records)
            for t, size_bytes in self._sized(call, record)
            if storage_id(t) not in self._storage_of and storage_id(t) not in self._inner
        ]
        last = group[-1]
        outside = [n for n in read if not own & set(_memories([n]))]
        cost_ns = None if self._group_ns is None else self._group_ns(group, outside)
        if cost_ns is None:
            cost_ns = sum(self._time_ns(call, record) for call, record in zip(group, records))
        self._groups.append(group)
        self._operators.append(
            Operator(
                name=last.name,
                target="+".join(str(call.target) for call in group),
                inputs=tuple(sorted(inputs)),
                outputs=tuple(dict.fromkeys(outputs)),
                cost_ns=cost_ns,
                workspace_bytes=max(map(self._scratch_bytes, group, records)),
                phase=phase,
                pinned=pinned,
                ordered=drawing or any(written_nodes(call) for call in group),
                module_path=_module_path(last),
                source=_source(last),
            )
        )

    def _scratch_bytes(self, call: Node, record: Call | None) -> int:
        if record is not None:
            return self._probe.bytes_of(record)
        return inside_bytes(self._step.module, call) if self._group_ns is None else 0

    def _sized(self, call: Node, record: Call | None) -> Iterator[tuple[torch.Tensor, int | None]]:
        """What a call returns, with the real bytes of what stand-ins know nothing of."""
        returned = list(tensors_of(call.meta["val"]))
        sizes = None
        if record is not None:
            sizes = self._probe.output_bytes(record.func, record.args, record.kwargs)
        return zip(returned, sizes or [None] * len(returned), strict=True)

    def _why_once(self, group: tuple[Node, ...]) -> str | None:
        for call in group:
            if not isinstance(call.target, OpOverload):
                return "what it does inside is not known"
            written = written_nodes(call)
            if written:
                return f"writes to {written[0].name}"
            if draws(call) and not self._replays_draws:
                return "draws random numbers"
            if schema_of(call.target).name.startswith(("_c10d_functional::", "aten::_assert")):
                return "all processes take part in it, or it checks something"
            changed = self._step.written.keys() & {
                s for n in call.all_input_nodes for s in _memories([n])
            }
            if changed and not _ignores_running_statistics(call):
                return f"reads {self._step.written[min(changed)].args[0]}, which is written to"
        return None

    def _add_state(self, drawing: Node, phase: Phase) -> int:
        """The generator's state before a draw, which lies in host memory."""
        v = len(self._operators)
        state_bytes = _state_size(self._device) if self._device.type == "cpu" else 0
        k = self._add(f"generator_state_{v}", state_bytes, v, "activation")
        like = next(t for t in tensors_of(drawing.meta["val"]))
        state = self._state_nodes[v] = Graph().placeholder(f"generator_state_{v}")
        with like.fake_mode:  # type: ignore[attr-defined]
            state.meta["val"] = torch.empty(_state_size(self._device), dtype=torch.uint8)
        self._groups.append(())
        self._operators.append(
            Operator(
                name=f"generator_state_{v}",
                target="get_rng_state",
                outputs=(k,),
                phase=phase,
                pinned="the state of the generator at this moment",
                ordered=True,
                module_path=_module_path(drawing),
            )
        )
        return k

    def _add_turn(self) -> int:
        """The caller's part: from the outputs to their gradients."""
        v = len(self._operators)
        read = {self._storage_of[s] for s in self._outputs if s in self._storage_of}
        tangents = [(n, t) for n in self._step.tangents for t in tensors_of(n.meta["val"])]
        has_loss = any(concrete(t).numel() <= 1 for _, t in tangents)
        made = []
        for node, tensor in tangents:
            # Scalars and what the caller passes to backward() are held by others. Where there is
            # a loss, the gradients of other outputs are zeros of AOTAutograd's own.
            kept = not (has_loss and frees_tangents() and concrete(tensor).numel() > 1)
            made.append(self._add_memory(node.name, tensor, v, "gradient", kept))
        self._groups.append(())
        self._operators.append(
            Operator(
                name="between forward and backward",
                target="the caller's loss and backward()",
                inputs=tuple(sorted(read)),
                outputs=tuple(made),
                phase="loss",
                pinned="it belongs to the training loop",
                ordered=True,
            )
        )
        return v

    def _record(self, call: Node) -> Call | None:
        if not isinstance(call.target, OpOverload):
            return None
        args, kwargs = tree_map(_value_of, (call.args, call.kwargs))
        return Call(
            func=call.target, args=args, kwargs=kwargs, out=tree_map(concrete, call.meta["val"])
        )

    def _time_ns(self, call: Node, record: Call | None) -> int:
        if record is not None:
            return self._roofline.time_ns(record)
        touched = [t for n in (*call.all_input_nodes, call) for t in tensors_of(n.meta.get("val"))]
        moved_bytes = sum(num_bytes(t) for t in touched)
        return max(self._entry.launch_ns, round(moved_bytes / self._entry.bytes_per_s * 1e9))

    # -- storages ----------------------------------------------------------------------

    def _add_resident(self, node: Node) -> None:
        for tensor in tensors_of(node.meta.get("val")):
            if storage_id(tensor) not in self._storage_of:
                category: Category = "parameter" if node.op == "placeholder" else "buffer"
                self._add_memory(node.name, tensor, None, category)

    def _add_memory(
        self,
        name: str,
        tensor: torch.Tensor,
        producer: int | None,
        category: Category,
        kept: bool = False,
        *,
        size_bytes: int | None = None,
    ) -> int:
        memory = storage_id(tensor)
        counts = tensor.device == self._device
        own_bytes = num_bytes(tensor) if size_bytes is None else size_bytes
        size_bytes = block_bytes(own_bytes, self._device.type) if counts else 0
        if producer is not None and memory in self._outputs | self._gradients:
            kept = memory in self._kept
            category = "output" if memory in self._outputs else "gradient"
        k = self._add(name, size_bytes, producer, category, kept)
        self._storage_of[memory] = k
        return k

    def _add(
        self,
        name: str,
        size_bytes: int,
        producer: int | None,
        category: Category,
        kept: bool = False,
    ) -> int:
        k = len(self._storages)
        taken = name if all(s.name != name for s in self._storages) else f"{name}.{k}"
        self._storages.append(
            Storage(
                name=taken, size_bytes=size_bytes, producer=producer, category=category, kept=kept
            )
        )
        return k


# Batch normalization, functional: in training its results other than the new running
# statistics, which forward alone writes back, do not depend on the old ones.
_WITH_RUNNING_STATISTICS = {"aten::_native_batch_norm_legit_functional"}


def _ignores_running_statistics(call: Node) -> bool:
    assert isinstance(call.target, OpOverload)
    name = schema_of(call.target).name
    return name in _WITH_RUNNING_STATISTICS and call.args[5] is True


def _state_size(device: torch.device) -> int:
    """Bytes of a generator's state, which lies in host memory."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return state.numel()


def _is_scalar(value: Any) -> bool:
    made = value.meta.get("val") if isinstance(value, Node) else None
    return isinstance(made, torch.Tensor) and concrete(made).numel() <= 1


def _memories(values: Sequence[Any]) -> set[int]:
    nodes = [v for v in values if isinstance(v, Node) and not is_number(v)]
    return {storage_id(t) for n in nodes for t in tensors_of(n.meta.get("val"))}


def _value_of(argument: Any) -> Any:
    return tree_map(concrete, argument.meta.get("val")) if isinstance(argument, Node) else argument


_DYNAMOS_NAME = re.compile(r"^[LG]\['\w+'\]\.?")


def _module_path(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    found = [entry[0] for entry in stack.values()]
    return _DYNAMOS_NAME.sub("", found[-1]) if found else ""


def _source(node: Node) -> str:
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    return lines[-2] if len(lines) > 1 else ""


__all__ = [
    "GroupCost",
    "PricedStep",
    "device_of",
    "price_step",
    "unplanned_peak_bytes",
    "without_unused_states",
]
