"""What PyTorch's CPU allocator reports while a call runs.

The allocator reports every allocation and free to the profiler. The recorder
used here is the one behind ``torch.autograd.profiler_legacy``: it hears the
same reports as ``torch.profiler``, in order, and does not write to stderr.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._C._profiler import _ExperimentalConfig
from torch.autograd import (
    ProfilerConfig,
    ProfilerState,
    _disable_profiler_legacy,
    _enable_profiler_legacy,
)


def peak_extra_bytes(call: Callable[[], Any]) -> int:
    """Most bytes that a call holds at once, on CPU, beyond what was there before it.

    What the call returns counts and stays alive until the record has ended.
    """
    config = ProfilerConfig(
        ProfilerState.CPU,
        False,  # shapes
        True,  # memory
        False,  # stack
        False,  # flops
        False,  # modules
        _ExperimentalConfig(),
    )
    _enable_profiler_legacy(config)
    try:
        returned = call()
    finally:
        records = _disable_profiler_legacy()
    del returned
    sizes = [e.cpu_memory_usage() for e in _in_order(records) if e.kind() == "memory_alloc"]
    alive = peak = 0
    for size in sizes:
        alive += size
        peak = max(peak, alive)
    return peak


def _in_order(records: list[list[Any]]) -> list[Any]:
    """Merge the threads' lists by time; each list is in order already."""
    busy = [thread for thread in records if thread]
    if len(busy) <= 1:
        return busy[0] if busy else []
    start = busy[0][0]
    return sorted((e for thread in busy for e in thread), key=start.cpu_elapsed_us)
