"""What a roofline and a budget need to know about a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .operator_classes import OPERATOR_CLASSES


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Rates and sizes of one device.

    Make your own device with this class, or from an entry with
    ``dataclasses.replace``. A device that keeps the name of the device at hand stands
    for it.

    Parameters
    ----------
    name
        Key in :data:`~graph_capture.costs.devices.DEVICES`.
    title
        The device in words.
    torch_type
        Device type of its tensors in torch, ``"cpu"`` or ``"cuda"`` (also in builds for
        ROCm).
    flops_per_s
        Peak dense rate of matrix products by dtype. ``torch.float32`` is without
        TF32 and is the fallback for any dtype that is not listed.
    bytes_per_s
        Memory bandwidth.
    launch_ns
        Least time of one call.
    tf32_flops_per_s
        Rate of float32 products if PyTorch may use TF32: by default for convolutions,
        for matrix products only if set so. ``None`` without such units.
    efficiency
        The share of the roofline that kernels reach, by operator class
        (:mod:`~graph_capture.costs.operator_classes`): of the rate of arithmetic if
        that bounds a call, otherwise of the bandwidth. May exceed one if data stay in
        cache. A missing class counts as one.
    element_ns
        Time per element of the largest output, by schema name, instead of the
        efficiency. It is for operators that neither products nor traffic bound, such as
        random draws and transcendental functions on a CPU.
    fused_element_ns
        Likewise of functions within loops that Inductor writes, beyond reading and writing.
    memory_bytes
        Size by the data sheet, with 1 GB taken as 10^9 bytes; ``None`` if the memory is
        not the device's own (CPU).
    context_bytes
        Typical memory of a card that driver and runtime take for one process; ``None``
        if no figure is known.
    library_workspace_bytes
        What PyTorch allocates for cuBLAS (hipBLAS) from its caching allocator and
        keeps, once for each thread and stream that multiplies. A training step has two
        such threads: the one that runs forward, and autograd's.
    source
        Where the figures come from.

    Raises
    ------
    ValueError
        When a figure is out of range or a class is unknown.
    """

    name: str
    title: str
    torch_type: str
    flops_per_s: Mapping[torch.dtype, float] = field(hash=False)
    bytes_per_s: float
    launch_ns: int
    tf32_flops_per_s: float | None = None
    efficiency: Mapping[str, float] = field(default_factory=dict, hash=False)
    element_ns: Mapping[str, float] = field(default_factory=dict, hash=False)
    fused_element_ns: Mapping[str, float] = field(default_factory=dict, hash=False)
    memory_bytes: int | None = None
    context_bytes: int | None = None
    library_workspace_bytes: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        if self.torch_type not in ("cpu", "cuda"):
            raise ValueError(
                f"device {self.name!r}: torch_type is 'cpu' or 'cuda', got {self.torch_type!r}"
            )
        if torch.float32 not in self.flops_per_s:
            raise ValueError(f"device {self.name!r}: flops_per_s lacks torch.float32")
        unknown = sorted(set(self.efficiency) - set(OPERATOR_CLASSES))
        if unknown:
            raise ValueError(
                f"device {self.name!r}: no operator class {', '.join(unknown)}; "
                f"known are {', '.join(OPERATOR_CLASSES)}"
            )
        rates = (self.bytes_per_s, *self.flops_per_s.values(), *self.efficiency.values())
        if any(not rate > 0 for rate in rates):
            raise ValueError(f"device {self.name!r}: rates and efficiencies are positive")

    def flops_rate(self, dtype: torch.dtype, *, tf32: bool = False) -> float:
        """Return the peak rate of products in ``dtype``, in FLOP/s."""
        if tf32 and dtype == torch.float32 and self.tf32_flops_per_s is not None:
            return self.tf32_flops_per_s
        return self.flops_per_s.get(dtype, self.flops_per_s[torch.float32])
