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
    title
        In words.
    torch_type
        Device type of its tensors in torch, ``"cpu"`` or ``"cuda"``.
    flops_per_s
        Peak dense rate of matrix products by dtype; ``torch.float32`` is the
        fallback for any dtype that is not listed.
    bytes_per_s
        Memory bandwidth.
    launch_ns
        Least time of one call.
    element_ns
        Time per element of the largest output, by name, of calls that neither
        products nor traffic bound: random draws, transcendental functions.
    """

    name: str
    title: str
    torch_type: str
    flops_per_s: Mapping[torch.dtype, float] = field(hash=False)
    bytes_per_s: float
    launch_ns: int
    element_ns: Mapping[str, float] = field(default_factory=dict, hash=False)

    def flops_rate(self, dtype: torch.dtype) -> float:
        return self.flops_per_s.get(dtype, self.flops_per_s[torch.float32])


_CPU_ELEMENT_NS = {
    "aten::bernoulli_": 8.5,
    "aten::native_dropout": 9.0,
    "aten::tanh": 3.6,
    "aten::gelu": 1.4,
    "aten::gelu_backward": 1.4,
    "aten::silu": 1.1,
    "aten::silu_backward": 1.3,
    "aten::sigmoid": 1.1,
    "aten::exp": 1.2,
    "aten::log": 1.2,
    "aten::erf": 1.4,
    "aten::sin": 2.0,
    "aten::cos": 2.0,
    "aten::_softmax": 1.3,
    "aten::_safe_softmax": 3.6,
    "aten::_log_softmax": 1.4,
    "aten::native_batch_norm": 2.4,
    "aten::native_batch_norm_backward": 2.4,
    "aten::native_layer_norm": 0.55,
    "aten::native_layer_norm_backward": 0.75,
    "aten::masked_fill": 2.1,
    "aten::_to_copy": 0.7,
    "aten::where": 0.75,
    "aten::max_pool2d_with_indices": 30.0,
}

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # One core of an AMD EPYC with AVX2, measured with torch 2.13 on float32 tensors of 2^20
        # elements (25 runs, the fastest); bfloat16 products have no hardware there.
        Device(
            name="cpu",
            title="one core of an AMD EPYC",
            torch_type="cpu",
            flops_per_s={torch.float32: 75e9, torch.float64: 37e9, torch.bfloat16: 2e9},
            bytes_per_s=25e9,
            launch_ns=3_000,
            element_ns=_CPU_ELEMENT_NS,
        ),
        # NVIDIA A100 data sheet, SXM 80 GB; float32 without TF32, PyTorch's default.
        Device(
            name="a100",
            title="NVIDIA A100 80 GB SXM",
            torch_type="cuda",
            flops_per_s={torch.float32: 19.5e12, torch.float16: 312e12, torch.bfloat16: 312e12},
            bytes_per_s=2.04e12,
            launch_ns=4_000,
        ),
        # NVIDIA H100 data sheet, SXM.
        Device(
            name="h100",
            title="NVIDIA H100 SXM",
            torch_type="cuda",
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
