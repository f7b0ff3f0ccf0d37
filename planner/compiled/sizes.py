"""Sizes of tensors whose shapes are symbols: by the largest size that a symbol may have."""

from __future__ import annotations

from typing import Any

import torch

from graph_capture.errors import CaptureError
from graph_capture.private_torch.compiler import holds_up_to, largest

from .joint_step import JointStep


def concrete(value: Any) -> Any:
    """The same value with numbers instead of symbols; a stand-in without memory for a tensor."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return largest(value)
    if not isinstance(value, torch.Tensor) or not _has_symbols(value):
        return value
    return torch.empty_strided(
        [_most(n) for n in value.shape],
        [_most(n) for n in value.stride()],
        dtype=value.dtype,
        device="meta",
    )


def plan_for_largest(step: JointStep) -> None:
    """Let a call that is larger than what the plan is made for compile again."""
    for primal in step.primals:
        value = primal.meta.get("val")
        if isinstance(value, torch.SymInt):
            holds_up_to(value, largest(value))


def num_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the memory behind a tensor."""
    return int(_most(tensor.untyped_storage().nbytes()))


def _most(size: Any) -> Any:
    most = largest(size)
    if most is None:
        raise CaptureError(
            f"a size of a compiled graph, {size}, depends on the values of a tensor (a mask, "
            "nonzero(), item()) and has no bound, so that there is no largest step to plan for: "
            "bound it in the model, by torch._check(selected.shape[0] <= 4096) for instance, or "
            "leave capture_dynamic_output_shape_ops and capture_scalar_outputs of "
            "torch._dynamo.config off"
        )
    return most


def _has_symbols(tensor: torch.Tensor) -> bool:
    return any(isinstance(n, torch.SymInt) for n in (*tensor.shape, *tensor.stride()))


__all__ = ["concrete", "num_bytes", "plan_for_largest"]
