"""Peak rates of devices, from their vendors' data sheets.

A roofline needs the rate of arithmetic by dtype, the memory bandwidth and the
time that one launch takes at least. Only ratios matter to a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Rates of one device.

    Parameters
    ----------
    name
        Key in :data:`DEVICES`.
    flops_per_s
        Peak dense rate of matrix products by dtype; ``torch.float32`` is the
        fallback for any dtype that is not listed.
    bytes_per_s
        Memory bandwidth.
    launch_ns
        Least time of one call.
    """

    name: str
    flops_per_s: Mapping[torch.dtype, float] = field(hash=False)
    bytes_per_s: float
    launch_ns: int

    def flops_rate(self, dtype: torch.dtype) -> float:
        return self.flops_per_s.get(dtype, self.flops_per_s[torch.float32])


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # One core of a current server CPU with AVX-512, of the order that oneDNN reaches.
        Device(
            name="cpu",
            flops_per_s={torch.float32: 60e9, torch.float64: 30e9, torch.bfloat16: 60e9},
            bytes_per_s=8e9,
            launch_ns=4_000,
        ),
        # NVIDIA A100 data sheet, SXM 80 GB; float32 without TF32, PyTorch's default.
        Device(
            name="a100",
            flops_per_s={torch.float32: 19.5e12, torch.float16: 312e12, torch.bfloat16: 312e12},
            bytes_per_s=2.04e12,
            launch_ns=4_000,
        ),
        # NVIDIA H100 data sheet, SXM.
        Device(
            name="h100",
            flops_per_s={torch.float32: 67e12, torch.float16: 989e12, torch.bfloat16: 989e12},
            bytes_per_s=3.35e12,
            launch_ns=4_000,
        ),
    )
}


def device_for(device_type: str) -> Device:
    """The entry for a torch device type; ``cuda`` is looked up by the card's name."""
    if device_type != "cuda":
        return DEVICES["cpu"]
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name().lower()
        for key in DEVICES:
            if key in name:
                return DEVICES[key]
    return DEVICES["a100"]
