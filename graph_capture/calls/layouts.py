"""Refuse sparse and nested tensors: only dense ones can be planned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import CaptureError, NotFittingError
from ..private_torch.operators import schema_of

_INSTEAD = (
    "keep indices and values in dense tensors and multiply with index_select and index_add, or "
    "plan the dense part of the model"
)
_PAD = (
    "pad instead (torch.nn.utils.rnn.pad_sequence) and multiply by a mask, or plan the part of the "
    "model behind it"
)


def refuse_argument(tensor: torch.Tensor) -> None:
    """Refuse an argument that is not dense."""
    if is_nested(tensor):
        raise NotFittingError(
            "an argument is a nested tensor; only dense tensors can be planned: pad it "
            "(torch.nested.to_padded_tensor) and pass the lengths or a mask, or plan the part "
            "of the model behind it"
        )
    if tensor.layout != torch.strided:
        raise NotFittingError(
            f"an argument is a tensor of layout {tensor.layout}; only dense tensors can be "
            "planned: pass it dense (to_dense()), pass indices and values and multiply with "
            "index_select and index_add, or plan the dense part of the model"
        )


def refuse_state(tensor: torch.Tensor, name: str) -> None:
    """Refuse a model's tensor that is not dense; ``name`` describes it in words."""
    if is_nested(tensor) or tensor.layout != torch.strided:
        raise NotFittingError(
            f"{name} is a {_kind(tensor)}; only dense tensors can be planned: hold it dense "
            f"(to_dense()), {_INSTEAD}"
        )


def refuse_result(tensor: torch.Tensor, line: str, phase: str) -> None:
    """Refuse a tensor of the step that is not dense."""
    if is_nested(tensor):
        raise CaptureError(
            f"a nested tensor is made ({line}); only dense ones can be planned: {_PAD}"
        )
    if tensor.layout == torch.strided:
        return
    if phase == "backward":
        raise CaptureError(
            f"a gradient of layout {tensor.layout} is made ({line}); only dense tensors can be "
            "planned: turn off options such as nn.Embedding(sparse=True)"
        )
    raise CaptureError(
        f"a tensor of layout {tensor.layout} is used ({line}); only dense tensors can be planned: "
        f"make it dense (to_dense()) outside of the model, {_INSTEAD}"
    )


def refuse_nesting(func: Any, line: Callable[[], str]) -> None:
    """Refuse a call that makes nested tensors: stand-ins do not know their sizes."""
    if "nested" in schema_of(func).name:
        raise CaptureError(
            f"{func} works on nested tensors ({line()}); only dense ones can be planned: {_PAD}"
        )


def is_nested(tensor: torch.Tensor) -> bool:
    """Whether a tensor is nested, in either of PyTorch's two nested layouts."""
    return tensor.is_nested or tensor.layout == torch.jagged


def _kind(tensor: torch.Tensor) -> str:
    return "nested tensor" if is_nested(tensor) else f"tensor of layout {tensor.layout}"


__all__ = ["is_nested", "refuse_argument", "refuse_nesting", "refuse_result", "refuse_state"]
