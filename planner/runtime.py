"""Run a planned step under autograd, in the place of a module's own forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.fx import GraphModule, Node

from graph_capture.call_spec import tensors_of
from graph_capture.captured_step import CapturedStep
from graph_capture.outputs import OutputTemplate
from graph_capture.trace import Reassigned

from .errors import CallMismatchError
from .out_of_memory import explain
from .rewrite import PlannedGraphs

if TYPE_CHECKING:
    from .plan import Plan

_Table = dict[str, Any]
_Fetch = Callable[[list[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where arguments come from and results go, by position."""

    fetch: tuple[_Fetch, ...]  # inputs of the forward graph, from the call's tensors
    saved_at: tuple[int, ...]  # positions of saved inputs among them
    gradient_at: tuple[int | None, ...]  # for each input the index of its gradient
    differentiated: tuple[int, ...]
    tangents: tuple[torch.Tensor, ...]  # fake: shapes and strides that backward expects
    template: OutputTemplate
    put_back: tuple[Callable[[list[torch.Tensor]], None], ...]  # buffers that forward replaces


class PlannedStep:
    """The two graphs of a plan, bound to a module's parameters and buffers.

    Call it with the arguments of ``forward`` by name; it returns what the
    module returns, ready for ``backward()``.

    Parameters
    ----------
    plan
        What an out-of-memory error is explained by; without it, it is not.
    """

    def __init__(
        self,
        model: nn.Module,
        captured: CapturedStep,
        graphs: PlannedGraphs,
        plan: Plan | None = None,
    ) -> None:
        step = captured.step
        self._model, self._graphs, self._plan = model, graphs, plan
        inputs = list(graphs.forward_inputs)
        inputs += [n for n in graphs.saved_inputs if n not in graphs.forward_inputs]
        missing = [n for n, _ in step.gradients if n not in inputs]
        self._num_forward = len(graphs.forward_inputs)
        inputs += missing
        position = {node: i for i, node in enumerate(inputs)}
        gradient_of = {node: i for i, (node, _) in enumerate(step.gradients)}
        self._forward = graphs.forward.forward
        self._backward = graphs.backward.forward
        self._num_outputs = graphs.num_outputs
        self._layout = _Layout(
            fetch=tuple(_fetch(node, model, step.constants) for node in inputs),
            saved_at=tuple(position[n] for n in graphs.saved_inputs),
            gradient_at=tuple(gradient_of.get(n) for n in inputs),
            differentiated=step.differentiated,
            tangents=tuple(n.meta["val"] for n in step.tangents),
            template=step.template,
            put_back=tuple(_put_back(entry, model) for entry in step.reassigned),
        )

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        given = tensors_of(arguments)
        inputs = [fetch(given) for fetch in self._layout.fetch]
        handed_over: list[torch.Tensor | None] = [None] * len(self._layout.tangents)
        outputs = list(_Step.apply(self, handed_over, *inputs))
        del inputs
        for put_back in self._layout.put_back:
            put_back(outputs)
        for place, i in enumerate(self._layout.differentiated):
            if outputs[i].numel() > 1:
                outputs[i] = _HandOver.apply(outputs[i], handed_over, place)
        return self._layout.template.build(outputs)

    def run_forward(self, ctx: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        # As in eager: below autograd, with grad mode on (some kernels save more when it is).
        try:
            with (
                torch.enable_grad(),
                torch._C._AutoDispatchBelowAutograd(),
                torch._C._DisableAutocast(),
            ):
                results = self._forward(list(inputs[: self._num_forward]))
        except (RuntimeError, MemoryError) as error:
            self._explain(error, self._graphs.forward)
            raise
        outputs, saved = results[: self._num_outputs], results[self._num_outputs :]
        ctx.save_for_backward(*saved, *(inputs[i] for i in self._layout.saved_at))
        differentiated = set(self._layout.differentiated)
        ctx.mark_non_differentiable(*(t for i, t in enumerate(outputs) if i not in differentiated))
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    def run_backward(
        self,
        ctx: Any,
        gradients: tuple[torch.Tensor | None, ...],
        handed_over: list[torch.Tensor | None],
    ) -> list[torch.Tensor | None]:
        boxed: list[torch.Tensor] = []
        for place, (i, expected) in enumerate(
            zip(self._layout.differentiated, self._layout.tangents, strict=True)
        ):
            tangent = handed_over[place] if handed_over[place] is not None else gradients[i]
            handed_over[place] = None
            if tangent is None:
                raise CallMismatchError(
                    f"no gradient came back for output {self._layout.template.names[i]!r}, which "
                    "was planned as differentiated: plan with the loss_fn that the loop computes, "
                    "so that only what it uses is differentiated"
                )
            boxed.append(_fit_tangent(tangent, expected))
            del tangent
        boxed.extend(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()
        try:
            with torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
                found = self._backward(boxed)
        except (RuntimeError, MemoryError) as error:
            self._explain(error, self._graphs.backward)
            raise
        return [None if at is None else found[at] for at in self._layout.gradient_at]

    def _explain(self, error: BaseException, graph: GraphModule) -> None:
        if self._plan is not None:
            explain(error, self._plan, self._model, graph)


class _Step(torch.autograd.Function):
    """One node of the autograd graph for the whole planned step."""

    @staticmethod
    def forward(ctx: Any, step: PlannedStep, handed_over: list, *inputs: torch.Tensor) -> Any:
        ctx.step, ctx.handed_over = step, handed_over
        return step.run_forward(ctx, inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        return (None, None, *ctx.step.run_backward(ctx, gradients, ctx.handed_over))


class _HandOver(torch.autograd.Function):
    """Passes an output's gradient on in a list instead of as an argument.

    The engine holds a node's arguments until the node has finished; for the one
    node of a planned step that is the whole backward pass. Handed over in a
    list, the gradient of the logits, say, is freed at its last use.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, handed_over: list, place: int) -> torch.Tensor:
        ctx.handed_over, ctx.place = handed_over, place
        return output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.handed_over[ctx.place] = gradient
        return gradient.new_empty(()).expand(gradient.shape), None, None


def _fit_tangent(tangent: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The gradient of an output, in the layout that the backward graph was traced with."""
    if tangent.stride() == expected.stride() or tangent.is_contiguous():
        return tangent
    return tangent.contiguous()


def _fetch(node: Node, model: nn.Module, constants: Mapping[str, torch.Tensor]) -> _Fetch:
    """How to get at an input of the step when it is called."""
    role, target = node.meta["role"], node.meta["target"]
    if role == "input":
        place = int(target)
        return lambda given: given[place]
    if role == "constant":
        tensor = constants[target]
        return lambda _given: tensor
    table, name = _place(target, role, model)
    return lambda _given: table[name]


def _put_back(entry: Reassigned, model: nn.Module) -> Callable[[list[torch.Tensor]], None]:
    """Lets a buffer be what forward made it."""
    table, name = _place(entry.target, "buffer", model)

    def replace(outputs: list[torch.Tensor]) -> None:
        table[name] = outputs[entry.output]

    def exchange(outputs: list[torch.Tensor]) -> None:
        table[name].data = outputs[entry.output]

    return exchange if entry.keeps_object else replace


def _place(target: str, role: str, model: nn.Module) -> tuple[_Table, str]:
    path, _, name = target.rpartition(".")
    owner = model.get_submodule(path)
    return (owner._parameters if role == "parameter" else owner._buffers), name
