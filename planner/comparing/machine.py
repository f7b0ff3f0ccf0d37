"""The machine and the versions behind a figure."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

PACKAGES = ("torch", "remat-planner", "transformers", "highspy", "ortools", "numba", "numpy")
"""Packages that affect a comparison's figures."""


def cpu_name() -> str:
    """Return the processor's own name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def num_cpus() -> int | None:
    """Return how many CPUs this process may use; ``None`` if the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def version_of(package: str) -> str | None:
    """Return the installed version of a package; ``None`` if it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def name_of(device: torch.device) -> str:
    """Return the name of the GPU or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def threads_of(device: torch.device) -> int | None:
    """Return how many threads PyTorch's kernels use on a CPU; ``None`` elsewhere."""
    return torch.get_num_threads() if device.type == "cpu" else None


def dtype_of(model: nn.Module) -> str:
    """Return the dtype of most parameter elements; ``""`` if there are none."""
    sizes: Counter[str] = Counter()
    for parameter in model.parameters():
        sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else ""


def autocast_of(device_type: str) -> str:
    """Return the dtype of the active autocast; ``""`` if there is none."""
    if not torch.is_autocast_enabled(device_type):
        return ""
    return str(torch.get_autocast_dtype(device_type)).removeprefix("torch.")


def machine() -> dict[str, Any]:
    """The machine and the moment, ready for JSON."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "num_cpus": num_cpus(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The versions of the installed ones of those packages, and Python's."""
    found = {name: version_of(name) for name in packages}
    return {"python": platform.python_version()} | {k: v for k, v in found.items() if v}
