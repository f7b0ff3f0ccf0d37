"""Tell tensors in one memory from tensors in different ones."""

from __future__ import annotations

import torch

from ..private_torch.tensors import identity_of_storage


def storage_id(tensor: torch.Tensor) -> int:
    """Identity of the memory behind ``tensor``; views share it."""
    return identity_of_storage(tensor.untyped_storage())
