"""Scratch memory that kernels take from the allocator while they run.

Sizes follow from the kernels' sources, named beside each rule; a call that has
no rule is counted with none.
"""

from __future__ import annotations

from typing import Any

import torch


def workspace_bytes(func: Any, args: tuple, kwargs: dict, out: Any, device_type: str) -> int:
    """Bytes that the call allocates and frees again beside its outputs."""
    if device_type != "cpu":
        return 0
    rule = _CPU_RULES.get(func._schema.name)
    return rule(args, kwargs, out) if rule is not None else 0


def _bernoulli(args: tuple, _kwargs: dict, _out: Any) -> int:
    # aten/src/ATen/native/cpu/DistributionTemplates / bernoulli_mkl_kernel: draws into an int
    # tensor first, unless the target is a contiguous int tensor.
    target = args[0]
    if target.dtype == torch.int32 and target.is_contiguous():
        return 0
    return target.numel() * 4 if torch.backends.mkl.is_available() else 0


_CPU_RULES = {
    "aten::bernoulli_": _bernoulli,
}
