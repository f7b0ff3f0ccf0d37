"""Tell user and library code from internals, so that messages name useful lines."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import torch

# With a separator: torchvision and torch_geometric lie beside torch.
TORCH_ROOT = str(Path(torch.__file__).parent) + os.sep
PYTHON_ROOT = str(Path(os.__file__).parent) + os.sep
_LIBRARIES = tuple(os.sep + folder + os.sep for folder in ("site-packages", "dist-packages"))
OWN_ROOTS = tuple(
    str(Path(__file__).parent.parent / package) + os.sep for package in ("graph_capture", "planner")
)


@lru_cache(maxsize=4096)
def is_machinery(file_name: str) -> bool:
    """Whether a file belongs to Python, PyTorch or this project, or is generated code."""
    if file_name.startswith((TORCH_ROOT, *OWN_ROOTS, "<")):
        return True
    # Libraries may lie in a folder of Python's.
    return file_name.startswith(PYTHON_ROOT) and not any(map(file_name.__contains__, _LIBRARIES))


__all__ = ["OWN_ROOTS", "TORCH_ROOT", "is_machinery"]
