"""Rates and sizes of devices, from their vendors' data sheets.

Peaks are the dense ones; data sheets print twice as much, with sparsity, on the same
line. ``docs/costs.md`` has the table with its sources, and says which figures this
project has not measured.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .detect_gpu import (
    LARGE_WORKSPACE_BYTES,
    SMALL_WORKSPACE_BYTES,
    device_from_properties,
    entry_name,
)
from .device import Device
from .gpu_efficiency import ASSUMED, sourced

# "Around 400 MB" since CUDA 11.7 loads kernels when they are first called (a PyTorch maintainer in
# pytorch/pytorch#109888, 2023; 300 MB in #107667). It grows with the kernels that a step uses and
# differs between cards and drivers; no vendor documents it.
_CUDA_CONTEXT_BYTES = 400 * 10**6

# Least time between two kernels of one stream in eager mode; an assumption for all cards, of the
# order of a launch on Linux (some us). Not measured here.
_CUDA_LAUNCH_NS = 4_000

# aten/src/ATen/cuda/CublasHandlePool.cpp: 4096 KiB x 2 + 16 KiB x 8, 32 MiB on Hopper and, since
# the spring of 2026 (pytorch#175344), on Blackwell. cuBLASLt shares it from torch 2.11 on
# (pytorch#168175). After torch 2.13 it is allocated for each call instead (pytorch#194311).
_SMALL = SMALL_WORKSPACE_BYTES
_LARGE = LARGE_WORKSPACE_BYTES
# The same file, on ROCm: 128 MiB for hipBLAS on gfx942, and 76 MiB more for hipBLASLt.
_MI300_WORKSPACE_BYTES = (128 + 76) * 1024**2


def _rates(
    *, float64: float, float32: float, half: float, float8: float | None = None
) -> dict[torch.dtype, float]:
    """Rates by dtype; bfloat16 and float16 are equally fast on all cards here."""
    rates = {
        torch.float64: float64,
        torch.float32: float32,
        torch.float16: half,
        torch.bfloat16: half,
    }
    if float8 is not None:
        rates |= {torch.float8_e4m3fn: float8, torch.float8_e5m2: float8}
    return rates


# Fitted by benchmarks/calibrate.py on 2026-11-22: one core of an AMD EPYC (Zen 3, AVX2), torch
# 2.13.0, Python 3.11; other processes were busy, so thread times and the least of two profiles
# were taken. Efficiencies above one: data that stay in cache. docs/costs.md has the errors.
_CPU_EFFICIENCY = {
    "attention": 0.35,
    "convolution": 0.813,
    "copy": 0.457,
    "depthwise_convolution": 0.0356,
    "elementwise": 0.944,
    "indexing": 1.1,
    "matmul": 0.968,
    "normalization": 0.27,
    "other": 0.61,
    "random": 0.0112,
    "reduction": 0.313,
}

# Logarithm, sine and the like are too rare in the suite for a fit: 2^20 elements, the least of 25.
_CPU_ELEMENT_NS = {
    "aten::_log_softmax_backward_data": 1.09,
    "aten::_safe_softmax": 3,
    "aten::_softmax": 1.3,
    "aten::_softmax_backward_data": 0.565,
    "aten::_to_copy": 0.856,
    "aten::bernoulli": 7.11,
    "aten::bitwise_and": 1.16,
    "aten::cos": 2,
    "aten::embedding": 1.14,
    "aten::embedding_dense_backward": 0.747,
    "aten::erf": 1.4,
    "aten::exp": 1.2,
    "aten::gelu": 1.26,
    "aten::gelu_backward": 1.62,
    "aten::log": 1.2,
    "aten::masked_fill": 2.1,
    "aten::max_pool2d_with_indices": 26.6,
    "aten::max_pool2d_with_indices_backward": 0.859,
    "aten::native_batch_norm": 2.39,
    "aten::native_batch_norm_backward": 1.05,
    "aten::native_dropout": 9,
    "aten::native_layer_norm": 1.68,
    "aten::sigmoid": 1.1,
    "aten::silu": 1.32,
    "aten::silu_backward": 1.53,
    "aten::sin": 2,
    "aten::tanh": 3.23,
    "aten::where": 0.868,
}

# Within loops that Inductor writes: what torch.compile takes for f(x) of 2^20 elements, one thread,
# the least of 20, less x + 1 (0.08 ns); 2026-11-30, an idle AMD EPYC (AVX-512). Random numbers
# are drawn one by one, from seeds, at more than an eager draw takes.
_CPU_FUSED_ELEMENT_NS = {
    "aten::cos": 0.1,
    "aten::erf": 0.21,
    "aten::exp": 0.09,
    "aten::log": 0.23,
    "aten::log1p": 0.46,
    "aten::sigmoid": 0.13,
    "aten::sin": 0.08,
    "aten::tanh": 0.89,
    "prims::inductor_random": 6.6,
}

_CPU = Device(
    name="cpu",
    title="one core of an AMD EPYC",
    torch_type="cpu",
    # float32 and float64: large products; bfloat16, which has no hardware there: all of a step.
    flops_per_s={torch.float32: 75e9, torch.float64: 37e9, torch.bfloat16: 3.8e9},
    bytes_per_s=25e9,
    launch_ns=19_000,
    efficiency=_CPU_EFFICIENCY,
    element_ns=_CPU_ELEMENT_NS,
    fused_element_ns=_CPU_FUSED_ELEMENT_NS,
    source="measured: one core of an AMD EPYC with AVX2, torch 2.13, 2026-11-22",
)

_A100 = Device(
    name="a100",
    title="NVIDIA A100 80 GB SXM",
    torch_type="cuda",
    flops_per_s=_rates(float64=19.5e12, float32=19.5e12, half=312e12),
    tf32_flops_per_s=156e12,
    bytes_per_s=2.039e12,
    launch_ns=_CUDA_LAUNCH_NS,
    efficiency=sourced("a100"),
    memory_bytes=80 * 10**9,
    context_bytes=_CUDA_CONTEXT_BYTES,
    library_workspace_bytes=_SMALL,
    source="NVIDIA A100 Tensor Core GPU data sheet (nvidia-a100-datasheet-us-1758950-r4)",
)

_GPUS = (
    _A100,
    Device(
        name="a100_40",
        title="NVIDIA A100 40 GB",
        torch_type="cuda",
        flops_per_s=_A100.flops_per_s,
        tf32_flops_per_s=_A100.tf32_flops_per_s,
        bytes_per_s=1.555e12,
        launch_ns=_CUDA_LAUNCH_NS,
        efficiency=sourced("a100"),
        memory_bytes=40 * 10**9,
        context_bytes=_CUDA_CONTEXT_BYTES,
        library_workspace_bytes=_SMALL,
        source="NVIDIA A100 Tensor Core GPU Architecture white paper, 2020",
    ),
    Device(
        name="h100",
        title="NVIDIA H100 80 GB SXM",
        torch_type="cuda",
        flops_per_s=_rates(float64=66.9e12, float32=66.9e12, half=989.4e12, float8=1978.9e12),
        tf32_flops_per_s=494.7e12,
        bytes_per_s=3.35e12,
        launch_ns=_CUDA_LAUNCH_NS,
        efficiency=sourced("h100"),
        memory_bytes=80 * 10**9,
        context_bytes=_CUDA_CONTEXT_BYTES,
        library_workspace_bytes=_LARGE,
        source="NVIDIA H100 Tensor Core GPU Architecture white paper, table of peaks of the SXM5",
    ),
    Device(
        name="h200",
        title="NVIDIA H200 SXM",
        torch_type="cuda",
        flops_per_s=_rates(float64=66.9e12, float32=66.9e12, half=989.4e12, float8=1978.9e12),
        tf32_flops_per_s=494.7e12,
        bytes_per_s=4.8e12,
        launch_ns=_CUDA_LAUNCH_NS,
        efficiency=sourced("h100"),  # the same chip
        memory_bytes=141 * 10**9,
        context_bytes=_CUDA_CONTEXT_BYTES,
        library_workspace_bytes=_LARGE,
        source="NVIDIA H200 data sheet: rates of the H100, 4.8 TB/s, 141 GB",
    ),
    # float32 and float64: 75 and 37 TFLOP/s in the later data sheets, 80 and 40 in the first.
    Device(
        name="b200",
        title="NVIDIA B200",
        torch_type="cuda",
        flops_per_s=_rates(float64=37e12, float32=75e12, half=2250e12, float8=4500e12),
        tf32_flops_per_s=1125e12,
        bytes_per_s=8.0e12,
        launch_ns=_CUDA_LAUNCH_NS,
        efficiency=sourced("b200"),
        memory_bytes=180 * 10**9,
        context_bytes=_CUDA_CONTEXT_BYTES,
        library_workspace_bytes=_LARGE,
        source="an eighth of NVIDIA's DGX B200 and HGX B200 data sheets, sparse peaks halved",
    ),
    Device(
        name="l40s",
        title="NVIDIA L40S",
        torch_type="cuda",
        flops_per_s=_rates(float64=1.43e12, float32=91.6e12, half=362.05e12, float8=733e12),
        tf32_flops_per_s=183e12,
        bytes_per_s=864e9,
        launch_ns=_CUDA_LAUNCH_NS,
        efficiency=ASSUMED,
        memory_bytes=48 * 10**9,
        context_bytes=_CUDA_CONTEXT_BYTES,
        library_workspace_bytes=_SMALL,
        source="NVIDIA L40S data sheet; float64 is a 64th of float32 (Ada white paper)",
    ),
    # PyTorch sums half-precision products in float32, at which GeForce cards run at half rate:
    # not the 330.3 (float16) and 660.6 TFLOP/s (float8) of sums in float16.
    Device(
        name="rtx4090",
        title="NVIDIA GeForce RTX 4090",
        torch_type="cuda",
        flops_per_s=_rates(float64=1.29e12, float32=82.6e12, half=165.2e12, float8=330.3e12),
        tf32_flops_per_s=82.6e12,
        bytes_per_s=1.008e12,
        launch_ns=_CUDA_LAUNCH_NS,
        efficiency=ASSUMED,
        memory_bytes=24 * 10**9,
        context_bytes=_CUDA_CONTEXT_BYTES,
        library_workspace_bytes=_SMALL,
        source="NVIDIA Ada GPU Architecture white paper, appendix A, with float32 accumulation",
    ),
    # TF32 (653.7 TFLOP/s) is left out: ROCm uses it only on request. float8 is the FNUZ kind.
    Device(
        name="mi300x",
        title="AMD Instinct MI300X",
        torch_type="cuda",
        flops_per_s={
            **_rates(float64=163.4e12, float32=163.4e12, half=1307.4e12),
            torch.float8_e4m3fnuz: 2614.9e12,
            torch.float8_e5m2fnuz: 2614.9e12,
        },
        bytes_per_s=5.3e12,
        launch_ns=_CUDA_LAUNCH_NS,
        efficiency=sourced("mi300x"),
        memory_bytes=192 * 10**9,
        library_workspace_bytes=_MI300_WORKSPACE_BYTES,
        source="AMD Instinct MI300X data sheet (amd-instinct-mi300x-data-sheet), matrix peaks",
    ),
)

DEVICES: Mapping[str, Device] = {
    **{device.name: device for device in (_CPU, *_GPUS)},
    "a100_80": _A100,
}
"""All entries by name; ``a100_80`` is another name of ``a100``."""


def device_for(device_type: str) -> Device:
    """Return the entry for a torch device type; ``cuda`` is looked up by the GPU's name.

    A card that is not in the table is described by its clocks and sizes.

    Raises
    ------
    ValueError
        When there is no card, or its rates cannot be derived.
    """
    if device_type != "cuda":
        return DEVICES["cpu"]
    if not torch.cuda.is_available():
        raise ValueError(
            "no CUDA device is present: name the one that the step will run on, such as "
            f"device='h100' (known are {', '.join(d.name for d in _GPUS)})"
        )
    card = torch.cuda.get_device_name()
    name = entry_name(card)
    if name is not None:
        return DEVICES[name]
    return device_from_properties(card, torch.cuda.get_device_properties())


__all__ = ["DEVICES", "Device", "device_for"]
