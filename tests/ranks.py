"""Processes of one job, as a launcher would start them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def spawn_ranks(work: Callable[..., object], args: tuple[Any, ...], *, nprocs: int) -> None:
    """Run `work(rank, *args)` in `nprocs` new processes; an error in one is raised here."""
    mp.spawn(_rank, (work, args), nprocs=nprocs)


def _rank(rank: int, work: Callable[..., object], args: tuple[Any, ...]) -> None:
    """Work, and leave without the interpreter's end.

    A thread of gloo may hold a tensor for a moment after `destroy_process_group`. When it
    frees one that Python knows while the interpreter ends, the process is aborted (seen once;
    pytorch#179291).
    """
    work(rank, *args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
