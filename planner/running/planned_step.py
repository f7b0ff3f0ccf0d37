"""Run a planned step under autograd, in place of a module's own forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from graph_capture.calls.call_spec import parse_dtype, tensors_of
from graph_capture.calls.spread_out import local_part
from graph_capture.capture_lock import CAPTURE_LOCK
from graph_capture.captured_step import CapturedStep
from graph_capture.private_torch.autograd import at_end_of_backward, keeps_graph
from graph_capture.private_torch.dispatch import (
    below_autograd,
    without_autocast,
    without_torch_function,
)
from graph_capture.private_torch.sharding import whole_of
from graph_capture.values.checks import OutcomeChanged

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
from .backward_segments import Backward
from .compiled_calls import CompiledCalls, PlanCompiler, compiled
from .generators import PutRightOnError
from .hooked import has_hooks
from .inner_outputs import inner_outputs, refuse_watched, watch
from .out_of_memory import explain
from .own_gradients import (
    generator_state,
    own_gradients,
    set_generator,
)
from .rewrite import PlannedGraphs
from .step_layout import StepLayout, has_sums, reads_what_it_writes, segments_of
from .step_warnings import (
    say_cast_gradients,
    say_casts,
    say_copied,
    say_layout,
    say_nan,
    say_own_forward,
    say_retained,
    say_waiting,
    what_changed,
)
from .tally import Tally


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
    compiler
        Compiles what it can of the graphs.

    Attributes
    ----------
    compiled
        What of the step is compiled.
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
        compiler: PlanCompiler | None = None,
    ) -> None:
        step = captured.step
        self._after_backward = after_backward
        segments = segments_of(graphs, captured)
        self._as_rewritten = Backward(graphs.backward, segments)
        self.compiled: CompiledCalls | None = None
        if compiler is not None and plan is not None:
            graphs, segments, self.compiled = compiled(compiler, plan, graphs, segments)
        self._model, self._graphs, self._plan = model, graphs, plan
        self._own_forward, self._changed, self._tally = forward, changed, tally or Tally()
        self.device = captured.target.torch_device
        self._draws = bool(captured.state_of) or any(code.draws for code in captured.code)
        self._rewrites_state = reads_what_it_writes(captured)
        self._num_forward = len(graphs.forward_inputs)
        self._forward = graphs.forward.forward
        self._backward = Backward(graphs.backward, segments)
        self._backward_inputs = [
            n.name for n in graphs.backward.graph.nodes if n.op == "placeholder"
        ]
        self._num_outputs = graphs.num_outputs
        self._layout = StepLayout.of(model, captured, graphs, segments)
        self._given = [i for i, at in enumerate(self._layout.gradient_at) if at is not None]
        self._detached, self._inner = step.detached, inner_outputs(step)
        self._num_concurrent = 1 if plan is None else plan.holds.concurrent_calls
        self._is_summed = has_sums(captured)
        self._region = AutocastRegion(step)

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        if self._tally.waiting:
            num_alive = len(self._tally.waiting) + 1
            say_waiting(self._tally, num_alive, self._num_concurrent, is_summed=self._is_summed)
        if self._region.has_casts_of_old(self._model):
            say_casts(self._tally)
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
        leaving: Sequence[Sequence[int]] = self._layout.leaving
        if self._layout.one_by_one and has_hooks(map(call.inputs.__getitem__, self._given)):
            leaving, call.pending = [inputs for _, inputs in self._layout.one_by_one], {}
        try:
            outputs = run_chained(self, call, leaving)
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
        call.inner = watch(outputs, self._layout.template.names, self._inner)
        return self._layout.template.build(outputs)

    # -- forward -------------------------------------------------------------------

    def run_forward(self, ctx: Any, call: StepCall) -> tuple[torch.Tensor, ...]:
        """Return the step's outputs; ``ctx`` and ``call`` keep what backward needs."""
        inputs, call.inputs = list(map(local_part, call.inputs)), []
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
            raise OutcomeChangedError(what_changed(changed, layout.checks[changed.place]))
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
        found = _outside_compilers(PlannedStep._run_backward)(self, ctx, call, gradients)
        return found if call.pending is None else self._next(call, 0, found)

    def run_segment(self, call: StepCall, place: int) -> Gradients:
        """Return the gradients that leave with a later node of the backward pass."""
        run = _outside_compilers(PlannedStep._run_segment)
        if call.pending is None:
            return run(self, call, place)
        segment = self._layout.one_by_one[place][0]
        begins = segment != self._layout.one_by_one[place - 1][0]
        return self._next(call, place, run(self, call, segment) if begins else None)

    def _next(self, call: StepCall, place: int, found: Gradients | None) -> Gradients:
        """Hand on the next of a segment's gradients, and hold it no longer."""
        segment, inputs = self._layout.one_by_one[place]
        assert call.pending is not None
        if found is not None:
            call.pending = dict(zip(self._layout.leaving[segment], found, strict=True))
            found.clear()
        return [call.pending.pop(i) for i in inputs]

    def _run_backward(
        self, ctx: Any, call: StepCall, gradients: Sequence[torch.Tensor | None]
    ) -> Gradients:
        for gradient in gradients:
            refuse_batched(gradient)
        refuse_watched(call.inner)
        self._tally.ran_backward()
        if self._after_backward is not None:
            at_end_of_backward(self._after_backward)
        self._region.ran_in(self._model, self.device)
        if self._region.casts_gradients(self.device):
            say_cast_gradients(self._tally)
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
            say_retained(self._tally)
        else:
            self._let_go(call)
        boxed: list[torch.Tensor] = []
        call.backward = self._backward
        for place, expected in enumerate(self._layout.tangents):
            tangent = given[place]
            given[place] = None
            assert tangent is not None
            boxed.append(self._fit_tangent(tangent, expected))
            del tangent
            if self.compiled is not None and not _has_layout(boxed[-1], expected):
                say_layout(self._tally, tuple(expected.shape))
                call.backward = self._as_rewritten
        boxed.extend(ctx.saved_tensors)
        boxed.extend(private)
        private.clear()  # so that the generated code holds the only references
        ctx.maybe_clear_saved_tensors()
        if not call.backward.segments:
            graph = call.backward.graph
            found = self._run(lambda: graph.forward(boxed), graph)
            return self._leave(0, dict(enumerate(found)))
        call.values = dict(zip(self._backward_inputs, boxed, strict=True))
        boxed.clear()
        call.arrived = gradients  # autograd holds them for as long as a step of one node runs
        return self._run_segment(call, 0)

    def _run_segment(self, call: StepCall, place: int) -> Gradients:
        if call.own is not None:
            return self._own_leaving(call, place)
        assert call.backward is not None
        segments = call.backward.segments
        segment = segments[place]
        found = self._run(lambda: segment.run(call.values), segment.graph)
        if place == len(segments) - 1:
            call.arrived, call.values = (), {}
        return self._leave(place, dict(zip(segment.gradients, found, strict=True)))

    def _leave(self, place: int, found: Mapping[int, torch.Tensor]) -> Gradients:
        """The gradients that leave with a segment, as eager leaves them to autograd."""
        layout, gradients = self._layout, Gradients()
        for i in layout.leaving[place]:
            at, division = layout.gradient_at[i], layout.divisions[i]
            gradient = None if at is None else found[at]
            if gradient is not None and division is not None:
                gradient = whole_of(gradient, division)
            gradients.append(gradient)
        return gradients

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
            say_nan(self._tally, found)
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
        say_own_forward(self._tally)
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

    def _fit_tangent(self, tangent: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        """Return an output's gradient in the layout that the backward graph was traced with."""
        if tangent.stride() == expected.stride() or tangent.is_contiguous():
            return tangent
        one_for_all = 0 in tangent.stride()  # as of a sum, where nothing is said (docs/limits.md)
        if not one_for_all and not _has_layout(tangent, expected):
            say_copied(self._tally, tuple(expected.shape))
        return tangent.contiguous()

    def _let_go(self, call: StepCall) -> None:
        """Release the call's tensors after backward; the autograd graph may live a step longer."""
        call.arguments, call.saved = {}, []
        self._tally.waiting.discard(call)

    def _explain(self, error: BaseException, graph: GraphModule) -> None:
        if self._plan is not None:
            explain(error, self._plan, self._model, graph)


@cache
def _outside_compilers(run: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Return a part of backward as one opaque call for compilers; made late, since this imports
    the compiler."""
    return torch.compiler.disable(run)


def _write_below_autograd(tensor: torch.Tensor, value: torch.Tensor) -> None:
    with torch.no_grad(), below_autograd():
        tensor.copy_(value)


def _has_layout(tensor: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a tensor has the strides that compiled code was made for."""
    pairs = zip(tensor.shape, tensor.stride(), expected.stride(), strict=True)
    return tensor.numel() == 0 or all(n == 1 or a == b for n, a, b in pairs)
