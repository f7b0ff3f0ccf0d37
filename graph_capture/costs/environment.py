"""What a measured time depends on besides the call: machine, libraries, and their settings."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import torch

_METHOD = 1  # of graph_capture.costs.timing; another method gives other times

_READ_BY_LIBRARIES = ("CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "NVIDIA_TF32_OVERRIDE")

_CPUINFO = Path("/proc/cpuinfo")

# Where Linux drivers of NVIDIA and AMD say which they are. PyTorch has no public name for it, and
# asking nvidia-smi takes a second.
_DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))


def device_name(device: torch.device) -> str:
    """Return the name of the CPU or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = _lines(_CPUINFO)
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
        # Empty where the system says nothing, as Windows: times of two drivers are not told apart.
        parts["driver"] = [line for path in _DRIVERS for line in _lines(path)[:1]]
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


def _lines(path: Path) -> list[str]:
    """Lines of a file that the system may not have."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
