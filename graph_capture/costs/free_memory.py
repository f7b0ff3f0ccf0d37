"""Measure how much memory a device has left, for calls that run on it alone."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can be allocated on ``device`` now; ``None`` if unknown.

    On CUDA, what the card has left and what the caching allocator holds unused. On the
    CPU, what the kernel reports as available, within the container's limit.
    """
    if device.type == "cuda":
        on_card, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return on_card + unused
    limits = [n for n in (_available_bytes(), _container_bytes()) if n is not None]
    return min(limits, default=None)


def _available_bytes() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return _physical_bytes()
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return _physical_bytes()


def _physical_bytes() -> int | None:
    """Half of the machine's memory, for systems that do not say what is available."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):  # not on Windows
        return None


def _container_bytes() -> int | None:
    """What the control group may still take, including file cache that can be dropped."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None
