"""Compile what can be compiled of a plan's graphs, within the plan's budget.

A plan fixes what runs when, and what is there in between. So its graphs are not partitioned
again: stretches of them (:mod:`planner.compiled.stretches`) are compiled, each as one function
in the place of its calls, and everything else stays as it is. A stretch's code is taken only
if its peak, above what the plan holds when it begins, stays within the budget; otherwise
its halves are tried. After a stretch the plan's memory is that of eager calls, so each
stretch can be judged alone, and the peak of the whole step is never above the budget.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from graph_capture.private_torch.autograd import set_grad_enabled

from ..errors import PlanError
from ..plan_record import PlanRecord
from ..running.compiled_calls import CompiledCalls
from ..running.out_of_memory import memory_before
from ..running.rewrite import compile_boxed
from .compiled_stretch import ReadStretch, StretchCompiler
from .generated import Boxed
from .planned_values import PlannedValues
from .stretches import NO_ROOM, Stretch, Stretches

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Room:
    """What is in memory while a plan runs, and how much may be.

    Parameters
    ----------
    plan
        Of the whole step.
    run_of
        For each run of a plan inside a block the step's run; ``None`` where they are the same.
    """

    plan: PlanRecord
    run_of: tuple[int, ...] | None = None

    @classmethod
    def of_block(cls, step: PlanRecord, block: PlanRecord, path: str) -> Room:
        """The room of a block's plan within the step."""
        place = {op.name: v for v, op in enumerate(step.graph.operators)}
        own = {place[f"{path}/{op.name}"] for op in block.graph.operators if op.phase != "loss"}
        runs = (i for i, v in enumerate(step.schedule.order) if v in own)
        phases = (block.graph.operators[v].phase for v in block.schedule.order)
        return cls(plan=step, run_of=tuple(-1 if p == "loss" else next(runs) for p in phases))

    @property
    def usable_bytes(self) -> int:
        """The budget without its headroom."""
        return self.plan.budget_bytes - self.plan.headroom_bytes

    def before(self, moment: int) -> int:
        """Bytes in memory before a run."""
        return memory_before(self.plan, self.run(moment))

    def during(self, moment: int) -> int:
        """The most bytes in memory while a run is in progress."""
        return self.plan.replay.memory_bytes[self.run(moment)]

    def run(self, moment: int) -> int:
        """The step's run at a moment of the plan; below 0 for none."""
        return moment if self.run_of is None else self.run_of[moment]


class PlannedCompiler:
    """Compiles the graphs of plans; one for each model that a plan is applied to.

    Parameters
    ----------
    room
        What is in memory as the plan runs, where the plan's own replay does not say so.

    Attributes
    ----------
    taken
        The stretches that were taken, in order, for reports and tests.
    """

    def __init__(self, room: Room | None = None) -> None:
        self._room = room
        self._stretches = StretchCompiler()
        self.taken: list[ReadStretch] = []

    def __reduce__(self) -> Any:  # a copy of a planned model compiles again
        return PlannedCompiler, (self._room,)

    def __call__(self, plan: PlanRecord, graph: GraphModule) -> tuple[GraphModule, CompiledCalls]:
        """Return a graph that does the same, and what of it is compiled.

        Parameters
        ----------
        graph
            The forward graph of a plan, its backward graph, or a part of that.
        """
        values = PlannedValues(graph.graph)
        stretches = Stretches(values)
        room = self._room or Room(plan=plan)
        read_of: dict[Stretch, ReadStretch] = {}

        def take(stretch: Stretch) -> str | None:
            read = self._stretches.read(values, stretch)
            if isinstance(read, str):
                return read
            if _before(room, values, stretch) + read.extra_bytes > room.usable_bytes:
                return NO_ROOM
            read_of[stretch] = read
            return None

        taken = stretches.find(take)
        self.taken += [read_of[stretch] for stretch in taken]
        functions = {stretch: self._stretches.compiled(read_of[stretch]) for stretch in taken}
        peaks = (_before(room, values, s) + read_of[s].extra_bytes for s in taken)
        found = CompiledCalls(
            stretches=len(taken),
            compiled=sum(len(stretch.calls) for stretch in taken),
            eager=dict(stretches.left),
            peak_bytes=max(peaks, default=0),
            runs=frozenset(map(room.run, _moments_inside(values, taken))),
        )
        logger.info("%s: %s", type(graph).__name__, found)
        return _written(values, functions, type(graph).__name__), found


