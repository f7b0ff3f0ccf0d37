"""What a figure needs to be repeated: card, driver, versions, seeds, command."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from typing import Any

import torch

from planner.comparing.machine import machine as of_the_machine
from planner.comparing.machine import version_of

PACKAGES = ("torch", "triton", "transformers", "remat-planner", "highspy", "ortools", "numba")

OWED = (
    "The GPU's figures are still owed: no CUDA device took part in this run. What stands here "
    "was measured on a CPU, on small versions of the models, and says nothing about a card."
)


def environment(device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """The whole environment, ready for JSON.

    Parameters
    ----------
    settings
        The options of the check, including seeds.
    """
    machine = of_the_machine()
    return {
        **machine,
        "command": shlex.join(["python", "-m", "benchmarks.device_check", *sys.argv[1:]]),
        "device": _card(device) if device.type == "cuda" else machine["cpu"],
        "owed": OWED if device.type != "cuda" else "",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "driver": _driver() if device.type == "cuda" else None,
        "num_threads": torch.get_num_threads(),
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "versions": {name: version_of(name) for name in PACKAGES},
        "settings": settings,
    }


def lines(record: dict[str, Any]) -> list[str]:
    """The same in words, for people."""
    versions = ", ".join(f"{name} {v}" for name, v in record["versions"].items() if v)
    text = [f"{record['date']}, {record['device']}", f"Python {record['python']}, {versions}"]
    if record["cuda"]:
        text.append(
            f"CUDA {record['cuda']}, cuDNN {record['cudnn']}, driver {record['driver']}, TF32 in "
            f"products {record['tf32_products']}, in convolutions {record['tf32_convolutions']}"
        )
    text.append(
        f"{record['num_cpus']} CPUs, {record['num_threads']} threads, load "
        f"{record['load_average']:.1f} when it began"
        if record["load_average"] is not None
        else f"{record['num_cpus']} CPUs, {record['num_threads']} threads"
    )
    settings = ", ".join(f"{name} {value}" for name, value in record["settings"].items())
    return [*text, f"Settings: {settings}", f"Command: {record['command']}"]


def _card(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, {properties.total_memory / 1e9:.1f} GB, "
        f"compute capability {properties.major}.{properties.minor}"
    )


def _driver() -> str | None:
    """The driver's release, from its own tool; ``None`` if that is not installed."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
    return answer.stdout.strip().splitlines()[0] if answer.stdout.strip() else None
