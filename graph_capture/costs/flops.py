"""Count the floating-point operations of a call, from the shapes of its arguments.

A multiplication and an addition count as two, as vendors count them. The formulas
are not taken from ``torch.utils.flop_counter``, because it ignores causality,
multiplies a grouped convolution's weight gradient by its groups, and fails on some
overloads (``addmm`` with another output dtype, ``cudnn_convolution``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from ..private_torch.operators import packet_of, schema_of
from ..private_torch.trees import tree_iter

_ATTENTION = re.compile(
    r"aten::_(scaled_dot_product_(?P<library>\w+?)|(?P<low>flash|efficient))_attention"
    r"(_for_cpu|_for_mps|_forward|_overrideable)?(?P<backward>(_overrideable)?_backward)?"
)
_CONVOLUTION = re.compile(
    r"aten::(_?convolution(_overrideable)?"
    r"|(cudnn|miopen|mkldnn)_convolution(_transpose|_relu|_add_relu)?"
    r"|miopen_depthwise_convolution|_slow_conv2d_forward|slow_conv3d_forward"
    r"|slow_conv_(transpose|dilated)[23]d|_conv_depthwise2d|conv_depthwise3d)"
)
_CONVOLUTION_BACKWARD = re.compile(r"aten::convolution_backward(_overrideable)?")
# Name to the position of the left factor; the right one follows it.
_PRODUCTS = {
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::mv": 0,
    "aten::dot": 0,
    "aten::_int_mm": 0,
    "aten::_scaled_mm": 0,
    "aten::addmm": 1,
    "aten::_addmm_activation": 1,
    "aten::addmv": 1,
    "aten::addbmm": 1,
    "aten::baddbmm": 1,
}
_RECURRENT = {
    "aten::mkldnn_rnn_layer": 1,
    "aten::mkldnn_rnn_layer_backward": 2,
    "aten::_cudnn_rnn": 1,
    "aten::_cudnn_rnn_backward": 2,
}


def count_flops(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """Count operations of products, convolutions, attention and recurrent layers; 0 for others.

    Parameters
    ----------
    func
        The ``OpOverload`` that is called.
    args, kwargs, out
        Its arguments and outputs; only metadata is read.
    """
    name = schema_of(func).name.removesuffix("_")  # in place or not
    if name in _PRODUCTS:
        return _product(args, _PRODUCTS[name])
    if name in _RECURRENT:
        return _recurrent(args) * _RECURRENT[name]
    named = _named(func, args, kwargs)
    attention = _ATTENTION.fullmatch(name)
    if attention is not None and named["query"].dim() == 4:
        by_head = attention["low"] is None
        return _attention(named, by_head=by_head, backward=attention["backward"] is not None)
    if _CONVOLUTION.fullmatch(name):
        result = out if isinstance(out, torch.Tensor) else out[0]
        transposed = bool(named.get("transposed", "transpose" in name))
        return _convolution(args[0], args[1], result, transposed)
    if _CONVOLUTION_BACKWARD.fullmatch(name):
        once = _convolution(args[1], args[2], args[0], named["transposed"])
        return once * sum(named["output_mask"][:2])  # the bias's gradient is a sum
    formula: Callable[..., Any] | None = flop_registry.get(packet_of(func))
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0


def product_dtype(args: tuple, kwargs: dict, out: Any) -> torch.dtype:
    """Return the dtype in which a product multiplies: the narrowest among its arguments.

    An output may be wider (``mm`` with ``out_dtype``), as may statistics and
    scales that come with it.
    """
    floats = [
        t.dtype
        for t in tree_iter((args, kwargs))
        if isinstance(t, torch.Tensor) and (t.dtype.is_floating_point or t.dtype.is_complex)
    ]
    if floats:
        return min(floats, key=lambda dtype: dtype.itemsize)
    outputs = [t for t in tree_iter(out) if isinstance(t, torch.Tensor)]
    return outputs[0].dtype if outputs else torch.float32


def _product(args: tuple, left: int) -> int:
    """2 m k n for each matrix of the batch; a vector on the right has one column."""
    right = args[left + 1]
    return 2 * args[left].numel() * (right.shape[-1] if right.dim() > 1 else 1)


def _convolution(x: Any, weight: Any, out: Any, transposed: bool) -> int:
    """Each position of the output (of the input, if transposed) meets the whole filter."""
    positions = x if transposed else out
    return 2 * positions.shape[0] * prod(positions.shape[2:]) * weight.numel()


def _attention(named: dict[str, Any], *, by_head: bool, backward: bool) -> int:
    """Two products in forward; five in backward, of which one repeats forward's.

    Heads that share keys and values count as if each had its own. With a causal mask,
    only visible pairs count, because all fused kernels skip blocks above the diagonal
    (the query of row i sees the keys up to i).
    """
    query, key, value = named["query"], named["key"], named["value"]
    batch, heads, length, width = query.shape
    keys = key.shape[2]
    if not by_head:  # the low-level calls have lengths before heads
        heads, length, keys = length, heads, key.shape[1]
    pairs = length * keys
    if named.get("is_causal") or named.get("custom_mask_type"):
        square = min(length, keys)
        pairs = square * (square + 1) // 2 + (length - square) * keys
    widths = 3 * width + 2 * value.shape[-1] if backward else width + value.shape[-1]
    return int(2 * batch * heads * pairs * widths)


def _recurrent(args: tuple) -> int:
    """Each step multiplies each weight matrix once."""
    x, *rest = args
    matrices = [t for t in tree_iter(rest[:4]) if isinstance(t, torch.Tensor) and t.dim() == 2]
    return 2 * x.shape[0] * x.shape[1] * sum(t.numel() for t in matrices)


def _named(func: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments by the names of the schema."""
    names = [a.name for a in schema_of(func).arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}
