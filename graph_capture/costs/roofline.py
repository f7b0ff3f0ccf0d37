"""Time of a call by the roofline model.

The larger of arithmetic at the device's peak rate and memory traffic at its
bandwidth (Williams et al., "Roofline: an insightful visual performance model",
CACM 2009), and at least one launch. A device may name calls that are slower
than both, by element.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .cost_model import Call, CostRecord
from .devices import Device


class Roofline:
    """Times from a device's data sheet; nothing runs.

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


def call_cost_ns(func: Any, args: tuple, kwargs: dict, out: Any, device: Device) -> int:
    """Nanoseconds of one call, from the shapes of its arguments and outputs.

    Parameters
    ----------
    func
        The ``OpOverload`` that is called.
    args, kwargs, out
        Its arguments and outputs; tensors of any kind, only metadata is read.
    """
    written = {a.name for a in func._schema.arguments if a.is_out}  # counted as the output
    tensors = list(_tensors((args, {k: v for k, v in kwargs.items() if k not in written})))
    outputs = list(_tensors(out))
    num_bytes = sum(_touched_bytes(t) for t in (*tensors, *outputs))
    flops = count_flops(func, args, kwargs, out)
    dtype = outputs[0].dtype if outputs else torch.float32
    compute_s = flops / device.flops_rate(dtype)
    traffic_s = num_bytes / device.bytes_per_s
    num_elements = max((t.numel() for t in outputs), default=0)
    name = func._schema.name
    per_element = device.element_ns.get(name, device.element_ns.get(name.removesuffix("_"), 0.0))
    elements_ns = num_elements * per_element
    return max(device.launch_ns, round(compute_s * 1e9), round(traffic_s * 1e9), round(elements_ns))


def count_flops(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """Floating-point operations of matrix products, convolutions and attention; else 0."""
    name = func._schema.name
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu":
        return sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape)
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu_backward":
        return sdpa_backward_flop_count(args[0].shape, args[1].shape, args[2].shape, args[3].shape)
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0


def _touched_bytes(tensor: torch.Tensor) -> int:
    """Bytes of distinct elements: an expanded dimension is read from cache."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride != 0:
            count *= size
    return count * tensor.element_size()


def _tensors(tree: Any) -> Iterable[torch.Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))
