"""Real inputs of other batch sizes, to check what is said of them without making them."""

from __future__ import annotations

from typing import Any

import torch

from graph_capture.call_spec import TensorSpec, bind_call, changed, describe, realize, split_sample
from planner.sizing.resized_loss import resized_loss
from planner.sizing.samples import ResizableSample
from tests.zoo import Case


def real_call(case: Case, model: torch.nn.Module, batch: int) -> tuple[dict[str, Any], Any]:
    """Arguments of real tensors and the loss at a batch size; every number is one."""
    arguments = describe(bind_call(model.forward, *split_sample(case.sample(0))))
    sample = ResizableSample(arguments=arguments)

    def resize(spec: TensorSpec) -> TensorSpec:
        return sample.resize(spec, batch)

    call = realize(changed(dict(arguments), resize))
    call = {**call, **call.pop("kwargs", {})}
    for value in call.values():
        if isinstance(value, torch.Tensor):
            value.fill_(value.dtype != torch.bool)
    loss_fn = resized_loss(case.loss_fn, resize)
    for cell in getattr(loss_fn, "__closure__", None) or ():
        if isinstance(cell.cell_contents, torch.Tensor):
            cell.cell_contents.fill_(1)
    return call, loss_fn
