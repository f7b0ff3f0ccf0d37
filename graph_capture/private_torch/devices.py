"""What a build of PyTorch knows of CUDA. Each is ``None`` in a build that lacks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._prims_common import (
    suggest_memory_format,  # 2.11+; layout of a tensor by its strides, as fake kernels see it
)


def cuda_guard_setter() -> Callable[[], Any] | None:
    """``_ensureCUDADeviceGuardSet``: a guard that does nothing, for fake CUDA tensors; 2.11+."""
    return getattr(torch._C, "_ensureCUDADeviceGuardSet", None)


def cublas_workspace_clearer() -> Callable[[], Any] | None:
    """``_cuda_clearCublasWorkspaces``, in builds with CUDA: a step makes its own; 2.11+."""
    return getattr(torch._C, "_cuda_clearCublasWorkspaces", None)


__all__ = [
    "cublas_workspace_clearer",
    "cuda_guard_setter",
    "suggest_memory_format",
]
