"""Scratch memory that kernels take from the allocator while they run.

How much a kernel takes depends on the library behind it (oneDNN reorders
weights into blocks that suit the processor, attention keeps tiles for each
thread), so it is measured: each distinct call runs once, alone, on zeros (on
multiples of the identity where zeros make no sense), under the allocator's
record. Calls that are known to take none are not run, nor those that cannot be
trusted with made-up values, nor anything when there is no real device at hand.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_iter, tree_map

from .allocator import peak_extra_bytes
from .cost_model import Call

logger = logging.getLogger(__name__)
aten = torch.ops.aten

# A number where a kernel takes a tensor becomes one: in double, then in the kernel's dtype.
_SCALAR_BYTES = 16

_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}

# Kernels that only make memory or move it: whatever they take, they hand out.
_TAKES_NONE = re.compile(
    r"aten::(empty.*|new_.*|.*_like|zeros|ones|full|arange|clone|copy_|_to_copy|cat|stack|fill_"
    r"|zero_|bernoulli_|lift_fresh)"
)

# Kernels that must not run on made-up values: they read memory at places that their arguments
# name, or another library's packed state.
_UNSAFE = re.compile(
    r"aten::(.*(ctc|quantize|fbgemm|sparse|packed|cudnn|miopen|_rnn|_lstm|_gru|lstm_|gru_).*"
    r"|max_unpool.*|.*gather_.*|segment_.*)"
)
_SAFE_ALL_THE_SAME = {"aten::mkldnn_rnn_layer", "aten::mkldnn_rnn_layer_backward"}

# Kernels that fail on a matrix of zeros, or whose scratch grows with the norm.
_WANTS_REGULAR = re.compile(r"aten::_?(linalg|cholesky|lu_|inverse|triangular|ormqr|logdet|det).*")

# Calls whose outputs are opaque to fake tensors: what they hold must be seen once.
_OPAQUE_OUTPUTS = {"aten::mkldnn_rnn_layer", "aten::_embedding_bag"}


class WorkspaceProbe:
    """Measures the scratch memory of calls, each distinct one once.

    Parameters
    ----------
    device_type
        Where the calls run; only ``"cpu"`` is measured.
    at_hand
        Whether the model lies on a real device. If not, nothing is run and
        scratch counts as zero.
    scratch
        Whether scratch is wanted at all.
    """

    def __init__(self, device_type: str, *, at_hand: bool, scratch: bool = True) -> None:
        self._measures = at_hand and device_type == "cpu"
        self._scratch = scratch
        self._known: dict[Any, int] = {}

    def bytes_of(self, call: Call) -> int:
        """Bytes that the call allocates and frees again beside its outputs."""
        func, args, kwargs, out = call.func, call.args, call.kwargs, call.out
        if not self._measures or not self._scratch:
            return 0
        name = func._schema.name
        if torch.Tag.pointwise in func.tags:
            # TensorIterator copies what it must cast first (aten/src/ATen/TensorIterator.cpp).
            if len({t.dtype for t in tree_iter((args, kwargs, out)) if _is(t)}) <= 1:
                return _SCALAR_BYTES if any(isinstance(x, (int, float)) for x in args) else 0
        elif _TAKES_NONE.fullmatch(name) or not _safe(func):
            return 0
        if name in _PRODUCTS and args[0].dtype in (torch.float32, torch.float64):
            return sum(_bytes(t) for t in args if isinstance(t, torch.Tensor) and _must_copy(t))
        key = (func, call.grad_enabled, _signature((args, kwargs)))
        if key not in self._known:
            self._known[key] = _measure(func, args, kwargs, call.grad_enabled)
        return self._known[key]

    def output_bytes(self, func: Any, args: tuple, kwargs: dict) -> tuple[int, ...] | None:
        """Real bytes of each output, for the calls whose fake outputs do not tell."""
        if not self._measures or func._schema.name not in _OPAQUE_OUTPUTS:
            return None
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
            results = func(*tree_map(_real, args), **tree_map(_real, kwargs))
        return tuple(t.untyped_storage().nbytes() for t in results)


def _must_copy(matrix: torch.Tensor) -> bool:
    """Whether a product first copies this operand: neither rows nor columns are dense."""
    if matrix.dim() < 2 or matrix.numel() == 0:
        return False
    rows, columns = matrix.shape[-2:]
    row_stride, column_stride = matrix.stride()[-2:]
    by_rows = column_stride == 1 and row_stride >= max(1, columns)
    by_columns = row_stride == 1 and column_stride >= max(1, rows)
    return not (by_rows or by_columns)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _signature(tree: Any) -> Any:
    leaves, spec = tree_flatten(tree)
    described = tuple(
        (tuple(x.shape), tuple(x.stride()), x.dtype) if isinstance(x, torch.Tensor) else repr(x)
        for x in leaves
    )
    return described, str(spec)


def _safe(func: Any) -> bool:
    if func._schema.name in _SAFE_ALL_THE_SAME:
        return True
    return func.namespace == "aten" and _UNSAFE.fullmatch(func._schema.name) is None


def _measure(func: Any, args: tuple, kwargs: dict, grad_enabled: bool) -> int:
    make = _regular if _WANTS_REGULAR.fullmatch(func._schema.name) else _real
    generator_state = torch.get_rng_state()
    try:
        real_args, real_kwargs = tree_map(make, args), tree_map(make, kwargs)
        results: list[Any] = []
        with torch.set_grad_enabled(grad_enabled), torch._C._AutoDispatchBelowAutograd():
            peak = peak_extra_bytes(lambda: results.append(func(*real_args, **real_kwargs)))
    except (RuntimeError, IndexError, ValueError) as error:
        logger.debug("%s does not run on zeros, its scratch counts as zero: %s", func, error)
        return 0
    finally:
        torch.set_rng_state(generator_state)
    given = {t.untyped_storage()._cdata for t in tree_iter((real_args, real_kwargs)) if _is(t)}
    produced = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for t in tree_iter(results)
        if _is(t)
    }
    return max(0, peak - sum(size for sid, size in produced.items() if sid not in given))


def _real(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    device = "cpu" if x.is_meta else x.device
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).fill_(0)


def _regular(x: Any) -> Any:
    """Matrices that can be inverted; of a norm at which iterations do not stop early."""
    real = _real(x)
    if _is(real) and real.dim() >= 2 and (real.is_floating_point() or real.is_complex()):
        real.diagonal(dim1=-2, dim2=-1).fill_(64)
    return real


def _is(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
