"""Run a planned step under autograd, in place of a module's own forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from graph_capture.arrival_order import arranged
from graph_capture.call_spec import parse_dtype, tensors_of
from graph_capture.capture_lock import CAPTURE_LOCK
from graph_capture.captured_step import CapturedStep
from graph_capture.checks import Check, OutcomeChanged
from graph_capture.consumption import in_turn
from graph_capture.outputs import OutputTemplate
from graph_capture.private_torch.autograd import at_end_of_backward, keeps_graph
from graph_capture.private_torch.dispatch import (
    below_autograd,
    without_autocast,
    without_torch_function,
)
from graph_capture.recorder import storage_id

from ..errors import (
    CallMismatchError,
    OutcomeChangedError,
)
from ..plan_record import PlanRecord
from .autocast_region import AutocastRegion
from .autograd_chain import Gradients, StepCall, run_chained
from .autograd_nodes import (
    HandOver,
    NotPlanned,
    anchor,
    refuse_batched,
)
from .backward_segments import Segment, split
from .bindings import (
    Fetch,
    fetch_of,
    leave_of,
    put_back_of,
)
from .generators import PutRightOnError
from .out_of_memory import explain
from .own_gradients import (
    generator_state,
    own_gradients,
    set_generator,
)
from .rewrite import PlannedGraphs, compile_boxed
from .tally import Tally


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where arguments come from and where results go, by position."""

    fetch: tuple[Fetch, ...]  # inputs of the forward graph, from the call's tensors
    saved_at: tuple[int, ...]  # positions of saved inputs among them
    gradient_at: tuple[int | None, ...]  # for each input the index of its gradient
    leaving: tuple[tuple[int, ...], ...]  # inputs whose gradients leave with each segment
    differentiated: tuple[int, ...]
    tangents: tuple[torch.Tensor, ...]  # fake: shapes and strides that backward expects
    template: OutputTemplate
    put_back: tuple[Callable[[list[torch.Tensor]], None], ...]  # what forward replaces
    leave: tuple[Callable[[], None], ...]  # plain values that forward puts into attributes
    require: tuple[int, ...]  # tensors of the call that forward makes require grad
    checks: tuple[Check, ...]
    written_at: tuple[int, ...]  # positions of inputs that are written to before a check


