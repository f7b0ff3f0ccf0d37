"""Have gradients consumed as they arrive: an optimizer that steps in hooks, for trial steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from graph_capture.loop.optimizer_step import updating_only
from graph_capture.private_torch.autograd import post_accumulate_hooks_of

Consume = Callable[[torch.Tensor], Any]
"""Takes a parameter whose gradient has arrived; the gradient is gone afterwards."""


@contextmanager
def consuming(model: Any, consume: Consume) -> Iterator[None]:
    """While active, the gradient of each parameter is consumed when it has arrived, and freed.

    Hooks that were there wait meanwhile: they may be the loop's own optimizer, and a trial
    step must not train the model.

    Parameters
    ----------
    model
        Anything but a module has no parameters.
    consume
        Called with each parameter.
    """
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    waiting = [(hooks, dict(hooks)) for p in parameters if (hooks := post_accumulate_hooks_of(p))]
    for hooks, _ in waiting:
        hooks.clear()

    def arrived(parameter: torch.Tensor) -> None:
        consume(parameter)
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(arrived) for p in parameters if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for hooks, before in waiting:
            hooks.update(before)


def stepping(optimizer: torch.optim.Optimizer | None) -> Consume:
    """Return what updates a parameter alone; nothing without an optimizer."""

    def step(parameter: torch.Tensor) -> None:
        if optimizer is not None:
            with updating_only(optimizer, parameter):
                optimizer.step()

    return step


__all__ = ["Consume", "consuming", "stepping"]
