"""Where a sweep ran and with what, for its table."""

from __future__ import annotations

import importlib.metadata
import platform

_LIBRARIES = (
    "torch",
    "transformers",
    "diffusers",
    "torch_geometric",
    "monai",
    "x-transformers",
    "peft",
    "timm",
)


def environment() -> str:
    """Versions and platform on one line.

    Examples
    --------
    >>> environment().startswith("torch ")
    True
    """
    found = []
    for library in _LIBRARIES:
        try:
            found.append(f"{library} {importlib.metadata.version(library)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{library} not installed")
    return f"{', '.join(found)}; Python {platform.python_version()}, {platform.machine()}, CPU."
