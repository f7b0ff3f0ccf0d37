"""The memory layout of real kernels' results, where stand-ins get it wrong.

PyTorch's fake implementations are written by hand for each operator. For arguments
that are not contiguous they sometimes differ from the kernel: batch normalization over
a transposed input returns a contiguous tensor on the CPU, but its fake result is
transposed. The graph would then continue with the wrong call. So each distinct call of
that kind runs once for real, on blank arguments, and its stand-in is replaced if
strides or memory differ.

Some kernels always return tensors that are smaller than their memory; these calls run,
too. So do elementwise calls where a dimension of one element has a stride that no
contiguous tensor has. Such a tensor is contiguous and in another memory format at once:
real kernels and stand-ins take it for different ones, and the next normalization or
convolution chooses its kernel by that stride.

Calls that only move or view memory, all other elementwise calls, and matrix products are
left out: their fake results are right. So are calls that cannot run on made-up values,
and those that would take too long.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from typing import Any

import torch

from ..costs.blank_values import runs_on_blanks
from ..costs.cost_model import Call
from ..costs.free_memory import free_bytes
from ..costs.trial import (
    REFUSALS,
    argument_bytes,
    as_in_a_step,
    blank_arguments,
    call_key,
    output_bytes,
)
from ..private_torch.dispatch import disable_current_modes, without_torch_dispatch
from ..private_torch.fake_tensors import FakeTensor, FakeTensorMode
from ..private_torch.operators import schema_of
from ..private_torch.tensors import identity_of_storage
from ..private_torch.trees import tree_iter, tree_leaves

logger = logging.getLogger(__name__)

_LIES_AS_SAID = re.compile(
    r"aten::(mm|addmm|bmm|baddbmm|empty.*|new_.*|.*_like|clone|_to_copy|_unsafe_view|_reshape_alias"
    r"|_reshape_copy|contiguous|detach|alias|lift_fresh.*|_efficientzerotensor|sum|mean|cat|stack)"
)

# Elementwise calls whose fake results have TensorIterator's layout, as the real ones do. The fake
# results of others come from a Python formula (torch/_refs): copysign, heaviside, ldexp, logaddexp,
# logical_and, native_dropout_backward, pow of a number to a tensor's power, xlogy, and the backward
# of elu, hardsigmoid, hardswish, hardtanh and softplus (where the input lies unlike the gradient).
_ELEMENTWISE_AS_SAID = re.compile(
    r"aten::(_?(add|sub|rsub|mul|div|neg|abs|exp|expm1|log|log1p|log2|log10|sqrt|rsqrt|reciprocal"
    r"|square|sin|cos|tanh|sigmoid|relu|gelu|silu|elu|hardtanh|hardswish|leaky_relu|softplus|mish|erf"
    r"|where|masked_fill|maximum|minimum|clamp.*|addcmul|addcdiv|lerp|eq|ne|lt|le|gt|ge|sign"
    r"|bitwise_.*|logical_not|isnan|isinf|isfinite|floor|ceil|round|trunc|_to_copy|copy|fill)_?"
    r"|(sigmoid|tanh|gelu|silu|leaky_relu|mish)_backward)"
)

# Kernels that compute parts into their result and then shrink it, a loss to one number: the memory
# stays as large as before (aten/src/ATen/native/Loss.cpp, Col2Im.cpp).
_HOLDS_MORE = re.compile(r"aten::(.*_loss|binary_cross_entropy|col2im)")

# Results seen in this process, by device and number of threads: a step is traced again for each
# model that a plan is applied to.
_SEEN: dict[tuple[str, int], dict[str, Any]] = {}

_Found = tuple[tuple[int, ...], int, int]  # strides, offset, elements of the memory behind it


class RealResults:
    """Gives stand-ins of results the layout of real ones.

    Parameters
    ----------
    fake_mode
        The mode that all stand-ins belong to.
    device
        Where calls run.
    too_long
        Whether a call would take too long to run for this.
    """

    def __init__(
        self,
        fake_mode: FakeTensorMode,
        device: torch.device,
        too_long: Callable[[Call], bool] = lambda _call: False,
    ) -> None:
        self._fake_mode = fake_mode
        self._device = device
        self._too_long = too_long
        where = (str(device), torch.get_num_threads())
        self._known: dict[str, tuple[_Found | None, ...] | None] = _SEEN.setdefault(where, {})

    def corrected(self, func: Any, args: tuple, kwargs: dict, out: Any) -> Any:
        """Return ``out``, or a stand-in with the layout that the kernel makes."""
        if not _may_differ(func, args, kwargs, out):
            return out
        with disable_current_modes():
            call = Call(
                func=func, args=args, kwargs=kwargs, out=out, grad_enabled=torch.is_grad_enabled()
            )
            key = call_key(call, self._device.type)
            if key not in self._known:
                self._known[key] = self._look(call)
        found = self._known[key]
        if found is None:
            return out
        if isinstance(out, torch.Tensor):
            return self._like(out, found[0])
        return type(out)(
            self._like(o, f) if isinstance(o, torch.Tensor) else o
            for o, f in zip(out, found, strict=True)
        )

    def _look(self, call: Call) -> tuple[_Found | None, ...] | None:
        """The layout of each result; ``None`` if the fake ones are right or nothing is known."""
        free = free_bytes(self._device)
        too_large = free is not None and argument_bytes(call) + 2 * output_bytes(call) > free
        if too_large or self._too_long(call):
            return None
        try:
            with as_in_a_step(self._device), torch.set_grad_enabled(call.grad_enabled):
                args, kwargs = blank_arguments(call.func, call.args, call.kwargs, self._device)
                made = call.func(*args, **kwargs)
        except REFUSALS as error:
            logger.debug("%s does not run on zeros, its result is as said: %s", call.func, error)
            return None
        said, real = _as_list(call.out), _as_list(made)
        if len(said) != len(real):
            return None
        given = {
            identity_of_storage(t.untyped_storage()) for t in tree_iter((args, kwargs)) if _is(t)
        }
        found = tuple(_found(s, r, given) for s, r in zip(said, real, strict=True))
        return found if any(found) else None

    def _like(self, said: torch.Tensor, found: _Found | None) -> torch.Tensor:
        if found is None:
            return said
        strides, offset, num_elements = found
        device = said.fake_device if isinstance(said, FakeTensor) else said.device
        with without_torch_dispatch():
            memory = torch.empty(num_elements, dtype=said.dtype, device="meta")
            element = memory.as_strided(said.shape, strides, offset)
        return FakeTensor(self._fake_mode, element, device)


def _may_differ(func: Any, args: tuple, kwargs: dict, out: Any) -> bool:
    if func.namespace != "aten" or torch.Tag.inplace_view in func.tags:
        return False
    if any(r.alias_info is not None for r in schema_of(func).returns):
        return False
    given = [t for t in tree_leaves((args, kwargs)) if _is(t)]
    strided = [t for t in given if t.layout is torch.strided]
    two_formats = any(_in_two_formats(t) for t in strided)
    if _ELEMENTWISE_AS_SAID.fullmatch(schema_of(func).name) is not None and not two_formats:
        return False
    as_usual = all(t.is_contiguous() for t in strided) and not two_formats
    if as_usual and _HOLDS_MORE.fullmatch(schema_of(func).name) is None:
        return False
    if any(t.layout is not torch.strided or t.dtype.is_complex for t in given):
        return False
    if schema_of(func).name == "aten::mkldnn_rnn_layer_backward":
        return False  # reads a workspace whose size only the forward kernel knows
    if _LIES_AS_SAID.fullmatch(schema_of(func).name) is not None or not runs_on_blanks(func):
        return False
    if not isinstance(out, (torch.Tensor, tuple, list)):
        return False
    return all(o is None or isinstance(o, FakeTensor) for o in _as_list(out))


def _found(said: torch.Tensor, real: Any, given: set[int]) -> _Found | None:
    """The layout of a result if the fake one is wrong.

    Results of another shape, and those in an argument's memory, are left alone.
    """
    if not _is(said) or not _is(real):
        return None
    if (said.shape, said.dtype) != (real.shape, real.dtype) or said.numel() == 0:
        return None
    memory = real.untyped_storage()
    if identity_of_storage(memory) in given:
        return None
    num_elements = math.ceil(memory.nbytes() / real.element_size())
    same_memory = said.untyped_storage().nbytes() == memory.nbytes()
    if said.stride() == real.stride() and same_memory:
        return None
    return real.stride(), real.storage_offset(), num_elements


def _in_two_formats(t: torch.Tensor) -> bool:
    """Whether a contiguous tensor has an unusual stride in a dimension of one element."""
    if 1 not in t.shape or not t.is_contiguous():
        return False
    step = 1
    for size, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        if size == 1 and stride != step:
            return True
        step *= size
    return False


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _is(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
