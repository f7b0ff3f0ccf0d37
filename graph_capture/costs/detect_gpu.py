"""Identify the GPU by its name, or else by what the driver reports."""

from __future__ import annotations

import re
from typing import Any

import torch

from .device import Device
from .gpu_efficiency import ASSUMED

# Names as torch.cuda.get_device_name() gives them, whole: "H200" alone would also fit a GH200,
# "B200" a GB200, "H100" the PCIe card, which is a third slower.
_NAMES = {
    r"(NVIDIA )?A100-(SXM\d|PCIE)-40GB": "a100_40",
    r"(NVIDIA )?A100-SXM\d-80GB": "a100",
    r"NVIDIA H100 80GB HBM3": "h100",
    r"NVIDIA H200": "h200",
    r"NVIDIA B200": "b200",
    r"NVIDIA L40S": "l40s",
    r"(NVIDIA )?GeForce RTX 4090": "rtx4090",
    r"AMD Instinct MI300X( OAM| VF)?": "mi300x",
}

# FLOP per clock and multiprocessor, dense, a multiply-add counted as two, by compute capability:
# (float32, float64, float16 and bfloat16 with float32 sums, TF32, float8). CUDA C++ Programming
# Guide, "Arithmetic Instructions"; the tensor cores' rates from the architectures' white papers
# (they reproduce the data sheets' peaks at the boost clock). Volta and Turing have no bfloat16.
_PER_CLOCK: dict[tuple[int, int], tuple[int, int, int, int, int]] = {
    (7, 0): (128, 64, 1024, 0, 0),
    (7, 5): (128, 4, 1024, 0, 0),
    (8, 0): (128, 128, 2048, 1024, 0),
    (8, 6): (256, 4, 1024, 512, 0),
    (8, 9): (256, 4, 1024, 512, 2048),
    (9, 0): (256, 256, 4096, 2048, 8192),
    (10, 0): (256, 128, 8192, 4096, 16384),
    (12, 0): (256, 4, 1024, 512, 2048),
}
# GeForce cards sum in float32 at half the rate of their professional counterparts.
_HALVED = {(7, 5), (8, 6), (8, 9), (12, 0)}

_FIELDS = (
    "major",
    "minor",
    "multi_processor_count",
    "total_memory",
    "clock_rate",
    "memory_clock_rate",
    "memory_bus_width",
)

SMALL_WORKSPACE_BYTES = 4096 * 2 * 1024 + 16 * 8 * 1024
LARGE_WORKSPACE_BYTES = 32 * 1024**2


def entry_name(card: str) -> str | None:
    """Return a GPU's key in the device table, or ``None``.

    Parameters
    ----------
    card
        What ``torch.cuda.get_device_name()`` says.
    """
    for pattern, name in _NAMES.items():
        if re.fullmatch(pattern, card.strip(), flags=re.IGNORECASE):
            return name
    return None


def device_from_properties(card: str, properties: Any) -> Device:
    """Build a device for a GPU that is not in the table, from its clocks and its size.

    Parameters
    ----------
    card
        What ``torch.cuda.get_device_name()`` says.
    properties
        What ``torch.cuda.get_device_properties()`` says.

    Raises
    ------
    ValueError
        When the rates cannot be derived: a slice of a card (MIG), an AMD card, an
        architecture that is not listed here, or a torch that does not report the clocks.
    """
    remedy = (
        "name a similar card (device='h100'), or give a graph_capture.costs.devices.Device with "
        "its rates (device=Device(...), docs/costs.md)"
    )
    if torch.version.hip is not None:
        raise ValueError(f"no rates are known for {card!r}: {remedy}")
    if " MIG " in card:
        raise ValueError(f"{card!r} is a slice of a card and does not report its rates: {remedy}")
    missing = [name for name in _FIELDS if not hasattr(properties, name)]
    if missing:
        raise ValueError(
            f"no rates are known for {card!r}, and torch {torch.__version__} does not report its "
            f"{', '.join(missing)}: {remedy}"
        )
    capability = (properties.major, properties.minor)
    if capability not in _PER_CLOCK:
        raise ValueError(
            f"no rates are known for {card!r} with compute capability "
            f"{properties.major}.{properties.minor}: {remedy}"
        )
    clocks_per_s = properties.multi_processor_count * properties.clock_rate * 1e3  # from kHz
    float32, float64, half, tf32, float8 = (n * clocks_per_s for n in _PER_CLOCK[capability])
    if "geforce" in card.lower() and capability in _HALVED:
        half, tf32, float8 = half / 2, tf32 / 2, float8 / 2
    rates = {torch.float32: float32, torch.float64: float64, torch.float16: half}
    if capability >= (8, 0):
        rates[torch.bfloat16] = half
    if float8:
        rates |= {torch.float8_e4m3fn: float8, torch.float8_e5m2: float8}
    # Two transfers a clock; CUDA C++ Best Practices Guide, "Theoretical Bandwidth Calculation".
    bytes_per_s = 2 * properties.memory_clock_rate * 1e3 * properties.memory_bus_width / 8
    large = properties.major >= 9
    return Device(
        name=re.sub(r"\W+", "_", card.lower()),
        title=card,
        torch_type="cuda",
        flops_per_s=rates,
        bytes_per_s=bytes_per_s,
        launch_ns=4_000,
        tf32_flops_per_s=tf32 or None,
        efficiency=ASSUMED,
        memory_bytes=properties.total_memory,
        library_workspace_bytes=LARGE_WORKSPACE_BYTES if large else SMALL_WORKSPACE_BYTES,
        source="derived from torch.cuda.get_device_properties()",
    )
