"""Choose the attention kernel that PyTorch would take on an absent CUDA GPU.

Written after ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`` and
``attention.cpp`` of torch 2.11 to 2.13, in builds for CUDA 13.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from ..costs.capability import capability_of
from ..costs.devices import Device
from ..errors import NotFittingError
from ..private_torch.aten import (
    attention_in_cudnn,
    attention_in_efficient,
    attention_in_flash,
    attention_in_math,
)
from ..private_torch.settings import attention_priorities

aten = torch.ops.aten

_HALF = (torch.float16, torch.bfloat16)
_MASK_MULTIPLE = 8  # elements; attention.cpp, preprocess_mask
_CUDNN_MASKED_OUT = -65504.0  # attention.cpp, convert_boolean_attn_mask_cudnn

AMD = ("mi300x",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Arguments of one ``scaled_dot_product_attention``."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    dropout_p: float
    is_causal: bool
    gqa: bool

    @property
    def needs_grad(self) -> bool:
        """Whether it is differentiated."""
        return torch.is_grad_enabled() and any(
            t.requires_grad for t in (self.query, self.key, self.value)
        )


def attention_as_on(
    device: Device,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """``at::native::scaled_dot_product_attention`` (``attention.cpp``)."""
    if attn_mask is not None and is_causal:
        raise RuntimeError(
            "scaled_dot_product_attention: attn_mask must not be set with is_causal=True"
        )
    call = Attention(
        query=query,
        key=key,
        value=value,
        mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        gqa=enable_gqa,
    )
    backend = attention_backend(call, device)
    cudnn = backend == SDPBackend.CUDNN_ATTENTION
    bias = _additive(attn_mask, query.dtype, _CUDNN_MASKED_OUT if cudnn else float("-inf"))
    if cudnn:
        return attention_in_cudnn(
            query, key, value, bias, call.needs_grad, dropout_p, is_causal, False, scale=scale
        )[0]
    if backend == SDPBackend.FLASH_ATTENTION:
        width = query.size(-1)
        out = attention_in_flash(
            *(_padded(t, 8) for t in (query, key, value)),
            dropout_p,
            is_causal,
            False,
            scale=1.0 / math.sqrt(width) if scale is None else scale,
        )[0]
        return out if out.size(-1) == width else aten.slice(out, -1, 0, width)
    if backend == SDPBackend.EFFICIENT_ATTENTION:
        if bias is not None:
            bias = _aligned_bias(bias, query, key)
        return attention_in_efficient(
            query, key, value, bias, call.needs_grad, dropout_p, is_causal, scale=scale
        )[0]
    return attention_in_math(
        query, key, value, bias, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def attention_backend(call: Attention, device: Device) -> SDPBackend:
    """The kernel that PyTorch takes: ``sdp_utils.cpp``, ``select_sdp_backend``.

    Raises
    ------
    NotFittingError
        When the user has switched off every kernel that could be used.
    """
    usable = {
        SDPBackend.CUDNN_ATTENTION: _cudnn_can,
        SDPBackend.FLASH_ATTENTION: _flash_can,
        SDPBackend.EFFICIENT_ATTENTION: _efficient_can,
        SDPBackend.MATH: lambda _call, _device: torch.backends.cuda.math_sdp_enabled(),
    }
    for backend in _order(device):
        if backend in usable and usable[backend](call, device):
            return backend
    raise NotFittingError(
        "no kernel for scaled_dot_product_attention is left on "
        f"{device.name}: query {tuple(call.query.shape)} of {call.query.dtype}, "
        f"{'a' if call.mask is not None else 'no'} mask; allow more in "
        "torch.nn.attention.sdpa_kernel"
    )


def _order(device: Device) -> list[SDPBackend]:
    """Preferences, best first; cuDNN's kernel comes first on Hopper and Blackwell."""
    order = [
        SDPBackend(number)
        for number in attention_priorities()
        if number in {int(b.value) for b in SDPBackend.__members__.values()}
    ]
    default = [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
        SDPBackend.CUDNN_ATTENTION,
    ]
    prefers_cudnn = device.name not in AMD and capability_of(device) in ((9, 0), (10, 0), (10, 3))
    if prefers_cudnn and order[: len(default)] == default:
        return [SDPBackend.CUDNN_ATTENTION, *default[:3]]
    return order


def _four_dimensional(call: Attention) -> bool:
    return call.query.dim() == call.key.dim() == call.value.dim() == 4


def _heads_fit(call: Attention, *, supports_gqa: bool, same_kv_heads: bool = True) -> bool:
    batch, heads = call.query.size(0), call.query.size(-3)
    of_key, of_value = call.key.size(-3), call.value.size(-3)
    if not batch == call.key.size(0) == call.value.size(0):
        return False
    if call.gqa and supports_gqa:
        divides = heads % of_key == 0 and (same_kv_heads or heads % of_value == 0)
        return divides and (not same_kv_heads or of_key == of_value)
    return heads == of_key == of_value


