"""Estimate the time of a call by the roofline model.

The time is the larger of two: arithmetic at the device's peak rate, and memory traffic
at its bandwidth (Williams et al., "Roofline: an insightful visual performance model",
CACM 2009). It is divided by the share of the peak that kernels of the call's class
reach, and is at least one launch. A device may give single operators a time per element
instead.

The model does not see caches, shapes that fit a kernel badly, several streams, or what
the processor does between two launches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..private_torch.operators import schema_of
from ..private_torch.trees import tree_iter
from .cost_model import Call, CostRecord
from .device import Device
from .flops import count_flops, product_dtype
from .operator_classes import CONVOLUTION, DEPTHWISE, INDEXING, MATMUL, operator_class

LONGEST_TRIAL_NS = 2_000_000_000
"""Calls that take longer by the roofline are not run to measure scratch or result layouts."""


class Roofline:
    """Times from a device's data sheet, without running anything.

    Parameters
    ----------
    device
        An entry of :data:`~.devices.DEVICES`, or one of the user's own.
    """

    def __init__(self, device: Device) -> None:
        self.device = device

    def time_ns(self, call: Call) -> int:
        """Nanoseconds of one run."""
        return call_cost_ns(call.func, call.args, call.kwargs, call.out, self.device)

    def record(self) -> CostRecord:
        return CostRecord(model="roofline", device=self.device.title)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work of a call, independent of the device.

    Parameters
    ----------
    name
        Schema name of the operator.
    operator_class
        One of :data:`~.operator_classes.OPERATOR_CLASSES`.
    flops
        Operations of products, in ``dtype``; otherwise 0.
    dtype
        The dtype in which products multiply.
    num_bytes
        Bytes read and written, each tensor once.
    num_elements
        Elements of the largest output.
    """

    name: str
    operator_class: str
    flops: int
    dtype: torch.dtype
    num_bytes: int
    num_elements: int


def call_cost_ns(func: Any, args: tuple, kwargs: dict, out: Any, device: Device) -> int:
    """Return the nanoseconds of one call, from the shapes of its arguments and outputs.

    Parameters
    ----------
    func
        The ``OpOverload`` that is called.
    args, kwargs, out
        Its arguments and outputs; tensors of any kind, only metadata is read.
    """
    return time_of_work_ns(work_of(func, args, kwargs, out), device)


def work_of(func: Any, args: tuple, kwargs: dict, out: Any) -> Work:
    """Return the arithmetic and traffic of a call."""
    outputs = list(_tensors(out))
    class_name = operator_class(func, args, kwargs)
    return Work(
        name=schema_of(func).name,
        operator_class=class_name,
        flops=count_flops(func, args, kwargs, out),
        dtype=product_dtype(args, kwargs, out),
        num_bytes=0 if _moves_nothing(func) else _traffic(func, args, kwargs, outputs, class_name),
        num_elements=max((t.numel() for t in outputs), default=0),
    )


def _moves_nothing(func: Any) -> bool:
    """Whether a call only allocates memory or makes a view."""
    aliases = [r.alias_info for r in schema_of(func).returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return is_view or func.namespace == "prim" or "empty" in schema_of(func).name


def _traffic(
    func: Any, args: tuple, kwargs: dict, outputs: list[torch.Tensor], class_name: str
) -> int:
    """Bytes read and written, each tensor once."""
    written = {a.name for a in schema_of(func).arguments if a.is_out}  # counted as the output
    read = [
        _touched_bytes(t)
        for t in _tensors((args, {k: v for k, v in kwargs.items() if k not in written}))
    ]
    made = [_touched_bytes(t) for t in outputs]
    if class_name == INDEXING:  # only the requested rows of a table are read
        read = [min(num_bytes, max(made, default=0)) for num_bytes in read]
    return sum(read) + sum(made)


def time_of_work_ns(work: Work, device: Device) -> int:
    """Return the nanoseconds that a device takes for some work."""
    per_element = device.element_ns.get(
        work.name, device.element_ns.get(work.name.removesuffix("_"))
    )
    if per_element is not None:
        return max(device.launch_ns, round(work.num_elements * per_element))
    reached = device.efficiency.get(work.operator_class, 1.0)
    return max(device.launch_ns, round(roofline_ns(work, device) / reached))


def roofline_ns(work: Work, device: Device) -> float:
    """Return the nanoseconds at the device's peaks: the slower of arithmetic and traffic."""
    rate = device.flops_rate(work.dtype, tf32=_allows_tf32(work.operator_class))
    return max(work.flops / rate, work.num_bytes / device.bytes_per_s) * 1e9


def _allows_tf32(operator_class: str) -> bool:
    """Whether PyTorch may use TF32 there: not for matrix products, unless the user set it so."""
    if operator_class in (CONVOLUTION, DEPTHWISE):
        return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]
    if operator_class == MATMUL:
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
    return False


def _touched_bytes(tensor: torch.Tensor) -> int:
    """Bytes of distinct elements: an expanded dimension is read from cache."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride != 0:
            count *= size
    return count * tensor.element_size()


def _tensors(tree: Any) -> Iterable[torch.Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))
