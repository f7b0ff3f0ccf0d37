"""Nodes of the autograd graph around a planned step: they pass gradients on or refuse."""

from __future__ import annotations

from typing import Any

import torch

from graph_capture.private_torch.autograd import is_batched, is_legacy_batched

from ..errors import CallMismatchError


class HandOver(torch.autograd.Function):
    """Passes an output's gradient on in a list instead of as an argument.

    The engine holds a node's arguments until the node has finished; for the single node
    of a planned step that is the whole backward pass. Passed in a list, the gradient of
    the logits, say, is freed at its last use.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, handed_over: list, place: int) -> torch.Tensor:
        ctx.handed_over, ctx.place = handed_over, place
        ctx.set_materialize_grads(False)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None) -> Any:
        refuse_batched(gradient)
        if gradient is None:
            return None, None, None
        ctx.handed_over[ctx.place] = gradient.detach()
        if torch.is_grad_enabled():  # create_graph=True: second derivatives come by here
            return gradient, None, None
        # Of zeros, as what happens to lie there may be NaN, which detect_anomaly looks for.
        return gradient.new_zeros(()).expand(gradient.shape), None, None


class FirstDerivative(torch.autograd.Function):
    """A gradient that a plan computed; it can be used but not differentiated.

    Eager adds what comes from a loss and what comes from its gradient at each
    activation; a plan that ran already could only add at the parameters, with other
    last bits. It is connected to the step's inputs and to the gradients that the step was
    called with, so that second derivatives with respect to one of them, or to a weight of
    the loss, end up here.
    """

    @staticmethod
    def forward(
        _ctx: Any, gradient: torch.Tensor, _anchor: torch.Tensor, *_inputs: torch.Tensor
    ) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(_ctx: Any, *_gradient: torch.Tensor) -> Any:
        raise CallMismatchError(
            "a gradient of a planned model is differentiated again (create_graph=True), and a "
            "plan holds first derivatives only: make this call of the model under `with "
            "planner.unplanned(model):`, or plan a module whose forward takes the derivative and "
            "returns the loss"
        )


class NotPlanned(torch.autograd.Function):
    """An output that requires grad in eager, but has no gradient in the plan.

    A loss that used it would get no gradient, and would silently train something else.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, _anchor: torch.Tensor, name: str) -> torch.Tensor:
        ctx.name = name
        ctx.set_materialize_grads(False)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None) -> Any:
        if gradient is None:  # DistributedDataParallel passes all outputs through a node
            return None, None, None
        raise CallMismatchError(
            f"output {ctx.name!r} was not planned as differentiated, and a loss was made of it: "
            "plan with loss_fn=, the whole loss that the loop computes, or detach the output"
        )


def refuse_batched(gradient: torch.Tensor | None) -> None:
    """Refuse a batched gradient, which stands for many backward passes at once.

    Raises
    ------
    CallMismatchError
        When the gradient is batched; the message says how to get the gradients.
    """
    if gradient is not None and (is_legacy_batched(gradient) or is_batched(gradient)):
        raise CallMismatchError(
            "many backward passes at once (is_grads_batched=True, jacobian(vectorize=True)) are "
            "requested from a planned model, and a plan covers one: call the model under "
            "`with planner.unplanned(model):`, or ask for the gradients one after another"
        )


def anchor() -> torch.Tensor:
    """Return a tensor without memory that makes the step's outputs require grad."""
    return torch.empty((), device="meta", requires_grad=True)
