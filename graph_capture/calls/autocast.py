"""Autocast for devices that need not be present."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class AutocastState:
    """The autocast that a call runs under.

    Parameters
    ----------
    torch_type
        The device type that it is for.
    dtype
        What it casts to; ``None`` where it is off.
    caches
        Whether it keeps its casts of parameters until its region ends.
    """

    torch_type: str
    dtype: torch.dtype | None
    caches: bool

    @classmethod
    def of(cls, torch_type: str) -> AutocastState:
        """Return the active one."""
        enabled = torch.is_autocast_enabled(torch_type)
        return cls(
            torch_type=torch_type,
            dtype=torch.get_autocast_dtype(torch_type) if enabled else None,
            caches=torch.is_autocast_cache_enabled() if enabled else True,
        )

    @contextmanager
    def holding(self) -> Iterator[None]:
        """While active, code runs under this autocast, as if its region had just begun."""
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(self.caches)
        try:
            with autocast_as(self.torch_type, self.dtype):
                yield
        finally:
            torch.set_autocast_cache_enabled(cached)


@contextmanager
def autocast_as(torch_type: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast to ``dtype`` on a device type; disable autocast where it is ``None``.

    ``torch.autocast("cuda")`` switches itself off on a machine without CUDA;
    this does not, so a step can be captured there as it will run elsewhere.
    """
    was_enabled = torch.is_autocast_enabled(torch_type)
    was_dtype = torch.get_autocast_dtype(torch_type)
    try:
        if dtype is not None:
            torch.set_autocast_dtype(torch_type, dtype)
        torch.set_autocast_enabled(torch_type, dtype is not None)
        torch.clear_autocast_cache()
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(torch_type, was_enabled)
        torch.set_autocast_dtype(torch_type, was_dtype)
