"""Restore every value that a trial step changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from graph_capture.calls.spread_out import local_part
from graph_capture.private_torch.modules import buffers_of
from graph_capture.reads.isolation import attributes_put_back, generators_put_back

from .training_step import (
    LossFn,
    Sample,
    output_tensors,
)


@contextmanager
def preserve_state(
    model: nn.Module,
    sample_input: Sample,
    loss_fn: LossFn | None,
    optimizer: torch.optim.Optimizer | str | None,
) -> Iterator[None]:
    """Restore, at the end, every value that a step changed; copies lie on the CPU.

    This includes parameters that forward writes to (weights that it normalizes, a codebook
    that it averages), plain attributes of the modules (a counter in Python, a list that
    forward appends to, a tensor that it keeps) and the random generators of Python,
    NumPy and PyTorch.
    """
    parts = [part for part in (model, loss_fn) if isinstance(part, nn.Module)]
    registered = [(m, dict(buffers_of(m).items())) for part in parts for m in part.modules()]
    inputs = output_tensors(sample_input)
    tensors = [*inputs, *(b for part in parts for b in part.buffers())]
    leaves = [t for t in inputs if t.requires_grad and t.is_leaf]
    parameters = [p for part in parts for p in part.parameters()]
    leaves += parameters
    tensors += parameters  # forward may write to them, through .data unseen
    if isinstance(optimizer, torch.optim.Optimizer):
        tensors += [t for state in optimizer.state.values() for t in output_tensors(state)]
        leaves += [p for group in optimizer.param_groups for p in group["params"]]
        tensors += [p for group in optimizer.param_groups for p in group["params"]]
        states = {p: dict(state) for p, state in optimizer.state.items()}
        groups = [dict(group) for group in optimizer.param_groups]
    unique = {id(t): t for t in tensors}.values()
    copies = [
        (t, t.detach().to("cpu", copy=True)) for t in map(_dense_part, map(local_part, unique))
    ]
    grads = [(leaf, leaf.grad) for leaf in {id(t): t for t in leaves}.values()]
    modules = [module for part in parts for module in part.modules()]
    with generators_put_back(), attributes_put_back(modules):
        try:
            for leaf, _ in grads:
                leaf.grad = None
            yield
        finally:
            for leaf, grad in grads:
                leaf.grad = grad
            with torch.no_grad():
                for t, copy in copies:
                    if not torch.equal(t.to("cpu"), copy):
                        t.copy_(copy)
            for module, saved in registered:
                for name, buffer in saved.items():
                    if buffers_of(module)[name] is not buffer:
                        buffers_of(module)[name] = buffer
            if isinstance(optimizer, torch.optim.Optimizer):
                optimizer.state.clear()
                optimizer.state.update(states)
                for group, saved_group in zip(optimizer.param_groups, groups, strict=True):
                    group.update(saved_group)


def _dense_part(tensor: torch.Tensor) -> torch.Tensor:
    """A view of all its memory, without the repetitions of ``expand``."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