class PlannedStep:
    """The two graphs of a plan, bound to a module's parameters and buffers.

    Call it with the arguments of ``forward`` by name; it returns what the
    module returns, ready for ``backward()``.

    Parameters
    ----------
    forward
        The model's own, for gradients that the plan cannot give; without it they are
        errors.
    changed
        Describes how the model has changed since planning.
    plan
        Explains out-of-memory errors; without it they are not explained.
    tally
        Counts steps and issues warnings.
    after_backward
        Called when a backward pass has ended and its gradients have arrived.
    """

    def __init__(
        self,
        model: nn.Module,
        captured: CapturedStep,
        graphs: PlannedGraphs,
        plan: PlanRecord | None = None,
        *,
        forward: Callable[..., Any] | None = None,
        changed: Callable[[], str | None] = lambda: None,
        tally: Tally | None = None,
        after_backward: Callable[[], None] | None = None,
    ) -> None:
        step = captured.step
        self._after_backward = after_backward
        self._model, self._graphs, self._plan = model, graphs, plan
        self._own_forward, self._changed, self._tally = forward, changed, tally or Tally()
        self.device = captured.target.torch_device
        self._draws = bool(captured.state_of) or any(code.draws for code in captured.code)
        self._rewrites_state = _reads_what_it_writes(captured)
        inputs = list(graphs.forward_inputs)
        inputs += [n for n in graphs.saved_inputs if n not in graphs.forward_inputs]
        missing = [n for n, _ in step.gradients if n not in inputs]
        self._num_forward = len(graphs.forward_inputs)
        inputs += missing
        position = {node: i for i, node in enumerate(inputs)}
        gradient_of = {node: i for i, (node, _) in enumerate(step.gradients)}
        self._forward = graphs.forward.forward
        self._backward = graphs.backward.forward
        self._segments = segments_of(graphs, captured)
        self._backward_inputs = [
            n.name for n in graphs.backward.graph.nodes if n.op == "placeholder"
        ]
        self._num_outputs = graphs.num_outputs
        self._layout = _Layout(
            fetch=tuple(fetch_of(node, model, step.constants) for node in inputs),
            saved_at=tuple(position[n] for n in graphs.saved_inputs),
            gradient_at=tuple(gradient_of.get(n) for n in inputs),
            leaving=_leaving([gradient_of.get(n) for n in inputs], self._segments, captured),
            differentiated=step.differentiated,
            tangents=tuple(n.meta["val"] for n in step.tangents),
            template=step.template,
            put_back=tuple(put_back_of(entry, model) for entry in step.reassigned),
            leave=tuple(leave_of(entry, model) for entry in step.left),
            require=step.made_to_require,
            checks=step.checks,
            written_at=tuple(position[n] for n in step.before_checks.written if n in position),
        )
        self._detached = step.detached
        self._num_concurrent = 1 if plan is None else plan.holds.concurrent_calls
        self._is_summed = _has_sums(captured)
        self._region = AutocastRegion()

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        if self._tally.waiting:
            self._say_waiting(len(self._tally.waiting) + 1)
        if self._region.has_casts_of_old(self._model):
            self._say_casts()
        given = tensors_of(arguments)
        for i in self._layout.require:
            given[i].requires_grad_()
        call = StepCall(
            arguments,
            inputs=[fetch(given) for fetch in self._layout.fetch],
            handed_over=[None] * len(self._layout.tangents),
            generator_state=generator_state(self.device) if self._draws else None,
        )
        self._tally.waiting.add(call)
        try:
            outputs = run_chained(self, call, self._layout.leaving)
        except OutcomeChangedError:
            self._tally.waiting.discard(call)
            if call.generator_state is not None:
                set_generator(call.generator_state, self.device)
            raise
        for put_back in self._layout.put_back:
            put_back(outputs)
        for leave in self._layout.leave:
            leave()
        for place, i in enumerate(self._layout.differentiated):
            if outputs[i].numel() > 1:
                outputs[i] = HandOver.apply(outputs[i], call.handed_over, place)
        for i in self._detached:
            outputs[i] = NotPlanned.apply(outputs[i], anchor(), self._layout.template.names[i])
        return self._layout.template.build(outputs)

    # -- forward -------------------------------------------------------------------

    def run_forward(self, ctx: Any, call: StepCall) -> tuple[torch.Tensor, ...]:
        """Return the step's outputs; ``ctx`` and ``call`` keep what backward needs."""
        inputs, call.inputs = call.inputs, []
        # As in eager: below autograd, with grad mode on (some kernels save more when it is).
        changed: OutcomeChanged | None = None
        layout = self._layout
        before = [(inputs[i], inputs[i].detach().clone()) for i in layout.written_at]
        try:
            with (
                PutRightOnError(),
                torch.enable_grad(),
                below_autograd(),
                without_autocast(),
                without_torch_function(),
            ):
                results = self._forward(inputs[: self._num_forward])
        except (RuntimeError, MemoryError) as error:
            self._explain(error, self._graphs.forward)
            raise
        except OutcomeChanged as signal:
            changed = signal.with_traceback(None)  # which holds what was computed so far
        if changed is not None:
            for tensor, value in before:
                _write_below_autograd(tensor, value)
            raise OutcomeChangedError(_what_changed(changed, layout.checks[changed.place]))
        del before
        exposed = self._num_outputs + self._graphs.num_exposed
        outputs, saved = results[: self._num_outputs], results[self._num_outputs : exposed]
        saved += [inputs[i] for i in self._layout.saved_at]
        ctx.save_for_backward(*saved)
        call.saved = results[exposed:]
        differentiated = set(self._layout.differentiated)
        ctx.mark_non_differentiable(*(t for i, t in enumerate(outputs) if i not in differentiated))
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    # -- backward ------------------------------------------------------------------

    def run_backward(
        self, ctx: Any, call: StepCall, gradients: Sequence[torch.Tensor | None]
    ) -> Gradients:
        """Return the gradients that leave with the first segment.

        They are by the plan where it can give them.
        """
        return _outside_compilers(PlannedStep._run_backward)(self, ctx, call, gradients)

    def run_segment(self, call: StepCall, place: int) -> Gradients:
        """Return the gradients that leave with a later segment of the backward graph."""
        return _outside_compilers(PlannedStep._run_segment)(self, call, place)

    def _run_backward(
        self, ctx: Any, call: StepCall, gradients: Sequence[torch.Tensor | None]
    ) -> Gradients:
        for gradient in gradients:
            refuse_batched(gradient)
        self._tally.ran_backward()
        if self._after_backward is not None:
            at_end_of_backward(self._after_backward)
        self._region.ran_in(self._model, self.device)
        retained = keeps_graph()
        outputs = self._layout.differentiated
        given = [
            gradients[i] if handed is None else handed
            for i, handed in zip(outputs, call.handed_over, strict=True)
        ]
        missing = [i for i, tangent in zip(outputs, given, strict=True) if tangent is None]
        call.handed_over[:] = [None] * len(given)
        call.own = None
        if missing and (retained or call.by_own_forward):
            call.own = self._by_own_forward(ctx, call, given, retained=retained)
            return self._own_leaving(call, 0)
        if missing:
            raise CallMismatchError(
                f"no gradient came back for output {self._layout.template.names[missing[0]]!r}, "
                "which was planned as differentiated: plan with the loss_fn that the loop "
                "computes, so that only what it uses is differentiated; where each output has a "
                "backward pass of its own, call all but the last with retain_graph=True"
            )
        private = call.saved
        if retained:
            private = list(private)
            self._tally.say(
                "retained",
                "backward(retain_graph=True) through a planned model: what the plan saved stays "
                "in memory during and after the backward pass, which the budget does not count",
            )
        else:
            self._let_go(call)
        boxed: list[torch.Tensor] = []
        for place, expected in enumerate(self._layout.tangents):
            tangent = given[place]
            given[place] = None
            assert tangent is not None
            boxed.append(_fit_tangent(tangent, expected))
            del tangent
        boxed.extend(ctx.saved_tensors)
        boxed.extend(private)
        private.clear()  # so that the generated code holds the only references
        ctx.maybe_clear_saved_tensors()
        if not self._segments:
            found = self._run(lambda: self._backward(boxed), self._graphs.backward)
            places = (self._layout.gradient_at[i] for i in self._layout.leaving[0])
            return [None if at is None else found[at] for at in places]
        call.values = dict(zip(self._backward_inputs, boxed, strict=True))
        boxed.clear()
        call.arrived = gradients  # autograd holds them for as long as a step of one node runs
        return self._run_segment(call, 0)

    def _run_segment(self, call: StepCall, place: int) -> Gradients:
        if call.own is not None:
            return self._own_leaving(call, place)
        leaving = self._layout.leaving[place]
        segment = self._segments[place]
        found = self._run(lambda: segment.run(call.values), segment.graph)
        if place == len(self._segments) - 1:
            call.arrived, call.values = (), {}
        left = dict(zip(segment.gradients, found, strict=True))
        places = (self._layout.gradient_at[i] for i in leaving)
        return [None if at is None else left[at] for at in places]

    def _own_leaving(self, call: StepCall, place: int) -> Gradients:
        """Hand on gradients by the model's own forward, and hold them no longer: autograd
        copies a gradient that somebody else holds."""
        assert call.own is not None
        found: Gradients = []
        for i in self._layout.leaving[place]:
            found.append(call.own[i])
            call.own[i] = None
        if place == len(self._layout.leaving) - 1:
            call.own = None
        return found

    def _run(self, run: Callable[[], list[torch.Tensor]], graph: GraphModule) -> list[torch.Tensor]:
        """Run generated backward code as autograd runs a kernel."""
        try:
            with (
                PutRightOnError(),
                below_autograd(),
                without_autocast(),
                without_torch_function(),
            ):
                found = run()
            self._say_nan(found)
        except (RuntimeError, MemoryError) as error:
            self._explain(error, graph)
            raise
        return found

    def _by_own_forward(
        self, ctx: Any, call: StepCall, given: list[torch.Tensor | None], *, retained: bool
    ) -> list[torch.Tensor | None]:
        """Return gradients from only some of the outputs, see
        :mod:`planner.running.own_gradients`."""
        if self._own_forward is None or self._rewrites_state:
            raise CallMismatchError(
                "a backward pass from some of the outputs alone is requested of a planned model. "
                "Its plan does not cover that, and the model's own forward cannot be run again for "
                "it, since it reads buffers that it has written to: make the call under `with "
                "planner.unplanned(model):`, or let one loss differentiate all outputs"
            )
        changed = self._changed()
        if changed is not None:
            raise CallMismatchError(
                "a backward pass from some of the outputs alone is requested of a planned model, "
                "for which its own forward runs again, and the model has changed since the call: "
                f"{changed}. Change it after the last backward pass, or make the call under `with "
                "planner.unplanned(model):`"
            )
        self._tally.say(
            "own forward",
            "a backward pass from some of the outputs alone is requested of a planned model: "
            "the model's own forward runs again for it, with the same numbers, but neither its "
            "memory nor its time are in the plan. The plan has one backward pass of all outputs, "
            "by one loss_fn=",
        )
        call.by_own_forward = True
        _ = ctx.saved_tensors  # autograd's own error where one was changed meanwhile
        assert self._plan is not None
        dtype, arguments = self._plan.guard.autocast, call.arguments
        tensors = tensors_of(arguments)
        if not retained:
            self._let_go(call)
        with CAPTURE_LOCK:
            return own_gradients(
                self._model,
                self._own_forward,
                arguments,
                outputs={
                    i: tangent
                    for i, tangent in zip(self._layout.differentiated, given, strict=True)
                    if tangent is not None
                },
                inputs=[fetch(tensors) for fetch in self._layout.fetch],
                generator_state=call.generator_state,
                device=self.device,
                autocast=None if dtype is None else parse_dtype(dtype),
            )

    def differentiated_inputs(self, call: StepCall) -> list[torch.Tensor]:
        """Return the parameters and tensors of a call that require grad, while the call is held."""
        if not call.arguments:
            return []
        given = tensors_of(call.arguments)
        return [t for t in (fetch(given) for fetch in self._layout.fetch) if t.requires_grad]

    def _let_go(self, call: StepCall) -> None:
        """Release the call's tensors after backward; the autograd graph may live a step longer."""
        call.arguments, call.saved = {}, []
        self._tally.waiting.discard(call)

    def _say_waiting(self, num_alive: int) -> None:
        if num_alive > self._num_concurrent:
            self._tally.say(
                "two forwards",
                "a planned model is called again before the backward pass of its last call: the "
                f"saved tensors of {num_alive} calls lie in memory side by side, and the budget "
                f"counts {self._num_concurrent}. Plan with concurrent_calls={num_alive}, or "
                "plan a module whose forward makes all calls",
            )
        if self._is_summed:
            self._tally.say(
                "sums of two calls",
                "a planned model is called again before the backward pass of its last call, and it "
                "uses a weight more than once (a tied one): where one backward pass goes through "
                "both calls, its gradients are added in another order than eager's, with other "
                "last bits. To have eager's, call backward() on each loss, or plan a module "
                "whose forward makes all calls",
            )

    def _say_casts(self) -> None:
        self._tally.say(
            "casts of old parameters",
            "a planned step begins within the autocast region that its last one ran in, and "
            "parameters were changed meanwhile: without the plan PyTorch would go on with casts "
            "of the old ones, which autocast keeps until its region ends; the plan casts those "
            "that are there. Leave the region before optimizer.step(), which makes both alike",
        )

    def _say_nan(self, gradients: list[torch.Tensor]) -> None:
        """What autograd's anomaly mode finds next, and where it would find the operator."""
        if not (torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled()):
            return
        if any(bool(torch.isnan(g).any()) for g in gradients if isinstance(g, torch.Tensor)):
            self._tally.say(
                "anomaly",
                "a gradient of a planned step is nan, and anomaly mode sees the step as one "
                "function: make the call under `with planner.unplanned(model):` to see the "
                "operator and its line",
            )

    def _explain(self, error: BaseException, graph: GraphModule) -> None:
        if self._plan is not None:
            explain(error, self._plan, self._model, graph)


