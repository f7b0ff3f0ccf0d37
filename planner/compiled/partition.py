"""The partition function: from a joint graph to forward and backward within the budget."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from graph_capture.calls.storage_id import storage_id
from graph_capture.private_torch.compiler import min_cut_partition
from graph_capture.private_torch.fake_tensors import FakeTensor
from graph_capture.units import format_bytes

from ..errors import InfeasibleBudgetError, PlanWarning
from .choose import Graphs
from .compiled_plan import CompiledPlan
from .graph_plan import for_eager_kernels, for_inductor
from .joint_step import JointStep, read_joint_step, tensors_of
from .lowered_peak import copied
from .options import CompiledOptions
from .pending_calls import PlannedGraph
from .priced_step import device_of
from .repeated_calls import RepeatedCalls, held_by_others
from .sizes import concrete, num_bytes, plan_for_largest
from .step_so_far import Part, StepSoFar

logger = logging.getLogger(__name__)


class Partitioner:
    """Splits joint graphs within a budget; called by AOTAutograd.

    Parameters
    ----------
    options
        Budget and more.
    so_far
        The graphs of the same step that were compiled before.

    Attributes
    ----------
    inputs
        Of the graph that is compiled next; ``None`` if only the graph itself can show which of
        them come from another graph, by inputs beside the parameters that get a gradient.
    was_asked
        Whether AOTAutograd had a joint graph to split.
    planned
        What the calls of the graph that was split last are compared with.
    """

    def __init__(self, options: CompiledOptions, *, so_far: StepSoFar) -> None:
        self._options = options
        self._so_far = so_far
        self.inputs: Sequence[torch.Tensor] | None = None
        self.was_asked = False
        self.planned: PlannedGraph | None = None

    def compiled(
        self, compile_graph: Callable[[], Callable[..., Any]], inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        """Compile a graph of Dynamo's, and compare its calls with the plan if one was made."""
        self.inputs = [t for t in inputs if isinstance(t, torch.Tensor)]
        self.was_asked, self.planned = False, None
        try:
            function = compile_graph()
        finally:
            self.inputs = None  # a batch, and what it was computed from
        if self.planned is None:
            return function
        return self._so_far.calls.watched(self.planned, function)

    def __call__(
        self,
        module: GraphModule,
        joint_inputs: Sequence[Any],
        *,
        num_fwd_outputs: int,
        static_lifetime_input_indices: Sequence[int] | None = None,
        **_others: Any,
    ) -> tuple[GraphModule, GraphModule]:
        begin_s, self.was_asked = time.perf_counter(), True
        step = read_joint_step(module, num_fwd_outputs)
        static = frozenset(static_lifetime_input_indices or ())
        place = self._place(step, static)
        _warn_of(place, self._options)
        plan_for_largest(step)
        try:
            plan, graphs = self._planned(
                step, place, module, joint_inputs, static_lifetime_input_indices
            )
        except InfeasibleBudgetError as error:
            if place.has_loss and not place.goes_on:
                raise
            raise InfeasibleBudgetError(
                f"{error} {LEAST_OF_A_PART}",
                budget_bytes=error.budget_bytes,
                min_budget_bytes=error.min_budget_bytes,
                lower_bound_bytes=error.lower_bound_bytes,
            ) from None
        plan = replace(plan, planning_s=time.perf_counter() - begin_s)
        logger.info("%s", plan)
        self._note(plan, place, device_of(step), num_results=len(step.tangents))
        if self._options.on_plan is not None:
            self._options.on_plan(plan)
        return graphs

    def _place(self, step: JointStep, static: frozenset[int]) -> _Place:
        asked, taken_bytes = self._options, self._taken_bytes(step, static)
        if not taken_bytes:
            self._so_far.parts.clear()
        others_bytes = self._held_bytes(taken_bytes, device_of(step))
        results = [t.numel() for n in step.tangents for t in tensors_of(n.meta["val"])]
        is_layer = asked.calls > 1 and max(results, default=0) > 1  # it may have a loss of its own
        has_loss = not is_layer and any(numel <= 1 for numel in results)
        if not has_loss:
            others_bytes += asked.later_bytes
        return _Place(
            taken_bytes=taken_bytes,
            others_bytes=others_bytes,
            is_layer=is_layer,
            has_loss=has_loss,
            calls=RepeatedCalls(
                num_calls=max(1, asked.calls - self._num_waiting),
                weight_bytes=_weight_bytes(step, static),
                gradient_bytes=max(0, _gradient_bytes(step) - sum(taken_bytes)),
                taken_bytes=sum(taken_bytes) if asked.outputs == "released" else 0,
                accumulates=asked.grads == "accumulated",
            ),
        )

    def _taken_bytes(self, step: JointStep, static: frozenset[int]) -> list[int]:
        """Of each input that another graph, or plain Python, made in the same step."""
        if self.inputs is not None:
            return [num_bytes(t) for t in self.inputs if t.requires_grad and not t.is_leaf]
        return [
            num_bytes(tensor)
            for i, gradient in enumerate(step.gradients)
            if isinstance(gradient, Node) and i not in static
            for tensor in tensors_of(step.primals[i].meta["val"])
        ]

    def _note(
        self, plan: CompiledPlan, place: _Place, device: torch.device, *, num_results: int
    ) -> None:
        """Keep what later graphs of the step, and calls of this one, are compared with."""
        asked, repeated_bytes = self._options, held_by_others(plan.graph)
        others_bytes = place.others_bytes + repeated_bytes
        part = Part.of(plan, others_bytes + asked.resident_bytes)
        if self._runs_at_once:
            self._so_far.parts.append(part)
        else:
            self._so_far.add(part, place.taken_bytes, plan.usable_bytes, asked.later_bytes)
        self.planned = PlannedGraph(
            device=device,
            peak_bytes=plan.predicted_peak_bytes,
            others_bytes=others_bytes,
            usable_bytes=plan.usable_bytes,
            saved_bytes=plan.saved_bytes,
            output_bytes=plan.held_output_bytes if place.has_loss else 0,
            accumulates=asked.grads == "accumulated",
            has_loss=place.has_loss,
            has_more=place.has_loss and num_results > 1,
            resident_bytes=asked.resident_bytes,
            later_bytes=asked.later_bytes,
        )

    @property
    def _runs_at_once(self) -> bool:
        """Whether the graph is compiled for a call that is to run, as earlier graphs have."""
        return self.inputs is not None and not any(isinstance(t, FakeTensor) for t in self.inputs)

    @property
    def _num_waiting(self) -> int:
        """How many calls of the step wait for their backward pass."""
        if self._runs_at_once:
            return self._so_far.calls.num_waiting
        return len(self._so_far.parts)

    def _held_bytes(self, taken_bytes: Sequence[int], device: torch.device) -> int:
        """What earlier graphs of the step hold, beside what this one takes from them."""
        if not self._runs_at_once:
            return self._so_far.held_bytes(taken_bytes)
        assert self.inputs is not None
        accumulates = self._options.grads == "accumulated"
        return self._so_far.calls.held_bytes(self.inputs, device, accumulates=accumulates)

    def _planned(
        self,
        step: JointStep,
        place: _Place,
        module: GraphModule,
        joint_inputs: Sequence[Any],
        static: Sequence[int] | None,
    ) -> tuple[CompiledPlan, Graphs]:
        asked, calls = self._options, place.calls
        older_bytes = calls.gradient_bytes if calls.accumulates else 0
        resident_bytes = asked.resident_bytes + place.others_bytes + older_bytes
        options = replace(asked, resident_bytes=resident_bytes)
        if options.lower == "aot_eager":
            return for_eager_kernels(step, options, calls)

        def own() -> Graphs:
            forward, backward = min_cut_partition(
                copied(module),
                joint_inputs,
                num_fwd_outputs=len(step.outputs),
                static_lifetime_input_indices=static,
            )
            return forward, backward

        return for_inductor(step, options, calls, own)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """What a graph has to do with the rest of its step.

    Parameters
    ----------
    taken_bytes
        Of each input that was made in the same step, outside of the graph.
    others_bytes
        What other graphs hold while this one runs, ``later_bytes`` included.
    is_layer
        Whether it is one of the calls that the option ``calls`` counts.
    has_loss
        Whether the loss is computed in it.
    calls
        How often it runs.
    """

    taken_bytes: Sequence[int]
    others_bytes: int
    is_layer: bool
    has_loss: bool
    calls: RepeatedCalls

    @property
    def goes_on(self) -> bool:
        """Whether something of the step comes before it."""
        return bool(self.taken_bytes)


