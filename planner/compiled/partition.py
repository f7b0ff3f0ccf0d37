"""The partition function: from a joint graph to forward and backward within the budget."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from graph_capture.calls.storage_id import storage_id
from graph_capture.costs.devices import device_for
from graph_capture.private_torch.compiler import min_cut_partition
from graph_capture.private_torch.fake_tensors import FakeTensor
from graph_capture.units import format_bytes
from solvers.replay import replay
from solvers.schedule import Schedule

from ..base.budget import parse_headroom
from ..errors import InfeasibleBudgetError, PlanWarning
from .choose import Graphs, choose
from .compiled_plan import CompiledPlan
from .emit import emit
from .fused_groups import fuse, kernel_ns
from .joint_step import JointStep, read_joint_step, tensors_of
from .lowered_peak import copied, handed_over_bytes
from .options import CompiledOptions
from .pending_calls import PlannedGraph
from .priced_step import device_of, price_step, unplanned_peak_bytes, without_unused_states
from .readings import name_of
from .repeated_calls import (
    RepeatedCalls,
    counting,
    counting_everything,
    held_by_others,
    saved_bytes,
    share_among,
)
from .sizes import concrete, num_bytes, plan_for_largest
from .solve_step import solve_step
from .step_so_far import Part, StepSoFar
from .subgraphs import warn_of_loops

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
        asked, inputs = self._options, self.inputs
        if inputs is not None:
            taken = [t for t in inputs if t.requires_grad and not t.is_leaf]
            taken_bytes = [num_bytes(tensor) for tensor in taken]
        else:
            taken_bytes = [
                num_bytes(tensor)
                for i, gradient in enumerate(step.gradients)
                if isinstance(gradient, Node) and i not in static
                for tensor in tensors_of(step.primals[i].meta["val"])
            ]
        if not taken_bytes:
            self._so_far.parts.clear()
        others_bytes = self._held_bytes(taken_bytes, device_of(step))
        results = [t.numel() for n in step.tangents for t in tensors_of(n.meta["val"])]
        is_layer = asked.calls > 1 and max(results, default=0) > 1  # it may have a loss of its own
        has_loss = not is_layer and any(numel <= 1 for numel in results)
        if not has_loss:
            others_bytes += asked.later_bytes
        if not is_layer:
            _warn_of_parts(has_loss, bool(taken_bytes), others_bytes)
        elif not asked.resident_bytes:
            warnings.warn(ONE_OF_SEVERAL_CALLS.format(calls=asked.calls), PlanWarning, stacklevel=2)
        counted_bytes, others_bytes = others_bytes, others_bytes + asked.resident_bytes
        gradient_bytes = max(0, _gradient_bytes(step) - sum(taken_bytes))
        older_bytes = gradient_bytes if asked.grads == "accumulated" else 0
        options = replace(asked, resident_bytes=others_bytes + older_bytes)
        calls = RepeatedCalls(
            num_calls=max(1, asked.calls - self._num_waiting),
            weight_bytes=_weight_bytes(step, static),
            gradient_bytes=gradient_bytes,
            taken_bytes=sum(taken_bytes) if asked.outputs == "released" else 0,
            accumulates=asked.grads == "accumulated",
        )
        plan_for_largest(step)
        try:
            plan, graphs = self._planned(
                step, options, calls, module, joint_inputs, static_lifetime_input_indices
            )
        except InfeasibleBudgetError as error:
            if has_loss and not taken_bytes:
                raise
            raise InfeasibleBudgetError(
                f"{error} {LEAST_OF_A_PART}",
                budget_bytes=error.budget_bytes,
                min_budget_bytes=error.min_budget_bytes,
                lower_bound_bytes=error.lower_bound_bytes,
            ) from None
        plan = replace(plan, planning_s=time.perf_counter() - begin_s)
        logger.info("%s", plan)
        repeated_bytes = held_by_others(plan.graph)
        part = Part.of(plan, others_bytes + repeated_bytes)
        if self._runs_at_once:
            self._so_far.parts.append(part)
        else:
            self._so_far.add(part, taken_bytes, plan.usable_bytes, asked.later_bytes)
        self.planned = PlannedGraph(
            device=device_of(step),
            peak_bytes=plan.predicted_peak_bytes,
            others_bytes=counted_bytes + repeated_bytes,
            usable_bytes=plan.usable_bytes,
            saved_bytes=plan.saved_bytes,
            output_bytes=plan.held_output_bytes if has_loss else 0,
            accumulates=asked.grads == "accumulated",
            has_loss=has_loss,
            has_more=has_loss and len(step.tangents) > 1,
            resident_bytes=asked.resident_bytes,
            later_bytes=asked.later_bytes,
        )
        if asked.on_plan is not None:
            asked.on_plan(plan)
        return graphs

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
        options: CompiledOptions,
        calls: RepeatedCalls,
        module: GraphModule,
        joint_inputs: Sequence[Any],
        static: Sequence[int] | None,
    ) -> tuple[CompiledPlan, Graphs]:
        if options.lower == "aot_eager":
            return _for_eager_kernels(step, options, calls)

        def own() -> Graphs:
            forward, backward = min_cut_partition(
                copied(module),
                joint_inputs,
                num_fwd_outputs=len(step.outputs),
                static_lifetime_input_indices=static,
            )
            return forward, backward

        return _for_inductor(step, options, calls, own)


def _gradient_bytes(step: JointStep) -> int:
    """Bytes of one gradient for each input of the step that gets one."""
    given = [p for p, g in zip(step.primals, step.gradients) if isinstance(g, Node)]
    tensors = [concrete(t) for p in given for t in tensors_of(p.meta["val"])]
    return sum(t.numel() * t.element_size() for t in tensors)


def _weight_bytes(step: JointStep, static: frozenset[int]) -> int:
    """Bytes of the parameters and buffers among the inputs of the step, each memory once."""
    tensors = [t for i in static for t in tensors_of(step.primals[i].meta["val"])]
    return sum({storage_id(t): num_bytes(t) for t in tensors}.values())


def _for_eager_kernels(
    step: JointStep, options: CompiledOptions, calls: RepeatedCalls
) -> tuple[CompiledPlan, Graphs]:
    priced = price_step(
        step,
        resident_bytes=options.resident_bytes,
        releases_outputs=options.outputs == "released",
    )
    budget = parse_headroom(options.headroom, options.budget_bytes, priced.device.type)
    shared = share_among(priced, calls, budget, options.solving)
    result = solve_step(shared.priced, budget, options.solving, hint=shared.schedule)
    assert result.schedule is not None
    counted = counting(priced, calls, saved_bytes(priced, result.schedule))
    graph = without_unused_states(counted, result.schedule)
    plan = CompiledPlan(
        graph=graph,
        schedule=result.schedule,
        turn=priced.turn,
        lower=options.lower,
        budget_bytes=options.budget_bytes,
        headroom_bytes=budget.headroom_bytes,
        predicted_peak_bytes=replay(graph, result.schedule).peak_bytes,
        unplanned_peak_bytes=unplanned_peak_bytes(counting_everything(priced, calls)),
        lower_bound_ns=result.lower_bound_ns,
        status=result.status,
        solve_s=result.solve_s,
        notes=() if calls.num_calls == 1 else (OF_REPEATED_CALLS,),
    )
    return plan, emit(priced, result.schedule)


def _for_inductor(
    step: JointStep, options: CompiledOptions, calls: RepeatedCalls, own: Callable[[], Graphs]
) -> tuple[CompiledPlan, Graphs]:
    warn_of_loops(step.module, step.calls)
    fused = fuse(step)
    device = device_for(device_of(step).type)
    priced = price_step(
        step,
        groups=fused.groups,
        inner=fused.inner,
        replays_draws=False,
        resident_bytes=options.resident_bytes,
        releases_outputs=options.outputs == "released",
        group_ns=lambda group, outside: kernel_ns(group, outside, device),
    )
    budget = parse_headroom(options.headroom, options.budget_bytes, priced.device.type)
    kept_for = name_of(priced) if calls.num_calls > 1 else None
    shared = share_among(priced, calls, budget, options.solving, kept_for=kept_for)
    lowered = choose(shared.priced, budget, options, own)
    chosen = lowered.choice
    solved = chosen.schedule
    counted = counting(priced, calls, handed_over_bytes(lowered.forward))
    too_much_bytes = held_by_others(shared.priced.graph) - held_by_others(counted.graph)
    notes = [FITS_AS_IT_IS if solved is None else OF_FUSION]
    notes.append(PEAK_IS_READ if lowered.is_read else PEAK_BY_RULE)
    if calls.num_calls > 1:
        notes.append(OF_REPEATED_CALLS)
    plan = CompiledPlan(
        graph=counted.graph,
        schedule=Schedule.keep_all(priced.graph) if solved is None else solved,
        turn=priced.turn,
        lower=options.lower,
        budget_bytes=options.budget_bytes,
        headroom_bytes=budget.headroom_bytes,
        predicted_peak_bytes=chosen.peak_bytes - too_much_bytes,
        unplanned_peak_bytes=(
            chosen.unplanned_peak_bytes
            if calls.num_calls == 1
            else unplanned_peak_bytes(counting_everything(priced, calls))
        ),
        lower_bound_ns=chosen.lower_bound_ns,
        status=chosen.status,
        solve_s=lowered.solve_s,
        notes=tuple(notes),
    )
    return plan, (lowered.forward, lowered.backward)


FITS_AS_IT_IS = "PyTorch's own partition fits, nothing was solved"
OF_FUSION = "bound and gap speak of kernels fused by rule"
OF_REPEATED_CALLS = "bound and gap speak of calls that save no more than these"
PEAK_IS_READ = "the peak is that of the code that Inductor generates"
PEAK_BY_RULE = "the peak is predicted by rule, not read from Inductor's code"

PART_OF_A_STEP = (
    "a compiled graph is only a part of the training step: the loss is computed outside of it, or "
    "another graph comes before it (a graph break). Its plan counts neither their memory nor "
    "their time, so the bound and the budget hold for each graph alone. Compile the model with its "
    "loss and without graph breaks (fullgraph=True shows them), or say what else there is by "
    "resident_bytes="
)


LEAST_OF_A_PART = (
    "This is only a part of a training step: the least budget named is that of this graph and "
    "those before it, and later parts may need more."
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


def _warn_of_parts(has_loss: bool, goes_on: bool, others_bytes: int) -> None:
    if goes_on and others_bytes:
        said = AFTER_A_BREAK.format(held=format_bytes(others_bytes))
        warnings.warn(said, PlanWarning, stacklevel=2)
    elif not has_loss or goes_on:
        warnings.warn(PART_OF_A_STEP, PlanWarning, stacklevel=2)


__all__ = ["PART_OF_A_STEP", "Partitioner"]
