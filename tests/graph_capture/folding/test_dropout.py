"""Dropout, split into mask and noise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graph_capture.calls.call_spec import bind_call
from graph_capture.folding.dropout import split_dropout
from graph_capture.step_capture import capture
from tests.capturing import trace_step


@pytest.mark.parametrize(
    ("layer", "count"),
    [
        (nn.Dropout(0.3), 1),
        (nn.Dropout(0.5), 1),  # its probability is the draw's default, which is left out
        (nn.Dropout1d(0.3), 1),
        (nn.Dropout(0.3, inplace=True), 1),
        (nn.Dropout(0.0), 0),
        (nn.Identity(), 0),
    ],
)
def test_how_many_are_split(layer: nn.Module, count: int) -> None:
    """Every dropout that draws and scales is split."""
    model = nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 8))
    step = trace_step(model, bind_call(model.forward, (torch.zeros(4, 8),), {}), torch.sum)
    assert split_dropout(step.graph) == count
    step.graph.lint()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("keep", [0.9, 0.5, 0.37])
def test_the_split_gives_the_same_bits(dtype: torch.dtype, keep: float) -> None:
    """Booleans drawn and divided afterwards are the noise that eager draws, bit by bit."""
    torch.manual_seed(1)
    noise = torch.empty(1001, dtype=dtype).bernoulli_(keep).div_(keep)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    mask = torch.empty(1001, dtype=torch.bool).bernoulli_(keep)
    assert torch.equal(mask.to(dtype).div_(keep), noise)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mask_takes_one_byte_an_element() -> None:
    """Beside the noise of 4 bytes an element there is a mask of 1."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3))
    graph = capture(model, torch.zeros(16, 8), loss_fn=torch.sum)
    (draw,) = [op for op in graph.operators if "bernoulli_" in op.target]
    assert [graph.storages[k].size_bytes for k in draw.outputs] == [16 * 8]