def _gradient_bytes(step: JointStep) -> int:
    """Bytes of one gradient for each input of the step that gets one."""
    given = [p for p, g in zip(step.primals, step.gradients) if isinstance(g, Node)]
    tensors = [concrete(t) for p in given for t in tensors_of(p.meta["val"])]
    return sum(t.numel() * t.element_size() for t in tensors)


def _weight_bytes(step: JointStep, static: frozenset[int]) -> int:
    """Bytes of the parameters and buffers among the inputs of the step, each memory once."""
    tensors = [t for i in static for t in tensors_of(step.primals[i].meta["val"])]
    return sum({storage_id(t): num_bytes(t) for t in tensors}.values())


PART_OF_A_STEP = (
    "a compiled graph is only a part of the training step: the loss is computed outside of it, or "
    "another graph comes before it (a graph break). Its plan counts neither their memory nor "
    "their time, so the bound and the budget hold for each graph alone. Compile the model with its "
    "loss and without graph breaks (fullgraph=True shows them), or say what else there is by "
    "resident_bytes="
)


LEAST_OF_A_PART = (
    "This is only a part of a training step: the least budget named is that of this graph and what "
    "is saved before it. Later graphs may need more, and so may what runs as plain Python."
)

AFTER_A_BREAK = (
    "a graph break cuts the training step: the plan of this graph counts {held} that other graphs "
    "hold, but not their time, so its bound speaks of this graph alone. fullgraph=True shows breaks"
)


ONE_OF_SEVERAL_CALLS = (
    "compiled graphs run {calls} times in the training step: their plans count all of these calls, "
    "but not what is computed outside of them, such as the loss. Say what that holds by "
    "resident_bytes="
)


def _warn_of(place: _Place, options: CompiledOptions) -> None:
    """Say what the plan of a graph leaves out."""
    said = None
    if place.is_layer:
        if not options.resident_bytes:
            said = ONE_OF_SEVERAL_CALLS.format(calls=options.calls)
    elif place.goes_on and place.others_bytes:
        said = AFTER_A_BREAK.format(held=format_bytes(place.others_bytes))
    elif place.goes_on or not place.has_loss:
        said = PART_OF_A_STEP
    if said is not None:
        warnings.warn(said, PlanWarning, stacklevel=2)


__all__ = ["PART_OF_A_STEP", "Partitioner"]
