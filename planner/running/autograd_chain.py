"""A planned step as a chain of autograd nodes, one for each segment of its backward graph.

The first node computes the outputs in forward and runs the first segment in backward. Each
node returns the gradients that leave with its segment, and leads on to the next one by
an empty tensor, the *link*. So autograd accumulates the gradients of a segment, and runs
their hooks, before the next segment begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from graph_capture.private_torch.autograd import will_execute

from .autograd_nodes import FirstDerivative, anchor
from .backward_segments import Backward
from .inner_outputs import Inner


class StepCall:
    """One call of a planned step, until its backward pass has run.

    Parameters
    ----------
    arguments
        By name, as they were given; they are held for as long as the autograd graph is.
    inputs
        What forward and backward read of the module and the call; until forward has run.
    handed_over
        Gradients of the outputs, see :class:`planner.running.autograd_nodes.HandOver`.
    generator_state
        Of the default generator when the call began, where the step draws.

    Attributes
    ----------
    saved
        Saved tensors that nobody else has. Autograd's own way of saving looks at each
        for writes by others, which costs as much as a small kernel.
    values
        What lives between two segments of the backward pass, by name.
    arrived
        Gradients of the outputs as autograd passed them, without those handed over. They
        are counted for all of backward, and so they are held.
    backward
        The graphs that this call's backward pass runs, once it has begun.
    own
        Gradients of all inputs, where the model's own forward computed them.
    inner
        Outputs whose gradients must not be asked for, see :mod:`planner.running.inner_outputs`.
    pending
        Where gradients leave one by one, those of a segment that have not left yet, by the
        input that each is for; ``None`` where all of a segment leave together.
    """

    __slots__ = (
        "__weakref__",
        "arguments",
        "arrived",
        "backward",
        "by_own_forward",
        "generator_state",
        "handed_over",
        "inner",
        "inputs",
        "own",
        "pending",
        "saved",
        "values",
    )

    def __init__(
        self,
        arguments: Any,
        inputs: list[torch.Tensor],
        handed_over: list[torch.Tensor | None],
        generator_state: np.ndarray | None,
    ) -> None:
        self.arguments = arguments
        self.inputs = inputs
        self.handed_over = handed_over
        self.generator_state = generator_state
        self.backward: Backward | None = None
        self.by_own_forward = False
        self.saved: list[torch.Tensor] = []
        self.values: dict[str, Any] = {}
        self.arrived: Sequence[torch.Tensor | None] = ()
        self.own: list[torch.Tensor | None] | None = None
        self.inner: Sequence[Inner] = ()
        self.pending: dict[int, torch.Tensor | None] | None = None

    def end(self) -> None:
        """Let go of what later segments would read."""
        self.values, self.arrived, self.own = {}, (), None
        self.pending = None if self.pending is None else {}


Gradients = list[torch.Tensor | None]


class Chained(Protocol):
    """A step whose parts the nodes run."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    def run_forward(self, ctx: Any, call: StepCall) -> tuple[torch.Tensor, ...]:
        """Return the outputs."""

    def run_backward(self, ctx: Any, call: StepCall, gradients: Sequence[Any]) -> Gradients:
        """Return the gradients that leave with the first segment."""

    def run_segment(self, call: StepCall, place: int) -> Gradients:
        """Return the gradients that leave with a later segment."""

    def differentiated_inputs(self, call: StepCall) -> list[torch.Tensor]:
        """Return what second derivatives would be taken with respect to."""


def run_chained(
    step: Chained, call: StepCall, leaving: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Run a step forward under autograd.

    Parameters
    ----------
    leaving
        For each segment the positions of the inputs whose gradients leave with it.
    """
    link = None
    for place in range(len(leaving) - 1, 0, -1):
        link = _Later.apply(step, call, place, link, *(call.inputs[i] for i in leaving[place]))
    return list(_First.apply(step, call, link, *(call.inputs[i] for i in leaving[0])))


class _First(torch.autograd.Function):
    """Runs forward, and the first segment of backward."""

    @staticmethod
    def forward(
        ctx: Any, step: Chained, call: StepCall, link: torch.Tensor | None, *_inputs: torch.Tensor
    ) -> Any:
        ctx.step, ctx.call, ctx.leads_on = step, call, link is not None
        return step.run_forward(ctx, call)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        again = torch.is_grad_enabled()  # create_graph=True
        with torch.no_grad():
            found = ctx.step.run_backward(ctx, ctx.call, gradients)
        _end_where_nothing_follows(ctx)
        given = [g for g in gradients if again and g is not None and g.requires_grad]
        link = _link(ctx.step, given) if ctx.leads_on else None
        return (None, None, link, *_handed_on(ctx, found, given, again=again))


class _Later(torch.autograd.Function):
    """Runs a later segment of backward."""

    @staticmethod
    def forward(
        ctx: Any,
        step: Chained,
        call: StepCall,
        place: int,
        link: torch.Tensor | None,
        *_inputs: torch.Tensor,
    ) -> Any:
        ctx.step, ctx.call, ctx.place, ctx.leads_on = step, call, place, link is not None
        return _link(step)

    @staticmethod
    def backward(ctx: Any, before: torch.Tensor) -> Any:
        again = torch.is_grad_enabled()
        with torch.no_grad():
            found = ctx.step.run_segment(ctx.call, ctx.place)
        _end_where_nothing_follows(ctx)
        given = [before] if again and before.requires_grad else []
        link = _link(ctx.step, given) if ctx.leads_on else None
        return (None, None, None, link, *_handed_on(ctx, found, given, again=again))


def _end_where_nothing_follows(ctx: Any) -> None:
    """Let go of what lives between segments where this pass comes to none of the later ones.

    ``torch.autograd.grad`` asks for some gradients only, and eager's values go as it goes.
    """
    if ctx.leads_on and not will_execute(ctx.next_functions[0][0]):
        ctx.call.end()


def _link(step: Chained, given: Sequence[torch.Tensor] = ()) -> torch.Tensor:
    """Return a tensor without memory, on the step's device, whose stream autograd takes over.

    It is connected to gradients that are differentiated again.
    """
    link = torch.empty(0, device=step.device)
    return FirstDerivative.apply(link, anchor(), *given) if given else link


def _handed_on(
    ctx: Any, gradients: Gradients, given: Sequence[torch.Tensor], *, again: bool
) -> Gradients:
    if not again:
        return gradients
    inputs = [*ctx.step.differentiated_inputs(ctx.call), *given]
    return [
        None if gradient is None else FirstDerivative.apply(gradient, anchor(), *inputs)
        for gradient in gradients
    ]


__all__ = ["Gradients", "StepCall", "run_chained"]
