"""Sort operators into a few classes whose kernels reach similar shares of a device's peak."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..private_torch.operators import schema_of

MATMUL = "matmul"
CONVOLUTION = "convolution"
DEPTHWISE = "depthwise_convolution"
ATTENTION = "attention"
ELEMENTWISE = "elementwise"
NORMALIZATION = "normalization"
REDUCTION = "reduction"
COPY = "copy"
RANDOM = "random"
INDEXING = "indexing"
OTHER = "other"

OPERATOR_CLASSES = (
    MATMUL,
    CONVOLUTION,
    DEPTHWISE,
    ATTENTION,
    ELEMENTWISE,
    NORMALIZATION,
    REDUCTION,
    COPY,
    RANDOM,
    INDEXING,
    OTHER,
)
"""All classes. The kernels of the first four multiply; those of the others move memory."""

# The first pattern that fits the whole schema name decides. Names are those of
# aten/src/ATen/native/native_functions.yaml, with the device libraries' own variants.
_PATTERNS: tuple[tuple[str, str], ...] = (
    (ATTENTION, r"_?(scaled_dot_product|flash|efficient|cudnn|fused)_?\w*attention\w*"),
    (CONVOLUTION, r"\w*conv(olution|_?\d?d|_transpose|_depthwise)\w*"),
    (
        MATMUL,
        r"(mm|addmm|bmm|baddbmm|addbmm|mv|addmv|dot|vdot|_int_mm|_?scaled_mm\w*|_?\w*grouped_mm"
        r"|_addmm_activation|\w*linear(_backward\w*)?|mkldnn_rnn_layer\w*"
        r"|(_cudnn|miopen|_thnn_fused)_(rnn|lstm|gru)\w*)",
    ),
    (
        RANDOM,
        r"(bernoulli|\w*dropout|rand|randn|randint|randperm|normal|uniform|exponential|cauchy"
        r"|geometric|log_normal|random|multinomial|rrelu_with_noise)(_|_like|_backward)?",
    ),
    (
        NORMALIZATION,
        r"(\w*(batch|layer|group|instance|rms)_norm\w*|_?\w*softmax\w*|\w*cross_entropy\w*)",
    ),
    (
        INDEXING,
        r"(\w*embedding\w*|_?index\w*|_unsafe_index\w*|gather\w*|\w*scatter\w*|take\w*"
        r"|masked_select\w*|nll_loss\w*)",
    ),
    (
        COPY,
        r"(empty\w*|new_\w+|\w+_like|zeros|ones|full|fill|zero|copy|clone|_to_copy|cat|_?stack"
        r"|contiguous|roll|repeat\w*|tile|constant_pad_nd|\w*_pad\dd\w*|flip|tril|triu|arange|linspace"
        r"|scalar_tensor|lift_fresh_copy|pixel_\w*shuffle|\w+_copy|slice_backward|select_backward)_?",
    ),
    # Derivatives of functions of one element, which carry no tag.
    (
        ELEMENTWISE,
        r"(gelu|silu|mish|tanh|sigmoid|logit|log_sigmoid|threshold|hardswish|hardtanh|hardsigmoid"
        r"|hardshrink|softshrink|softplus|elu|leaky_relu|prelu|_prelu_kernel|glu)_backward",
    ),
    (
        REDUCTION,
        r"(sum|mean|var\w*|std\w*|amax|amin|max|min|argmax|argmin|prod|any|all|norm|aminmax"
        r"|linalg_vector_norm|logsumexp|count_nonzero|cum\w+|_cum\w+|\w*_loss\w*)",
    ),
)
_COMPILED = tuple((name, re.compile(pattern)) for name, pattern in _PATTERNS)


def operator_class(func: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> str:
    """Return the class of a call, one of :data:`OPERATOR_CLASSES`.

    Parameters
    ----------
    func
        The ``OpOverload`` that is called.
    args, kwargs
        Its arguments, which tell a depthwise convolution from others; nodes of a graph do not.

    Examples
    --------
    >>> operator_class(torch.ops.aten.addmm.default)
    'matmul'
    >>> operator_class(torch.ops.aten.gelu_backward.default)
    'elementwise'
    """
    class_name = _class_by_name(func)
    if class_name == CONVOLUTION and _is_depthwise(func, args, kwargs or {}):
        return DEPTHWISE
    return class_name


def _class_by_name(func: Any) -> str:
    namespace, _, name = schema_of(func).name.partition("::")
    if namespace == "aten":
        for class_name, pattern in _COMPILED:
            if pattern.fullmatch(name):
                # max.other and the like share a name with reductions but are elementwise
                if class_name == REDUCTION and torch.Tag.pointwise in func.tags:
                    return ELEMENTWISE
                return class_name
    return ELEMENTWISE if torch.Tag.pointwise in func.tags else OTHER


def _is_depthwise(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether each channel has its own filter; such kernels are far from a product's rate."""
    if "depthwise" in schema_of(func).name:
        return True
    names = [a.name for a in schema_of(func).arguments]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    shape: tuple[int, ...] = getattr(named.get("weight"), "shape", ())
    return bool(named.get("groups", 1) > 1 and len(shape) > 1 and shape[1] == 1)
