"""Compute gradients by the model's own forward if a plan's backward cannot.

A planned backward is one graph for one purpose: the gradients from all outputs planned
as differentiated, once. If gradients are requested from only some of the outputs, the
model's own forward runs again, from the same inputs, buffers and generator state, and
autograd computes them as it would have without a plan. The numbers equal eager's to the
bit. The plan does not cover the memory and time.

Gradients that are differentiated again are not computed this way. Eager adds what comes
from the loss and what comes from its gradient at each activation; here they would be
added at the parameters, with different last bits.

The caller refuses a model that was changed between forward and backward. Imperfections:
plain Python effects of forward happen a second time, and parameters that the loop
changed in place between forward and backward are noticed only where the plan saved
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from graph_capture.calls.autocast import autocast_as
from graph_capture.calls.call_spec import call_forward
from graph_capture.private_torch.modules import buffers_of
from graph_capture.recording.outputs import take_apart


def own_gradients(
    model: nn.Module,
    forward: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    outputs: Mapping[int, torch.Tensor],
    inputs: Sequence[torch.Tensor],
    generator_state: np.ndarray | None,
    device: torch.device,
    autocast: torch.dtype | None,
) -> list[torch.Tensor | None]:
    """Return the gradients of ``inputs``; ``None`` for those that nothing depends on.

    Parameters
    ----------
    model, forward, arguments
        The module, its own forward, and the call's arguments by name.
    outputs
        Gradients of output tensors, by their place in the output.
    inputs
        Parameters and arguments; those that do not require grad get ``None``.
    generator_state
        State of the default generator of ``device`` when the planned forward began;
        ``None`` if it draws nothing.
    autocast
        Dtype of the autocast that the planned forward ran under.
    """
    with (
        torch.enable_grad(),
        _generator_at(generator_state, device),
        _buffers_copied(model),
        autocast_as(device.type, autocast),
    ):
        _, tensors = take_apart(call_forward(forward, arguments))
    wanted = [i for i, t in enumerate(inputs) if t.requires_grad]
    found = torch.autograd.grad(
        [tensors[i] for i in outputs],
        [inputs[i] for i in wanted],
        list(outputs.values()),
        allow_unused=True,
    )
    gradients: list[torch.Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients


@contextmanager
def _generator_at(state: np.ndarray | None, device: torch.device) -> Iterator[None]:
    """Draw again from ``state``; afterwards the generator is restored."""
    if state is None:
        yield
        return
    before = generator_state(device)
    set_generator(state, device)
    try:
        yield
    finally:
        set_generator(before, device)


def generator_state(device: torch.device) -> np.ndarray:
    """Return the state of a device's default generator, uint8.

    It is a NumPy array: a tensor (5 kB on the CPU) would count in the memory that the
    plan covers.
    """
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device).numpy()
    return torch.get_rng_state().numpy().copy()


def set_generator(state: np.ndarray, device: torch.device) -> None:
    """Set what :func:`generator_state` returned."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(torch.from_numpy(state), device)
    else:
        torch.set_rng_state(torch.from_numpy(state))


@contextmanager
def _buffers_copied(model: nn.Module) -> Iterator[None]:
    """Let forward write to copies of the buffers: it has already written to the buffers once."""
    tables = [(buffers_of(m), dict(buffers_of(m))) for m in model.modules() if buffers_of(m)]
    copies: dict[int, torch.Tensor] = {}
    for table, before in tables:
        for name, buffer in before.items():
            if buffer is not None:
                table[name] = copies.setdefault(id(buffer), buffer.detach().clone())
    try:
        yield
    finally:
        for table, before in tables:
            table.clear()
            table.update(before)
