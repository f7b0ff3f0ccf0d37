"""Processes of one job, as a launcher would start them."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.multiprocessing as mp

IMPORTED = ("torch.distributed.fsdp", "transformers", "planner", "pytest")
"""Most of the time that a new process takes before it works."""


def spawn_ranks(work: Callable[..., object], args: tuple[Any, ...], *, nprocs: int) -> None:
    """Run `work(rank, *args)` in `nprocs` new processes; an error in one is raised here."""
    mp.start_processes(_rank, (work, args), nprocs=nprocs, start_method=_start_method())


@cache
def _start_method() -> str:
    """How processes start: from one that has imported what all need, and done nothing else.

    Where there is CUDA, which some of that looks for, nothing is forked.
    """
    if torch.cuda.is_available() or "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(IMPORTED))
    return "forkserver"


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
