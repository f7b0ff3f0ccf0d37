"""Time of a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graph_capture.costs.devices import DEVICES, device_for
from graph_capture.costs.roofline import call_cost_ns, count_flops

aten = torch.ops.aten
A100 = DEVICES["a100"]


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("func", "args", "out", "flops"),
    [
        (aten.mm.default, (_meta(4, 8), _meta(8, 16)), _meta(4, 16), 2 * 4 * 8 * 16),
        (
            aten.addmm.default,
            (_meta(16), _meta(4, 8), _meta(8, 16)),
            _meta(4, 16),
            2 * 4 * 8 * 16,
        ),
        (aten.bmm.default, (_meta(3, 4, 8), _meta(3, 8, 16)), _meta(3, 4, 16), 6 * 4 * 8 * 16),
        (aten.relu.default, (_meta(4, 8),), _meta(4, 8), 0),
    ],
)
def test_flops_by_hand(func: Any, args: tuple, out: Any, flops: int) -> None:
    """Two operations for each element of a product, none for what moves memory."""
    assert count_flops(func, args, {}, out) == flops


def test_attention_on_cpu_counts_both_products() -> None:
    """Attention of [2, 4, 8, 16] is two products: 2 * 2 * (2 * 4) * 8 * 8 * 16."""
    q = _meta(2, 4, 8, 16)
    func = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert count_flops(func, (q, q, q), {}, (q, None)) == 2 * 2 * 8 * 8 * 8 * 16


def test_a_large_product_takes_its_flops() -> None:
    """A product of 4096 costs 2 * 4096^3 operations at the card's rate."""
    x = _meta(4096, 4096)
    expected_ns = 2 * 4096**3 / A100.flops_per_s[torch.float32] * 1e9
    cost_ns = call_cost_ns(aten.mm.default, (x, x), {}, x, A100)
    assert cost_ns == pytest.approx(expected_ns, rel=0.01)


def test_a_copy_on_a_card_takes_its_traffic() -> None:
    """A copy of 400 MB reads and writes 800 MB at the card's bandwidth."""
    x = _meta(10**8)
    expected_ns = 8e8 / A100.bytes_per_s * 1e9
    assert call_cost_ns(aten.clone.default, (x,), {}, x, A100) == pytest.approx(
        expected_ns, rel=0.01
    )


def test_an_expanded_argument_is_read_once() -> None:
    """An argument that is expanded from one number costs as much as that number."""
    x, one = _meta(10**7), _meta(1)
    wide = call_cost_ns(aten.add.Tensor, (x, one.expand(10**7)), {}, x, A100)
    assert wide == call_cost_ns(aten.add.Tensor, (x, one), {}, x, A100)


def test_nothing_is_faster_than_a_launch() -> None:
    """A call on one number takes one launch."""
    x = _meta(1)
    assert call_cost_ns(aten.clone.default, (x,), {}, x, A100) == A100.launch_ns


def test_half_precision_is_faster_where_the_card_has_it() -> None:
    """A product in bfloat16 takes the rate of bfloat16."""
    x = _meta(4096, 4096, dtype=torch.bfloat16)
    cost_ns = call_cost_ns(aten.mm.default, (x, x), {}, x, A100)
    assert cost_ns == pytest.approx(2 * 4096**3 / 312e12 * 1e9, rel=0.01)


def test_the_cpu_has_an_entry() -> None:
    """Everything that is no CUDA device takes the entry of the CPU."""
    assert device_for("cpu") is DEVICES["cpu"]
