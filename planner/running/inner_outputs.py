"""Outputs that forward itself goes on from, and whose gradients are looked at.

Where a model returns hidden values beside what it makes of them, eager adds up at each of
them what comes from the loss and what comes from inside the model. A plan has the second
part only in the middle of its backward graph, so whoever asks for that gradient
(``retain_grad``, a hook, ``torch.autograd.grad``) would get the first part alone, or nothing.

Imperfection: ``torch.autograd.grad`` by such an output and by parameters at once is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.fx import Node

from graph_capture.private_torch.autograd import backward_hooks_of, will_execute
from graph_capture.tracing.traced_step import TracedStep

from ..errors import CallMismatchError

Inner = tuple[str, int, "weakref.ref[torch.Tensor]"]
"""An output's name, how many hooks on it are this module's, and the output."""

_DETACHES = (torch.ops.aten.detach.default, torch.ops.aten.detach_.default)


def inner_outputs(step: TracedStep) -> tuple[int, ...]:
    """Return the outputs that a differentiated one is computed from, by their index."""
    ends = {step.outputs[i] for i in step.differentiated}
    requiring = sorted({*step.differentiated, *step.detached})
    return tuple(i for i in requiring if _leads_to(step.outputs[i], ends))


def watch(outputs: Sequence[torch.Tensor], names: Sequence[str], at: Sequence[int]) -> list[Inner]:
    """Watch outputs of a step that ask for their gradients later.

    Parameters
    ----------
    outputs, names
        As the loop gets them.
    at
        Which of them :func:`inner_outputs` are.
    """
    watched = []
    for i in at:
        output = weakref.ref(outputs[i])
        hooked = outputs[i].numel() > 1  # HandOver is between it and the step
        if hooked:
            outputs[i].register_hook(partial(_refuse_if_last, output, names[i]))
        watched.append((names[i], int(hooked), output))
    return watched


def refuse_watched(watched: Sequence[Inner]) -> None:
    """Refuse a backward pass where somebody waits for the gradient of such an output.

    Raises
    ------
    CallMismatchError
        Names the output.
    """
    for name, num_own_hooks, known in watched:
        output = known()
        if output is None:
            continue
        if output.retains_grad or len(backward_hooks_of(output) or ()) > num_own_hooks:
            _refuse(name)


def _refuse_if_last(
    known: Callable[[], torch.Tensor | None], name: str, _gradient: torch.Tensor
) -> None:
    output = known()
    if output is None or output.grad_fn is None:
        return
    step = output.grad_fn.next_functions[0][0]
    if step is not None and not will_execute(step):
        _refuse(name)


def _refuse(name: str) -> None:
    raise CallMismatchError(
        f"the gradient of output {name!r} is asked for (retain_grad, a hook, autograd.grad), and "
        "the model itself computes on from it: a plan has no such gradient at its outputs. Make "
        "this call of the model under `with planner.unplanned(model):`, or return a copy of it "
        "(h + 0) where only what comes from the loss is wanted"
    )


def _leads_to(start: Node, ends: set[Node]) -> bool:
    """Whether one of the nodes, other than the first one, is computed from the first."""
    seen, todo = {start}, [start]
    while todo:
        for user in todo.pop().users:
            if user in seen or user.meta.get("phase") != "forward" or user.target in _DETACHES:
                continue
            if user in ends:
                return True
            seen.add(user)
            todo.append(user)
    return False


__all__ = ["Inner", "inner_outputs", "refuse_watched", "watch"]
