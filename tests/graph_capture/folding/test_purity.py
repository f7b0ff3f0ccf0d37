"""Which calls may run again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph

from graph_capture.calls.draws import draws
from graph_capture.calls.writes import hidden_writes
from graph_capture.folding.purity import repeated_arguments, why_pinned
from graph_capture.step_capture import capture

aten = torch.ops.aten


def _draws(func: Any, *args: Any, **kwargs: Any) -> bool:
    return draws(Graph().call_function(func, args, kwargs))


def test_which_calls_draw() -> None:
    """Attention draws only with dropout; bernoulli_ does, a product does not."""
    attention = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert _draws(aten.bernoulli_.float, None, 0.5)
    assert not _draws(aten.mm.default, None, None)
    assert not _draws(attention, None, None, None)
    assert not _draws(attention, None, None, None, 0.0)
    assert _draws(attention, None, None, None, 0.1)
    assert _draws(attention, None, None, None, dropout_p=0.1)


@pytest.mark.parametrize("func", [aten.topk.default, aten.sort.default, aten.argmax.default])
def test_choices_are_pinned(func: Any) -> None:
    """A choice that later calls follow runs once."""
    assert why_pinned(Graph().call_function(func)) == "its choice decides what later calls read"


def test_batch_norm_is_repeated_without_statistics() -> None:
    """A repetition gives the same bits and leaves the running statistics alone."""
    x, w = torch.randn(8, 3, 4), torch.randn(3)
    mean, var = torch.zeros(3), torch.ones(3)
    args = (x, w, w, mean, var, True, 0.1, 1e-5)
    func = aten.native_batch_norm.default
    first = func(*args)
    kept = mean.clone(), var.clone()
    again = func(*repeated_arguments(func, args))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(mean, kept[0])
    assert torch.equal(var, kept[1])
    assert hidden_writes(func, args) == (mean, var)


def test_evaluated_batch_norm_reads_its_statistics() -> None:
    """In eval mode nothing is hidden, and the arguments stay."""
    args = (torch.zeros(2, 3, 4), None, None, torch.zeros(3), torch.ones(3), False, 0.1, 1e-5)
    func = aten.native_batch_norm.default
    assert hidden_writes(func, args) == ()
    assert repeated_arguments(func, args) is args


class _Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("count", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        h = F.dropout(self.norm(self.layer(x)), 0.5)
        values, chosen = h.topk(2)
        return h.scatter(1, chosen, values) * self.count


def test_reasons_in_a_captured_model() -> None:
    """What writes or reads a buffer that changes is pinned with its name; draws are not."""
    graph = capture(_Everything(), torch.randn(4, 8), loss_fn=torch.sum)
    pinned = {op.target: op.pinned for op in graph.operators if op.phase == "forward"}
    reasons = [op.pinned for op in graph.operators if op.target == "aten.add_.Tensor"]
    assert sorted(map(str, reasons)) == [
        "writes to buffer_count",
        "writes to buffer_norm_num_batches_tracked",
    ]
    assert pinned["aten.topk.default"] == "its choice decides what later calls read"
    assert pinned["aten.native_batch_norm.default"] is None
    assert any("buffer_count" in (op.pinned or "") and "mul" in op.target for op in graph.operators)
    (drawing,) = [op for op in graph.operators if "bernoulli" in op.target]
    assert drawing.pinned is None
    assert drawing.ordered
