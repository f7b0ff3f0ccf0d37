"""Accumulate gradients as ``AccumulateGrad`` does: take them over, or copy them."""

from __future__ import annotations

import torch
from torch.fx import Node

from ..calls.spread_out import is_spread, local_part
from ..calls.storage_id import storage_id
from ..private_torch.sharding import division_of
from .recorder import Recorder


def settle_gradients(
    leaves: list[tuple[Node, torch.Tensor]],
    found: tuple[torch.Tensor | None, ...],
    outputs: list[torch.Tensor],
    recorder: Recorder,
) -> list[tuple[Node, Node]]:
    """Copy the gradients that autograd would copy, so that the graph contains the copies.

    ``AccumulateGrad`` takes a gradient over as it is if nothing else holds its
    memory and its layout is the parameter's. Otherwise it clones it
    (torch/csrc/autograd/functions/accumulate_grad.h).
    """
    taken = {storage_id(t) for t in outputs}
    taken |= {storage_id(node.meta["val"]) for node in recorder.graph.find_nodes(op="placeholder")}
    settled = []
    for (node, leaf), gradient in zip(leaves, found, strict=True):
        if gradient is None:
            continue
        if node.meta["role"] == "parameter":
            fits = gradient.stride() == leaf.stride() if _dense(leaf) else gradient.is_contiguous()
            part = local_part(gradient)
            if storage_id(part) in taken or not fits or not _owns_all(part):
                if is_spread(gradient):
                    gradient = gradient.clone()
                else:
                    copy = torch.empty_like(leaf, memory_format=torch.preserve_format)
                    gradient = copy.copy_(gradient)
            taken.add(storage_id(local_part(gradient)))
        if is_spread(gradient):
            node.meta["division"] = division_of(gradient)
        settled.append((node, recorder.node_of(local_part(gradient))))
    return settled


def _owns_all(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill one block of memory without gap or overlap."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
