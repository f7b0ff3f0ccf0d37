"""A name of this package's code and of what it runs on, for caches of compiled code."""

from __future__ import annotations

import hashlib
import platform
import secrets
from functools import cache
from pathlib import Path

import torch

import graph_capture
import solvers


@cache
def code_name() -> str:
    """A digest of all source files, the version of PyTorch, and the kind of processor.

    Other rules of fusion, another solver or another cost model make other plans of the same graph,
    so none of an older version is used; PyTorch names its own code in the same way. Where there
    are no sources, each process has a name of its own.
    """
    digest, num_files = hashlib.sha256(), 0
    packages = [Path(folder) for folder in (*graph_capture.__path__, *solvers.__path__)]
    for folder in (*packages, Path(__file__).parents[1]):
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)} ".encode())
            digest.update(path.read_bytes())
            num_files += 1
    if not num_files:
        digest.update(secrets.token_bytes())
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{digest.hexdigest()[:32]}, torch {torch.__version__}, {machine}"


__all__ = ["code_name"]
