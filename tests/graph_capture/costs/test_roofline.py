"""Time of a call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from graph_capture.costs.device import Device
from graph_capture.costs.devices import DEVICES
from graph_capture.costs.roofline import call_cost_ns, work_of

aten = torch.ops.aten
PEAKS = replace(DEVICES["a100"], efficiency={})


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _product_ns(x: torch.Tensor, device: Device, out: torch.Tensor | None = None) -> int:
    return call_cost_ns(aten.mm.default, (x, x), {}, x if out is None else out, device)


def test_a_large_product_takes_its_flops() -> None:
    """A product of 4096 costs 2 * 4096^3 operations at the card's rate."""
    expected_ns = 2 * 4096**3 / 19.5e12 * 1e9
    assert _product_ns(_meta(4096, 4096), PEAKS) == pytest.approx(expected_ns, rel=0.001)


def test_a_copy_on_a_card_takes_its_traffic() -> None:
    """A copy of 400 MB reads and writes 800 MB at the card's bandwidth."""
    x = _meta(10**8)
    expected_ns = 8e8 / 2.039e12 * 1e9
    cost_ns = call_cost_ns(aten.clone.default, (x,), {}, x, PEAKS)
    assert cost_ns == pytest.approx(expected_ns, rel=0.001)


def test_the_class_decides_what_share_of_the_roofline_is_reached() -> None:
    """Products at half of the rate take twice as long, copies at a quarter four times."""
    half = replace(PEAKS, efficiency={"matmul": 0.5, "copy": 0.25})
    x, long = _meta(4096, 4096), _meta(10**8)
    assert _product_ns(x, half) == pytest.approx(2 * _product_ns(x, PEAKS), rel=1e-6)
    copies = [call_cost_ns(aten.clone.default, (long,), {}, long, d) for d in (half, PEAKS)]
    assert copies[0] == pytest.approx(4 * copies[1], rel=1e-5)


def test_a_time_by_element_takes_the_place_of_the_efficiency() -> None:
    """An operator with 2 ns an element takes 2 ms for a million, in place or not."""
    device = replace(PEAKS, efficiency={"elementwise": 1e-6}, element_ns={"aten::tanh": 2.0})
    x = _meta(10**6)
    assert call_cost_ns(aten.tanh.default, (x,), {}, x, device) == 2_000_000
    assert call_cost_ns(aten.tanh_.default, (x,), {}, x, device) == 2_000_000


def test_an_expanded_argument_is_read_once() -> None:
    """An argument that is expanded from one number costs as much as that number."""
    x, one = _meta(10**7), _meta(1)
    wide = call_cost_ns(aten.add.Tensor, (x, one.expand(10**7)), {}, x, PEAKS)
    assert wide == call_cost_ns(aten.add.Tensor, (x, one), {}, x, PEAKS)


def test_nothing_is_faster_than_a_launch() -> None:
    """A call on one number takes one launch."""
    x = _meta(1)
    assert call_cost_ns(aten.clone.default, (x,), {}, x, PEAKS) == PEAKS.launch_ns


def test_half_precision_is_faster_where_the_card_has_it() -> None:
    """A product in bfloat16 takes the rate of bfloat16."""
    x = _meta(4096, 4096, dtype=torch.bfloat16)
    assert _product_ns(x, PEAKS) == pytest.approx(2 * 4096**3 / 312e12 * 1e9, rel=0.001)


def test_the_factors_decide_the_rate_and_not_a_wider_result() -> None:
    """A product of bfloat16 that sums and returns float32 runs at the rate of bfloat16."""
    x = _meta(4096, 4096, dtype=torch.bfloat16)
    assert _product_ns(x, PEAKS, out=_meta(4096, 4096)) == _product_ns(x, PEAKS)


def test_statistics_in_float32_do_not_slow_attention_in_bfloat16() -> None:
    """The backward of attention also reads float32 statistics, yet multiplies in bfloat16."""
    q = _meta(1, 8, 1024, 64, dtype=torch.bfloat16)
    args = (q, q, q, q, q, _meta(1, 8, 1024), 0.0, False)
    func = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    assert work_of(func, args, {}, (q, q, q)).dtype == torch.bfloat16


def test_convolutions_may_use_tf32_by_default_and_products_may_not() -> None:
    """PyTorch lets cuDNN use TF32 on float32, cuBLAS only if asked to."""
    x, weight = _meta(32, 256, 64, 64), _meta(256, 256, 3, 3)
    args = (x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    flops = 2 * x.numel() * 256 * 9
    cost_ns = call_cost_ns(aten.convolution.default, args, {}, x, PEAKS)
    assert cost_ns == pytest.approx(flops / 156e12 * 1e9, rel=0.001)


def test_rows_that_are_looked_up_are_read_and_not_the_whole_table() -> None:
    """An embedding of 8 tokens costs the same from a table of a thousand rows and of a million."""
    tokens = torch.empty(8, dtype=torch.long, device="meta")
    out = _meta(8, 64)
    small, large = (
        work_of(aten.embedding.default, (_meta(rows, 64), tokens), {}, out)
        for rows in (1000, 10**6)
    )
    assert small.num_bytes == large.num_bytes == 2 * 8 * 64 * 4 + 8 * 8


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.empty_like.default, (_meta(10**8),)),
        (aten.view.default, (_meta(10**8), [10**8])),
        (aten.detach.default, (_meta(10**8),)),
    ],
)
def test_making_room_and_looking_costs_a_launch(func: Any, args: tuple) -> None:
    """Allocation and views move no memory."""
    assert call_cost_ns(func, args, {}, _meta(10**8), PEAKS) == PEAKS.launch_ns


def test_calls_of_cuda_libraries_are_priced() -> None:
    """Batch norm of cuDNN and the fused dropout take their traffic, the former twice its input."""
    x, channel = _meta(64, 256, 56, 56), _meta(256)
    out = (x, channel, channel, torch.empty(0, dtype=torch.uint8, device="meta"))
    args = (x, channel, channel, channel, channel, True, 0.1, 1e-5)
    norm_ns = call_cost_ns(aten.cudnn_batch_norm.default, args, {}, out, PEAKS)
    assert norm_ns == pytest.approx(8 * x.numel() / 2.039e12 * 1e9, rel=0.01)
    mask = torch.empty(x.shape, dtype=torch.bool, device="meta")
    dropout_ns = call_cost_ns(aten.native_dropout.default, (x, 0.1, True), {}, (x, mask), PEAKS)
    assert dropout_ns == pytest.approx(9 * x.numel() / 2.039e12 * 1e9, rel=0.01)