def check_device(plan: PlanRecord) -> None:
    """Refuse to compile for a device on which generated code cannot be read.

    Raises
    ------
    PlanError
        Names the other way.
    """
    if plan.device_type != "cpu":
        raise PlanError(
            f"compile=True takes a plan for the CPU, and this one is for {plan.device_type}: the "
            "code that Inductor generates is read before it runs, which is done on the CPU only. "
            'Apply the plan without it, or let torch.compile(model, backend="remat") plan the step'
        )


def _before(room: Room, values: PlannedValues, stretch: Stretch) -> int:
    """Bytes in memory when a stretch begins; within a run, the most that the run holds."""
    first = stretch.calls[0]
    moment = first.meta["moment"]
    place = values.calls.index(first)
    if place and values.calls[place - 1].meta["moment"] == moment:
        return room.during(moment)
    return room.before(moment)


def _moments_inside(values: PlannedValues, taken: Sequence[Stretch]) -> set[int]:
    """Moments of which every call is in a stretch."""
    inside = {call for stretch in taken for call in stretch.calls}
    outside = {call.meta["moment"] for call in values.calls if call not in inside}
    return {call.meta["moment"] for call in inside} - outside


def _written(values: PlannedValues, functions: Mapping[Stretch, Boxed], name: str) -> GraphModule:
    """Write a planned graph with compiled functions in the place of stretches."""
    return _Writer(values, functions).write(name)


class _Writer:
    def __init__(self, values: PlannedValues, functions: Mapping[Stretch, Boxed]) -> None:
        self._values = values
        self._functions = functions
        self._graph = Graph()
        self._now: dict[Node, Node] = {}
        self._mode = values.first_mode

    def write(self, name: str) -> GraphModule:
        values = self._values
        for node in values.inputs:
            self._now[node] = self._graph.placeholder(str(node.target))
            self._now[node].meta = dict(node.meta)
        first = {stretch.calls[0]: stretch for stretch in self._functions}
        inside = {call for stretch in self._functions for call in stretch.calls}
        for call in values.calls:
            if call in first:
                self._stretch(first[call])
            elif call not in inside:
                self._eager(call)
        self._set_mode(values.mode)
        self._graph.output([self._value(node) for node in values.results])
        return compile_boxed(self._graph, name)

    def _value(self, node: Node) -> Node:
        node = self._values.as_written(node)
        if node not in self._now:
            assert self._values.is_view(node), node
            self._now[node] = self._graph.node_copy(node, self._value)
        return self._now[node]

    def _eager(self, call: Node) -> None:
        mode = self._values.modes[call]
        self._set_mode(self._values.first_mode if mode is None else mode)
        new = self._graph.node_copy(call, self._value)
        if self._values.as_written(call) is call:
            self._now[call] = new
        for item in call.users:
            if item.target is operator.getitem and not self._values.is_view(item):
                self._now[item] = self._graph.node_copy(item, self._now.__getitem__)

    def _set_mode(self, mode: bool | None) -> None:
        if mode is not None and mode != self._mode:
            self._graph.call_function(set_grad_enabled, (mode,))
            self._mode = mode

    def _stretch(self, stretch: Stretch) -> None:
        """A call of a compiled function; the list that it takes has the last references."""
        moment = stretch.calls[0].meta["moment"]
        args = tuple(self._value(root) for root in stretch.takes)
        boxed = self._graph.call_function(_listed, args)
        results = self._graph.call_function(_named(self._functions[stretch]), (boxed,))
        boxed.meta["moment"] = results.meta["moment"] = moment
        for i, root in enumerate(stretch.gives):
            self._now[root] = self._graph.call_function(operator.getitem, (results, i))
            self._now[root].meta = dict(root.meta)


def _listed(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return list(tensors)


def _named(function: Boxed) -> Any:
    """A function with a name, which torch.fx asks for."""

    def compiled_stretch(boxed: list[torch.Tensor]) -> Any:
        return function(boxed)

    return compiled_stretch


__all__ = ["PlannedCompiler", "check_device"]
