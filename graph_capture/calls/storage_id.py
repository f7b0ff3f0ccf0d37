"""The memory behind tensors: whether it is the same, and what is in it."""

from __future__ import annotations

import torch

from ..private_torch.tensors import identity_of_storage


def storage_id(tensor: torch.Tensor) -> int:
    """Identity of the memory behind ``tensor``; views share it."""
    return identity_of_storage(tensor.untyped_storage())


def bytes_in(memory: torch.UntypedStorage) -> torch.Tensor:
    """A tensor of its own: autograd does not take a saved one for changed where it is written."""
    return torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory)
