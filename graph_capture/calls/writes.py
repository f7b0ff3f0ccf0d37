"""What a call writes to, whether its schema says so or not."""

from __future__ import annotations

from typing import Any

import torch

from ..private_torch.operators import OpOverload, schema_of
from ..private_torch.trees import tree_iter

aten = torch.ops.aten

UNDECLARED_STATISTICS = {
    aten.native_batch_norm.default,
    aten.cudnn_batch_norm.default,
    aten.miopen_batch_norm.default,
}
"""Batch normalizations that update running_mean and running_var (arguments 3, 4) although their
schema does not say so."""


def written_arguments(func: OpOverload, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """Return the tensors that the call writes to, by its schema."""
    written: list[torch.Tensor] = []
    for i, argument in enumerate(schema_of(func).arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = kwargs.get(argument.name, args[i] if i < len(args) else None)
        written.extend(t for t in tree_iter(value) if isinstance(t, torch.Tensor))
    return written


def hidden_writes(func: Any, args: tuple) -> tuple[torch.Tensor, ...]:
    """Return the tensors that a call writes to although its schema does not say so."""
    if func in UNDECLARED_STATISTICS and args[5]:
        return tuple(t for t in args[3:5] if t is not None)
    return ()
