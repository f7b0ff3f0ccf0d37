"""Real inputs of other batch sizes, to check what is said of them without making them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from benchmarks.testing.zoo import Case
from graph_capture.calls.call_spec import (
    TensorSpec,
    bind_call,
    changed,
    describe,
    realize,
    split_sample,
)
from planner.sizing.resized_loss import resized_loss
from planner.sizing.samples import ResizableSample


def real_call(case: Case, model: torch.nn.Module, batch: int) -> tuple[dict[str, Any], Any]:
    """Arguments of real tensors and the loss at a batch size: the sample's rows again and again.

    Numbers that the loss brings along are all one.
    """
    given = bind_call(model.forward, *split_sample(case.sample(0)))
    arguments = describe(given)
    sample = ResizableSample(arguments=arguments)

    def resize(spec: TensorSpec) -> TensorSpec:
        return sample.resize(spec, batch)

    call = realize(changed(dict(arguments), resize))
    for value, source in zip(tree_leaves(call), tree_leaves(given), strict=True):
        if isinstance(value, torch.Tensor):
            value.copy_(repeated(source, value.shape))
    call = {**call, **call.pop("kwargs", {})}
    loss_fn = resized_loss(case.loss_fn, resize)
    for cell in getattr(loss_fn, "__closure__", None) or ():
        if isinstance(cell.cell_contents, torch.Tensor):
            cell.cell_contents.fill_(1)
    return call, loss_fn


def repeated(source: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A tensor in another shape: in each dimension its own elements, from the first one on."""
    for dim, size in enumerate(shape):
        source = source.index_select(dim, torch.arange(size) % source.shape[dim])
    return source