@cache
def _outside_compilers(run: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Return a part of backward as one opaque call for compilers; made late, since this imports
    the compiler."""
    return torch.compiler.disable(run)


def segments_of(graphs: PlannedGraphs, captured: CapturedStep) -> tuple[Segment, ...]:
    """Return the parts of the backward graph between which gradients leave."""
    pairs = captured.step.gradients
    return split(
        graphs.backward,
        sizes=[_bytes_of(gradient.meta["val"]) for _, gradient in pairs],
        owners=[storage_id(node.meta["val"]) for node, _ in pairs],
        compiled=compile_boxed,
        cuts=graphs.cuts,
    )


def _leaving(
    gradient_at: Sequence[int | None], segments: Sequence[Segment], captured: CapturedStep
) -> tuple[tuple[int, ...], ...]:
    """For each segment the inputs whose gradients leave with it; the first has all others.

    Where gradients are consumed, they are in the order in which they arrive as planned.
    """
    later = {j: s for s, segment in enumerate(segments) if s for j in segment.gradients}
    of_input = [0 if j is None else later.get(j, 0) for j in gradient_at]
    last = max(len(segments), 1) - 1
    leaving = []
    for s in range(last + 1):
        mine = [i for i, place in enumerate(of_input) if place == s]
        if captured.holds.consumes:
            sizes = [_bytes_of(g.meta["val"]) for _, g in captured.step.gradients]
            given = [(sizes[j], j, i) for i in mine if (j := gradient_at[i]) is not None]
            others = [i for i in mine if gradient_at[i] is None]
            mine = [*others, *arranged(in_turn(given), leads_on=s < last)]
        leaving.append(tuple(mine))
    return tuple(leaving)


def _has_sums(captured: CapturedStep) -> bool:
    """Whether a parameter is used at several places, whose gradients are added."""
    for leaf, _ in captured.step.gradients:
        users = (user for user in leaf.users if user.meta.get("phase") == "forward")
        if leaf.meta["role"] == "parameter" and len(list(users)) > 1:
            return True
    return False


def _reads_what_it_writes(captured: CapturedStep) -> bool:
    """Whether a second forward would start from different buffers than the first."""
    nodes = captured.step.graph.find_nodes(op="placeholder")
    read = {node.meta["target"] for node in nodes if node.meta["role"] == "attribute"}
    if any(e.role == "buffer" or e.target in read for e in captured.step.reassigned):
        return True
    for node in captured.step.graph.nodes:
        for written in node.meta.get("writes", ()):
            if written.op != "placeholder":
                continue
            if written.meta["role"] == "attribute" or set(written.users) - {node}:
                return True
    return False


def _write_below_autograd(tensor: torch.Tensor, value: torch.Tensor) -> None:
    with torch.no_grad(), below_autograd():
        tensor.copy_(value)


def _what_changed(changed: OutcomeChanged, check: Check) -> str:
    module = f" in module {check.module_path!r}" if check.module_path else ""
    state = (
        f" It follows from {check.state!r}, which the model holds: where a first step sets that "
        "up, run the model once before planning."
    )
    return (
        f"this step takes another way through the model than the planned one: at {check.source}"
        f"{module} forward asks for {check.what}, which was {changed.planned} when the plan was "
        f"made and is {changed.got} now.{'' if check.state is None else state} If that line raises "
        "for this input, so does the model without the plan (Plan.remove). Else apply the plan "
        "with on_shape_change='adapt' or 'replan', which plan for this way, too, or 'unplanned', "
        "or make a plan on such an input"
    )


def _fit_tangent(tangent: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return an output's gradient in the layout that the backward graph was traced with."""
    if tangent.stride() == expected.stride() or tangent.is_contiguous():
        return tangent
    return tangent.contiguous()


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
