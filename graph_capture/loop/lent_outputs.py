"""Outputs that a loss has for as long as it holds them itself, for metering.

Stand-ins of the traced step live as long as its graph. A loop that lets go of the outputs once
it has the loss frees what neither it nor the loss' own autograd graph still holds, so its loss
is metered on stand-ins that nothing else holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..calls.storage_id import storage_id


@dataclass(kw_only=True)
class LentOutputs:
    """Stand-ins of a model's outputs, in memory of their own.

    Parameters
    ----------
    given
        What the loss gets, in the order of the outputs; to be emptied once it has it.
    edges
        Where the gradients of those that want one arrive, in their order. An edge holds
        no memory, unlike the tensor.
    memory
        For each memory that can be released, a tensor that fills it, by the first output
        that lies in it; to be emptied, too.
    """

    given: list[torch.Tensor]
    edges: list[GradientEdge]
    memory: dict[int, torch.Tensor]
    _output_of: dict[int, int] = field(default_factory=dict)  # memory -> the first output in it

    @classmethod
    def of(
        cls,
        tensors: Sequence[torch.Tensor],
        wanting: Collection[int],
        stays: Callable[[int], bool],
    ) -> LentOutputs:
        """Make stand-ins.

        Parameters
        ----------
        tensors
            The outputs.
        wanting
            Which of them require grad.
        stays
            Whether a memory outlives the outputs: a parameter's, say.
        """
        blocks: dict[int, torch.Tensor] = {}
        memory: dict[int, torch.Tensor] = {}
        given: list[torch.Tensor] = []
        edges: list[GradientEdge] = []
        output_of: dict[int, int] = {}
        for i, tensor in enumerate(tensors):
            twin = tensor.detach()
            memory_id = storage_id(tensor)
            if not stays(memory_id) and _is_plain(tensor):
                if memory_id not in blocks:
                    num_bytes = tensor.untyped_storage().nbytes()
                    block = torch.empty(num_bytes, dtype=torch.uint8, device=tensor.device)
                    blocks[memory_id] = memory[i] = block
                    output_of[storage_id(block)] = i
                twin = _view_like(tensor, blocks[memory_id])
            if i in wanting:
                twin = _Lent.apply(torch.empty((), device="meta", requires_grad=True), twin)
                edges.append(get_gradient_edge(twin))
            given.append(twin)
        return cls(given=given, edges=edges, memory=memory, _output_of=output_of)

    def in_step(self, gradient: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """A gradient that lies in a lent output lies in the step's own."""
        i = self._output_of.get(storage_id(gradient))
        if i is None:
            return gradient
        whole = tensors[i].detach().view(gradient.dtype)
        return whole.as_strided(gradient.shape, gradient.stride(), gradient.storage_offset())


class _Lent(torch.autograd.Function):
    """Where a loss' own graph ends; what lies beyond is the model's."""

    @staticmethod
    def forward(_ctx: Any, _anchor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.detach()

    @staticmethod
    def backward(_ctx: Any, *_gradient: torch.Tensor) -> Any:
        raise AssertionError("a gradient is taken here, not passed on")


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_conj() and not tensor.is_neg()


def _view_like(tensor: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    whole = block.numel() // tensor.element_size() * tensor.element_size()
    elements = block[:whole].view(tensor.dtype)
    return elements.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


__all__ = ["LentOutputs"]
