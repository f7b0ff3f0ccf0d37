"""Floating-point operations of a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from graph_capture.costs.flops import count_flops

aten = torch.ops.aten


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


BFLOAT16 = torch.bfloat16


@pytest.mark.parametrize(
    ("func", "args", "out", "flops"),
    [
        (aten.mm.default, (_meta(4, 8), _meta(8, 16)), _meta(4, 16), 2 * 4 * 8 * 16),
        (
            aten.mm.dtype,
            (_meta(4, 8, dtype=BFLOAT16), _meta(8, 16, dtype=BFLOAT16), torch.float32),
            _meta(4, 16),
            2 * 4 * 8 * 16,
        ),
        (
            aten.addmm.default,
            (_meta(16), _meta(4, 8), _meta(8, 16)),
            _meta(4, 16),
            2 * 4 * 8 * 16,
        ),
        (aten.bmm.default, (_meta(3, 4, 8), _meta(3, 8, 16)), _meta(3, 4, 16), 6 * 4 * 8 * 16),
        (
            aten.baddbmm.default,
            (_meta(3, 4, 16), _meta(3, 4, 8), _meta(3, 8, 16)),
            _meta(3, 4, 16),
            6 * 4 * 8 * 16,
        ),
        (aten.mv.default, (_meta(4, 8), _meta(8)), _meta(4), 2 * 4 * 8),
        (aten.relu.default, (_meta(4, 8),), _meta(4, 8), 0),
    ],
)
def test_products_by_hand(func: Any, args: tuple, out: Any, flops: int) -> None:
    """Two operations for each element of a product, none for what moves memory."""
    assert count_flops(func, args, {}, out) == flops


Q, K = _meta(2, 8, 128, 64), _meta(2, 2, 256, 64)
LSE, SEED = _meta(2, 8, 128), torch.empty((), dtype=torch.long, device="meta")
PAIRS = 2 * 8 * 128 * 256
ATTENTION = {
    "flash": (
        (aten._scaled_dot_product_flash_attention.default, (Q, K, K)),
        (
            aten._scaled_dot_product_flash_attention_backward.default,
            (Q, Q, K, K, Q, LSE, None, None, 128, 256, 0.0, False, SEED, SEED),
        ),
    ),
    "efficient": (
        (aten._scaled_dot_product_efficient_attention.default, (Q, K, K, None, True)),
        (
            aten._scaled_dot_product_efficient_attention_backward.default,
            (Q, Q, K, K, None, Q, LSE, SEED, SEED, 0.0, [True] * 4),
        ),
    ),
    "cudnn": (
        (aten._scaled_dot_product_cudnn_attention.default, (Q, K, K, None, True)),
        (
            aten._scaled_dot_product_cudnn_attention_backward.default,
            (Q, Q, K, K, Q, LSE, SEED, SEED, None, None, None, 128, 256, 0.0, False),
        ),
    ),
    "cpu": (
        (aten._scaled_dot_product_flash_attention_for_cpu.default, (Q, K, K)),
        (
            aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
            (Q, Q, K, K, Q, LSE, 0.0, False),
        ),
    ),
    "low-level flash": (
        (
            aten._flash_attention_forward.default,
            (
                Q.transpose(1, 2),
                K.transpose(1, 2),
                K.transpose(1, 2),
                None,
                None,
                128,
                256,
                0.0,
                False,
                False,
            ),
        ),
        None,
    ),
}


@pytest.mark.parametrize("library", ATTENTION)
def test_attention_with_shared_keys_is_two_products_and_five(library: str) -> None:
    """8 heads over 2 of keys: 4 * pairs * width forward, 10 * pairs * width backward."""
    forward, backward = ATTENTION[library]
    assert count_flops(*forward, {}, (Q, LSE)) == 4 * PAIRS * 64
    if backward is not None:
        assert count_flops(*backward, {}, (Q, K, K)) == 10 * PAIRS * 64


def test_a_causal_mask_halves_attention() -> None:
    """Query i sees i + 1 keys: n (n + 1) / 2 pairs instead of n^2."""
    q = _meta(1, 4, 100, 16)
    func = aten._scaled_dot_product_flash_attention.default
    assert count_flops(func, (q, q, q, 0.0, True), {}, (q, None)) == 4 * 4 * 16 * 5050
    full = count_flops(func, (q, q, q, 0.0, False), {}, (q, None))
    assert full == 4 * 4 * 16 * 10_000


def test_values_may_be_narrower_than_keys() -> None:
    """Scores take the width of the keys, their product with values that of the values."""
    q, v = _meta(1, 1, 10, 64), _meta(1, 1, 10, 32)
    func = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert count_flops(func, (q, q, v), {}, (v, None)) == 2 * 100 * (64 + 32)


def _convolution(x: torch.Tensor, weight: torch.Tensor, *, transposed: bool, groups: int) -> tuple:
    return (x, weight, None, [2, 2], [1, 1], [1, 1], transposed, [0, 0], groups)


@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_agree_with_torchs_counter(transposed: bool) -> None:
    """Forward and backward of a strided convolution, transposed or not, as torch counts them."""
    x = torch.randn(2, 6, 9, 9, requires_grad=True)
    weight = torch.randn(6, 4, 3, 3) if transposed else torch.randn(4, 6, 3, 3)
    weight.requires_grad_()
    convolve = F.conv_transpose2d if transposed else F.conv2d
    with FlopCounterMode(display=False) as forward:
        y = convolve(x, weight, stride=2, padding=1)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    args = _convolution(x, weight, transposed=transposed, groups=1)
    assert count_flops(aten.convolution.default, args, {}, y) == forward.get_total_flops()
    args = (y, x, weight, [0], *args[3:], [True, True, False])
    counted = count_flops(aten.convolution_backward.default, args, {}, (x, weight, None))
    assert counted == backward.get_total_flops()


def test_groups_divide_the_work_of_both_gradients() -> None:
    """A depthwise convolution's gradients cost twice its forward, of which each sees 9 weights."""
    x, weight = _meta(2, 16, 8, 8), _meta(16, 1, 3, 3)
    args = (x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 16)
    assert count_flops(aten.convolution.default, args, {}, x) == 2 * x.numel() * 9
    args = (x, x, weight, [0], *args[3:], [True, True, True])
    assert count_flops(aten.convolution_backward.default, args, {}, None) == 4 * x.numel() * 9


def test_the_convolution_of_cudnn_counts_the_same() -> None:
    """It names its arguments in another order."""
    x, weight = _meta(2, 3, 8, 8), _meta(5, 3, 3, 3)
    out = _meta(2, 5, 8, 8)
    args = (x, weight, [1, 1], [1, 1], [1, 1], 1, True, False, True)
    assert count_flops(aten.cudnn_convolution.default, args, {}, out) == 2 * out.numel() * 27


def test_a_recurrent_layer_multiplies_its_weights_at_each_step() -> None:
    """5 steps of 3 samples with weights of 32 x 8 and 32 x 8; twice that backward."""
    x, weight, bias, state = _meta(5, 3, 8), _meta(32, 8), _meta(32), _meta(1, 3, 8)
    args = (x, weight, weight, bias, bias, state, state, False, [], 2, 8, 1, True, False, False)
    flops = 2 * 5 * 3 * 2 * 32 * 8
    assert count_flops(aten.mkldnn_rnn_layer.default, (*args, True), {}, None) == flops
    assert count_flops(aten.mkldnn_rnn_layer_backward.default, args, {}, None) == 2 * flops
