"""Fake tensors in place of a step's real ones, on the step's target device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..calls.call_spec import describe, moved, realize
from ..calls.spread_out import is_spread, local_part
from ..calls.storage_id import storage_id
from ..costs.target import Target
from ..private_torch.fake_tensors import FakeTensor, FakeTensorMode, pass_for_parameter
from ..private_torch.sharding import division_of, whole_of


class FakeInputs:
    """Twins of tensors: same shape, strides and dtype, same sharing of memory, no memory.

    Parameters
    ----------
    fake_mode
        The mode that they belong to.
    target
        Says where they lie.
    """

    def __init__(self, fake_mode: FakeTensorMode, target: Target) -> None:
        self._fake_mode = fake_mode
        self._target = target
        self._storages: dict[int, torch.UntypedStorage] = {}

    def of(self, tensor: torch.Tensor, *, with_rest: bool = True) -> torch.Tensor:
        """Return the twin of a parameter or buffer; a leaf if it requires grad.

        Parameters
        ----------
        with_rest
            Whether memory behind it that no view covers counts, too.
        """
        if is_spread(tensor):
            part = self.of(local_part(tensor), with_rest=with_rest)
            whole = whole_of(part, division_of(tensor), requires_grad=tensor.requires_grad)
            if isinstance(tensor, nn.Parameter):
                pass_for_parameter(whole)
            return whole
        where = self._target.place(tensor.device)
        fake: torch.Tensor
        if where == tensor.device and not isinstance(tensor, FakeTensor):
            fake = self._fake_mode.from_tensor(_without_former_gradient(tensor), static_shapes=True)
            memory, num_bytes = fake.untyped_storage(), tensor.untyped_storage().nbytes()
            if with_rest and memory.nbytes() < num_bytes:
                memory.resize_(num_bytes)
        else:
            fake = self._moved(tensor, where)
        if tensor.requires_grad and not (fake.is_leaf and fake.requires_grad):
            is_parameter = isinstance(tensor, nn.Parameter)
            fake = fake.detach().requires_grad_()
            if is_parameter:
                pass_for_parameter(fake)
        return fake

    def of_arguments(self, arguments: Any) -> Any:
        """Return twins of the tensors in a call, each with its own memory."""
        with self._fake_mode:
            return realize(moved(describe(arguments), self._target.place))

    def _moved(self, tensor: torch.Tensor, where: torch.device) -> torch.Tensor:
        memory = storage_id(tensor)
        if memory not in self._storages:
            num_bytes = tensor.untyped_storage().nbytes()
            self._storages[memory] = torch.UntypedStorage(num_bytes, device="meta")
        element = torch.empty(0, dtype=tensor.dtype, device="meta").set_(
            self._storages[memory], tensor.storage_offset(), tensor.shape, tensor.stride()
        )
        fake = FakeTensor(self._fake_mode, element, where).requires_grad_(tensor.requires_grad)
        if isinstance(tensor, nn.Parameter):
            pass_for_parameter(fake)
        return fake


def _without_former_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Leave a gradient out that is not of the tensor's size or dtype any more.

    ``tensor.data`` was exchanged since, and ``zero_grad`` comes after the forward pass.
    """
    gradient = tensor.grad if tensor.is_leaf else None
    if gradient is None or (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype):
        return tensor
    return tensor.detach()