def _not_empty(call: Attention) -> bool:
    return call.query.size(-2) > 0 and call.key.size(-2) > 0


def _rows_dense(call: Attention, *, ignore_one_wide: bool) -> bool:
    dense = all(t.stride(-1) == 1 for t in (call.query, call.key, call.value))
    dense = dense or (ignore_one_wide and call.query.size(-1) == 1)
    return dense and (call.mask is None or call.mask.stride(-1) == 1)


def _flash_can(call: Attention, device: Device) -> bool:
    width = call.query.size(-1)
    capability = capability_of(device)
    if not torch.backends.cuda.flash_sdp_enabled() or not _four_dimensional(call):
        return False
    if call.mask is not None or call.query.dtype not in _HALF or capability < (8, 0):
        return False
    if not width == call.key.size(-1) == call.value.size(-1) or width > 256:
        return False
    if call.is_causal and call.query.size(-2) != call.key.size(-2):
        return False
    narrow = width <= 192 or (call.dropout_p == 0 and width > 224)
    if capability in ((8, 6), (8, 9), (12, 0), (12, 1)) and call.needs_grad and not narrow:
        return False
    return (
        _same_dtypes(call)
        and _heads_fit(call, supports_gqa=True)
        and _not_empty(call)
        and _rows_dense(call, ignore_one_wide=True)
    )


def _efficient_can(call: Attention, device: Device) -> bool:
    capability = capability_of(device)
    dtypes = (*_HALF, torch.float32) if capability >= (8, 0) else (torch.float16, torch.float32)
    if not torch.backends.cuda.mem_efficient_sdp_enabled() or not _four_dimensional(call):
        return False
    multiple = _matmul_multiple(call.query.dtype, capability)
    widths = (call.query.size(-1), call.value.size(-1))
    return (
        widths[0] == call.key.size(-1)
        and all(w > 0 and w % multiple == 0 for w in widths)
        and call.query.dtype in dtypes
        and _same_dtypes(call)
        and _heads_fit(call, supports_gqa=False)
        and _not_empty(call)
        and _rows_dense(call, ignore_one_wide=False)
    )


def _cudnn_can(call: Attention, device: Device) -> bool:
    capability = capability_of(device)
    if device.name in AMD or not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    if not _four_dimensional(call) or call.query.dtype not in _HALF or capability < (8, 0):
        return False
    if (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    ):
        return False
    # Since torch 2.12 (pytorch#174245).
    if _release() >= (2, 12) and (call.dropout_p * 16) % 1:
        return False
    widths = (call.query.size(-1), call.value.size(-1))
    most = 256 if capability == (9, 0) else 128
    if capability[0] == 10 and widths == (192, 128):
        most = 192
    return (
        _mask_broadcasts(call)
        and max(call.query.size(0), call.query.size(1)) <= 65535
        and all(w <= most and w % 8 == 0 for w in widths)
        and call.key.size(2) != 1
        and (call.dropout_p == 0 or call.query.size(2) != 1)
        and _same_dtypes(call)
        and _heads_fit(call, supports_gqa=True, same_kv_heads=False)
        and _not_empty(call)
        and _rows_dense(call, ignore_one_wide=True)
    )


def _mask_broadcasts(call: Attention) -> bool:
    mask = call.mask
    if mask is None:
        return True
    if mask.requires_grad or mask.dim() not in (2, 4):
        return False
    full = (*call.query.shape[:3], call.key.size(2))
    return all(
        size in (1, whole) for size, whole in zip(mask.shape, full[4 - mask.dim() :], strict=True)
    )


def _same_dtypes(call: Attention) -> bool:
    return call.query.dtype == call.key.dtype == call.value.dtype


def _matmul_multiple(dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """Number of elements of which rows must be a multiple: ``minimum_gemm_alignment``."""
    half = dtype in _HALF
    least = 4 if capability >= (8, 0) else 1
    if capability >= (8, 0) or (capability >= (7, 0) and half):
        return max(least, 128 // (16 if half else 32))
    return least


def _additive(
    mask: torch.Tensor | None, dtype: torch.dtype, masked_out: float
) -> torch.Tensor | None:
    """A mask in the form that is added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    fill = torch.scalar_tensor(masked_out, dtype=dtype, device=mask.device)
    return torch.where(mask, 0.0, fill)


def _aligned_bias(bias: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Rows of the bias padded to what the kernel reads at once, then broadcast."""
    strided = all(s % _MASK_MULTIPLE == 0 for s in bias.stride()[:-1]) and bias.stride(-1) == 1
    if not strided:
        width = bias.size(-1)
        added = _MASK_MULTIPLE - width % _MASK_MULTIPLE
        bias = aten.slice(F.pad(bias, (0, added)), -1, 0, width)
    return bias.expand(query.size(0), query.size(1), query.size(2), key.size(2))


def _padded(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    rest = tensor.size(-1) % multiple
    return tensor if rest == 0 else F.pad(tensor, (0, multiple - rest))


def _release() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)
