"""Read what PyTorch's allocators report while a call runs.

The CPU allocator reports every allocation and free to the profiler. The recorder
used here is the one behind ``torch.autograd.profiler_legacy``: it hears the
same reports as ``torch.profiler``, in order, and does not write to stderr.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import (
    ProfilerConfig,
    ProfilerState,
)

from ..private_torch.profiler import ExperimentalConfig, start_legacy_profiler, stop_legacy_profiler

CUDA_BLOCK_BYTES = 512  # c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize


def block_bytes(num_bytes: int, torch_type: str) -> int:
    """Return the bytes that the allocator takes for a tensor: whole blocks on CUDA.

    >>> block_bytes(513, "cuda"), block_bytes(513, "cpu")
    (1024, 513)
    """
    return (
        -(-num_bytes // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES if torch_type == "cuda" else num_bytes
    )


def peak_extra_bytes(call: Callable[[], Any]) -> int:
    """Return the peak bytes of a call on the CPU, beyond what was allocated before it.

    What the call returns counts and stays alive until the record has ended. Records may
    be nested, as where a training loop is recorded that plans its first step.
    """
    around = _records.open[-1] if _records.open else None
    if around is not None:  # the profiler has one record at a time
        around += _sizes(stop_legacy_profiler())
    sizes: list[int] = []
    _records.open.append(sizes)
    _start()
    try:
        returned = call()
    finally:
        sizes += _sizes(stop_legacy_profiler())
        _records.open.pop()
        if around is not None:
            around += sizes
            _start()
    del returned
    alive = peak = 0
    for size in sizes:
        alive += size
        peak = max(peak, alive)
    return peak


class _Records(threading.local):
    """The records of this thread that are open, each as its allocations and frees so far."""

    def __init__(self) -> None:
        self.open: list[list[int]] = []


_records = _Records()


def _start() -> None:
    start_legacy_profiler(
        ProfilerConfig(
            ProfilerState.CPU,
            False,  # shapes
            True,  # memory
            False,  # stack
            False,  # flops
            False,  # modules
            ExperimentalConfig(),
        )
    )


def _sizes(records: list[list[Any]]) -> list[int]:
    return [e.cpu_memory_usage() for e in _in_order(records) if e.kind() == "memory_alloc"]


def peak_extra_bytes_on_card(call: Callable[[], Any], device: torch.device) -> int:
    """Most bytes, in blocks of the caching allocator, that a call holds at once on a card.

    Resets the device's peak statistics: the caller's own
    ``torch.cuda.max_memory_allocated`` drops to what is allocated now.
    """
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before_bytes = torch.cuda.memory_allocated(device)
    returned = call()
    torch.cuda.synchronize(device)
    peak_bytes = torch.cuda.max_memory_allocated(device) - before_bytes
    del returned
    return peak_bytes


def _in_order(records: list[list[Any]]) -> list[Any]:
    """Merge the threads' lists by time; each list is in order already."""
    busy = [thread for thread in records if thread]
    if len(busy) <= 1:
        return busy[0] if busy else []
    start = busy[0][0]
    return sorted((e for thread in busy for e in thread), key=start.cpu_elapsed_us)
