"""Plan for an absent device, and save the plan.

Runs in a separate process that sees no CUDA device, so that it captures what a laptop
would capture::

    python -m benchmarks.device_check.plan_without_device gpt2 tiny h100 0 plan.json
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from graph_capture.costs.devices import Device
from planner import optimize

from .bench import UNLIMITED_BYTES
from .subjects import (
    SUBJECTS,
    Subject,
)

ROOT = Path(__file__).resolve().parents[2]


def plan_without_device(subject: Subject, entry: str | Device, seed: int, path: Path) -> None:
    """Plan on ``meta`` for a device that need not be present, with room for everything.

    Parameters
    ----------
    entry
        As for ``optimize(device=…)``.
    path
        Path of the plan's JSON.
    """
    with torch.device("meta"):
        model = subject.build()
    sample = {name: tensor.to("meta") for name, tensor in subject.sample(seed).items()}
    plan = optimize(
        model,
        sample,
        budget_bytes=UNLIMITED_BYTES,
        optimizer=subject.optimizer,
        device=entry,
        autocast=subject.autocast,
        headroom=0,
    )
    plan.save(path)


def plan_in_child(subject: Subject, entry: str, seed: int, path: Path) -> None:
    """:func:`plan_without_device` in a process that sees no CUDA device.

    Raises
    ------
    RuntimeError
        When it ends without a plan; has the last lines of its output.
    """
    words = [subject.name, subject.size, entry, str(seed), str(path)]
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.device_check.plan_without_device", *words],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if child.returncode:
        last = " / ".join(child.stderr.strip().splitlines()[-5:])
        raise RuntimeError(f"planning {subject.label} for {entry!r} without a card: {last}")


def _main() -> None:
    name, size, entry, seed, path = sys.argv[1:]
    plan_without_device(SUBJECTS[name](size), entry, int(seed), Path(path))  # type: ignore[arg-type]


if __name__ == "__main__":
    _main()
