"""``torch.tensor([a, b, 3])`` of stand-ins, by calls that can be traced.

PyTorch reads the elements out of their memory, and a stand-in has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch

from ..private_torch.fake_tensors import FakeTensor


@contextmanager
def tensors_of_tensors() -> Iterator[None]:
    """While active, ``torch.tensor`` and ``torch.as_tensor`` stack the stand-ins in a list."""
    before = {name: getattr(torch, name) for name in ("tensor", "as_tensor")}

    def making(name: str) -> Any:
        own = before[name]

        def make(
            data: Any, *args: Any, dtype: Any = None, device: Any = None, **kwargs: Any
        ) -> Any:
            if args or not _holds_stand_ins(data):
                return own(data, *args, dtype=dtype, device=device, **kwargs)
            made = _stacked(data, own, dtype or _dtype_of(data, own), device)
            return made.requires_grad_(kwargs.get("requires_grad", False))

        return make

    for name in before:
        setattr(torch, name, making(name))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(torch, name, function)


def _holds_stand_ins(data: Any) -> bool:
    if not isinstance(data, (list, tuple)):
        return False
    return any(isinstance(x, FakeTensor) or _holds_stand_ins(x) for x in data)


def _dtype_of(data: Any, own: Any) -> torch.dtype:
    """What PyTorch infers: what all elements can be promoted to."""
    if isinstance(data, torch.Tensor):
        return data.dtype
    if isinstance(data, (list, tuple)):
        return reduce(torch.promote_types, (_dtype_of(x, own) for x in data))
    return own(data).dtype


def _stacked(data: Any, own: Any, dtype: torch.dtype, device: Any) -> torch.Tensor:
    where = torch.get_default_device() if device is None else device
    if isinstance(data, torch.Tensor):
        if data.numel() != 1:
            raise ValueError("only one element tensors can be converted to Python scalars")
        return data.detach().reshape(()).to(device=where, dtype=dtype)
    if isinstance(data, (list, tuple)):
        return torch.stack([_stacked(x, own, dtype, where) for x in data])
    return own(data, dtype=dtype, device=where)


__all__ = ["tensors_of_tensors"]
