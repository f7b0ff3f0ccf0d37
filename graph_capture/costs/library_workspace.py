"""Memory that a library allocates once and keeps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..private_torch.operators import OpOverload, schema_of
from .device import Device

STORAGE_NAME = "library workspace"  # of the storage that stands for it in a cost graph

_CUBLAS_CALLS = {
    f"aten::{name}"
    for name in (
        *("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot"),
        *("_scaled_mm", "_int_mm", "_addmm_activation", "linalg_solve_triangular"),
    )
}


def library_workspace_bytes(targets: Iterable[Any], device: Device) -> int:
    """Return the bytes that cuBLAS holds from the first product of a step on.

    PyTorch gives cuBLAS a workspace from its own allocator when the first product runs,
    and never takes it back (``aten/src/ATen/cuda/CublasHandlePool.cpp``). There is one
    for each stream that products run on; a step has one stream.

    Parameters
    ----------
    targets
        The functions that the step calls.
    device
        Where they run.
    """
    multiplies = any(
        isinstance(target, OpOverload) and schema_of(target).name in _CUBLAS_CALLS
        for target in targets
    )
    return device.library_workspace_bytes if multiplies else 0
