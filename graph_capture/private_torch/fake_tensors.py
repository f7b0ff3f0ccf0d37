"""Tensors without memory: shapes, strides, devices and types only."""

from __future__ import annotations

from typing import Any

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,  # 2.11+; raised where a number of Python's is asked for
    DynamicOutputShapeException,  # 2.11+; raised where a shape depends on values
    FakeTensor,  # 2.11+; a tensor without memory
    FakeTensorMode,  # 2.11+; operators make these while it is active
)

# 2.11+; where PyTorch logs a failing operator before it raises the same error
FAKE_TENSOR_LOGGER = "torch._subclasses.fake_tensor"


def pass_for_parameter(tensor: Any) -> None:
    """Make ``isinstance(tensor, nn.Parameter)`` true, of a tensor of another class; 2.11+."""
    tensor._is_param = True


__all__ = [
    "FAKE_TENSOR_LOGGER",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "pass_for_parameter",
]
