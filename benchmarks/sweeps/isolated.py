"""Run each case of a sweep in a forked process with limits, so that no case ends the sweep.

The parent imports what all cases need and stays single-threaded; a child starts with all
of it. This takes milliseconds, while a new interpreter takes seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one case.

    Parameters
    ----------
    time_s
        Wall-clock time.
    memory_bytes
        Address space.
    """

    time_s: float = 90.0
    memory_bytes: int = 16 * GIB


def run_isolated(call: Callable[[], dict[str, Any]], limits: Limits) -> dict[str, Any]:
    """The result of ``call`` in a child; an ``outcome`` of ``"died"`` if it does not return."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        child = context.Process(target=_child, args=(call, path, limits))
        child.start()
        child.join(limits.time_s)
        if child.is_alive():
            child.kill()
            child.join()
            return {"outcome": "died", "error": f"took more than {limits.time_s:.0f} s"}
        if path.exists():
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return record
        code = child.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return {"outcome": "died", "error": f"the process ended with {how}"}


def _child(call: Callable[[], dict[str, Any]], path: Path, limits: Limits) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    record = call()
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record), encoding="utf-8")
    part.rename(path)
    # Threads of libraries must not keep a finished case from ending.
    sys.stdout.flush()
    os._exit(0)


def run_all(
    cases: Iterable[tuple[str, Callable[[], dict[str, Any]]]],
    out: Path,
    limits: Limits,
    *,
    limit_s: float,
) -> Iterator[dict[str, Any]]:
    """Run the cases that ``out`` has no line of yet, and append a line for each.

    Parameters
    ----------
    cases
        Names, and functions to call.
    out
        File of JSON lines; may exist.
    limits
        Limits of each case.
    limit_s
        No case starts after this time.
    """
    begin_s = time.monotonic()
    done = {record["name"] for record in read_records(out)}
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, call in cases:
        if name in done:
            continue
        if time.monotonic() - begin_s > limit_s:
            return
        record = {"name": name, **run_isolated(call, limits)}
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        yield record


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a sweep's file; a truncated last line is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.endswith("}"):
            records.append(json.loads(line))
    return records
