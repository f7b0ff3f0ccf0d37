"""The versions and the machine that a bug report should name."""

from __future__ import annotations

import os
from typing import TextIO

import torch

from graph_capture.units import format_bytes

from .comparing.machine import cpu_name, machine, num_cpus, version_of

NEEDED = (
    "remat-planner",
    "torch",
    "numpy",
    "scipy",
    "networkx",
    "numba",
    "highspy",
    "ortools",
    "jsonschema",
    "rich",
    "typer",
)
"""This package and what it cannot do without."""

OPTIONAL = ("transformers", "matplotlib", "pandas")
"""Used where they are installed."""

_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF")


def show_versions(file: TextIO | None = None) -> None:
    """Print what a bug report should say: versions, the machine, PyTorch's build.

    Nothing is measured and no device is initialized beyond asking for its name.
    The command ``remat doctor`` prints the same and tries a small plan.

    Parameters
    ----------
    file
        Where to write; ``None`` for stdout.

    Examples
    --------
    >>> show_versions()  # doctest: +ELLIPSIS
    remat-planner ...
    """
    print("\n".join(version_lines()), file=file)


def version_lines() -> list[str]:
    """What :func:`show_versions` prints, a fact a line."""
    facts = version_facts()
    width = max(map(len, facts)) + 2
    return [f"{name:<{width}}{value}" for name, value in facts.items()]


def version_facts() -> dict[str, str]:
    """The facts behind :func:`show_versions`, by name."""
    here = machine()
    facts = {name: version_of(name) or "not found" for name in NEEDED}
    facts |= {name: version_of(name) or "not installed (optional)" for name in OPTIONAL}
    facts |= {
        "python": here["python"],
        "platform": here["platform"],
        "cpu": f"{cpu_name()}, {num_cpus() or os.cpu_count()} usable",
        "torch threads": str(torch.get_num_threads()),
        "torch cpu kernels": torch.backends.cpu.get_cpu_capability(),
        "torch cuda": torch.version.cuda or torch.version.hip or "none (CPU build)",
    }
    facts |= {f"device cuda:{i}": card for i, card in enumerate(_cards())}
    return facts | {name: os.environ[name] for name in _SETTINGS if name in os.environ}


def _cards() -> list[str]:
    if not torch.cuda.is_available():
        return []
    cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{card.name}, {format_bytes(card.total_memory)}" for card in cards]
