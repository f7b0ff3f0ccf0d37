"""Fake CUDA tensors on a machine where PyTorch has no CUDA device.

Whenever autograd makes a node, it asks the guard of the tensor's device for the
current stream. A build without CUDA has no such guard and aborts the process.
PyTorch has a guard that does nothing
(``c10/core/impl/DeviceGuardImplInterface.h``), but installs it only in place of a
guard that counts no devices. So one that counts none is installed first.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from ..errors import CaptureError
from ..private_torch.devices import cuda_guard_setter

# A std::array of atomic pointers to guards, by device type.
_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"
_CUDA = 1  # c10/core/DeviceType.h
_LIBRARIES = ("libc10.so", "libc10.dylib")
_NUM_VIRTUALS = 64  # more than the interface has


def ensure_cuda_guard() -> None:
    """Let autograd run on fake CUDA tensors on this machine.

    Does nothing if a CUDA device is present. Otherwise a guard without devices
    replaces the missing one for the life of the process.
    ``torch.cuda.is_available()`` and everything on the CPU stay as they are.

    Raises
    ------
    CaptureError
        When this build of PyTorch does not allow it.
    """
    if torch.cuda.is_available():
        return
    install = cuda_guard_setter()
    if install is None:
        raise _cannot("it has no torch._C._ensureCUDADeviceGuardSet")
    registry = _registry()
    if registry[_CUDA]:
        install()  # a build with CUDA on a machine without a card
        return
    counts_none = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(lambda _this: 0)
    address = ctypes.cast(counts_none, ctypes.c_void_p).value
    virtuals = (ctypes.c_void_p * _NUM_VIRTUALS)(*[address] * _NUM_VIRTUALS)
    stand_in = (ctypes.c_void_p * 1)(ctypes.addressof(virtuals))
    registry[_CUDA] = ctypes.addressof(stand_in)
    try:
        install()
    finally:
        if registry[_CUDA] == ctypes.addressof(stand_in):
            registry[_CUDA] = None
    if not registry[_CUDA]:
        raise _cannot("torch._C._ensureCUDADeviceGuardSet() left the stand-in guard in place")


def _registry() -> ctypes.Array[ctypes.c_void_p]:
    folder = Path(torch.__file__).parent / "lib"
    for path in (folder / name for name in _LIBRARIES):
        if path.exists():
            try:
                return (ctypes.c_void_p * (_CUDA + 1)).in_dll(ctypes.CDLL(str(path)), _REGISTRY)
            except (OSError, ValueError) as error:
                raise _cannot(str(error)) from error
    raise _cannot(f"there is none of {', '.join(_LIBRARIES)} in {folder}")


def _cannot(reason: str) -> CaptureError:
    return CaptureError(
        f"this build of torch ({torch.__version__}) cannot stand in for a CUDA device ({reason}); "
        "plan with a CUDA build of torch, on Linux with any build, or on the device itself"
    )
