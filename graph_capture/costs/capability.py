"""Compute capabilities of NVIDIA's GPUs, by which PyTorch chooses kernels."""

from __future__ import annotations

from .device import Device

# Compute capability by name of the entry; other CUDA cards are assumed to have 8.0.
_CAPABILITIES = {
    "v100": (7, 0),
    "t4": (7, 5),
    "a100": (8, 0),
    "a100_40": (8, 0),
    "a10": (8, 6),
    "rtx3090": (8, 6),
    "l4": (8, 9),
    "l40s": (8, 9),
    "rtx4090": (8, 9),
    "h100": (9, 0),
    "h200": (9, 0),
    "b200": (10, 0),
    "rtx5090": (12, 0),
}


def known_capability(device: Device) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA GPU, or ``None``."""
    return _CAPABILITIES.get(device.name)


def capability_of(device: Device) -> tuple[int, int]:
    """Return the compute capability of a GPU; 8.0 where it is unknown."""
    return known_capability(device) or (8, 0)
