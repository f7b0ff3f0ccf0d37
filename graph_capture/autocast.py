"""Autocast for devices that need not be present."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def autocast_as(torch_type: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast to ``dtype`` on a device type; disable autocast where it is ``None``.

    ``torch.autocast("cuda")`` switches itself off on a machine without CUDA;
    this does not, so a step can be captured there as it will run elsewhere.
    """
    was_enabled = torch.is_autocast_enabled(torch_type)
    was_dtype = torch.get_autocast_dtype(torch_type)
    torch.set_autocast_enabled(torch_type, dtype is not None)
    if dtype is not None:
        torch.set_autocast_dtype(torch_type, dtype)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(torch_type, was_enabled)
        torch.set_autocast_dtype(torch_type, was_dtype)
