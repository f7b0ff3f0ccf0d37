"""What a measured time depends on besides the call: machine, libraries, and their settings."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import torch

from ..private_torch.devices import cuda_driver_version

_METHOD = 1  # of graph_capture.costs.timing; another method gives other times

_READ_BY_LIBRARIES = ("CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "NVIDIA_TF32_OVERRIDE")

_CPUINFO = Path("/proc/cpuinfo")


def device_name(device: torch.device) -> str:
    """Return the name of the CPU or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine() or "unknown processor"


def environment_of(device: torch.device) -> str:
    """Return the environment as JSON text; each distinct text has its own measured times."""
    parts: dict[str, object] = {
        "method": _METHOD,
        "torch": torch.__version__,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        # Fills the results of ``empty`` if deterministic algorithms are on.
        "filled": getattr(torch.utils.deterministic, "fill_uninitialized_memory", None),
    }
    if device.type == "cuda":
        # Both are private or depend on the build; without them, times of two drivers are not told
        # apart.
        driver = cuda_driver_version()
        parts["driver"] = driver() if driver is not None else None
        parts["cuda"] = torch.version.cuda
        parts["cudnn"] = torch.backends.cudnn.version()
        parts["benchmark"] = torch.backends.cudnn.benchmark
        parts["cudnn_use"] = [torch.backends.cudnn.enabled, torch.backends.cudnn.deterministic]
        parts["reduced"] = [
            getattr(torch.backends.cuda.matmul, name, None)
            for name in (
                "allow_bf16_reduced_precision_reduction",
                "allow_fp16_reduced_precision_reduction",
                "allow_fp16_accumulation",
            )
        ]
        parts["libraries"] = [
            str(torch.backends.cuda.preferred_blas_library()),
            str(torch.backends.cuda.preferred_linalg_library()),
        ]
        # Read by cuBLAS itself: which kernels it may choose depends on its workspace.
        parts["variables"] = [os.environ.get(name) for name in _READ_BY_LIBRARIES]
        parts["precision"] = [
            getattr(torch.backends.cuda.matmul, "fp32_precision", None),
            getattr(getattr(torch.backends.cudnn, "conv", None), "fp32_precision", None),
        ]
    else:
        parts["capability"] = torch.backends.cpu.get_cpu_capability()
        parts["mkldnn"] = [
            torch.backends.mkldnn.enabled,
            getattr(torch.backends.mkldnn, "deterministic", None),
        ]
        parts["precision"] = [
            getattr(getattr(torch.backends.mkldnn, part, None), "fp32_precision", None)
            for part in ("matmul", "conv", "rnn")
        ]
    return json.dumps(parts, sort_keys=True)
