"""What the benchmark of compiled steps complains of, keeps and prints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.compiled.cell import Cell, Cells, complaints
from benchmarks.compiled.gradients import error, slope_error
from benchmarks.compiled.table import table

LOW = Cell(
    model="m",
    asked="ours, low",
    budget_bytes=1000,
    predicted_bytes=990,
    peak_bytes=990,
    bits_equal=True,
    is_right=True,
    overhead=0.1,
    gap=0.01,
    step_us=110.0,
)
HIGH = replace(LOW, asked="ours, high", budget_bytes=2000, step_us=100.0, overhead=0.0)


def test_nothing_is_said_of_good_cells() -> None:
    """A plan may be slower than one of a lower budget by its gap."""
    assert (
        complaints([LOW, HIGH, replace(HIGH, asked="more", budget_bytes=3000, step_us=100.9)]) == []
    )


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (replace(LOW, peak_bytes=1001), "1001 bytes are above 1000"),
        (replace(LOW, predicted_bytes=960), "predicted 960, measured 990"),
        (replace(LOW, is_right=False), "gradients are wrong"),
        (replace(LOW, failure="nothing fits"), "nothing fits"),
        (replace(HIGH, step_us=120.0), "slower than with ours, low"),
    ],
)
def test_each_failing_of_a_cell_is_named(cell: Cell, words: str) -> None:
    """Peak, prediction, gradients, a refusal, and a larger budget that is slower."""
    cells = [cell] if cell.asked == LOW.asked else [LOW, cell]
    (said,) = complaints(cells)
    assert words in said


def test_error_of_small_gradients_is_relative_to_all() -> None:
    """One that is a millionth of the others is no judge."""
    expected = [torch.tensor([1000.0]), torch.tensor([1e-6])]
    assert error([torch.tensor([1000.0]), torch.tensor([2e-6])], expected) < 1e-5
    assert error([torch.tensor([1001.0]), torch.tensor([1e-6])], expected) == pytest.approx(1e-3)


def test_cells_are_found_again_in_their_file(tmp_path: Path) -> None:
    """So a run goes on where the last one ended."""
    Cells(tmp_path / "cells.json", {}).add(LOW)
    assert Cells(tmp_path / "cells.json", {}).get("m", "ours, low") == LOW


def test_budgets_stand_beside_ratios() -> None:
    """The highest of both first."""
    theirs = replace(LOW, asked="PyTorch's 1", budget_bytes=None, ratio=1.0, peak_bytes=1234)
    first, second = table([LOW, HIGH, theirs], 2000)
    assert first.startswith("| m | 100%, 2 kB |")
    assert "1.00 | 1,234 | equal to the bit" in first
    assert second.startswith("| m | 50%, 1 kB |")


def test_slopes_of_the_loss_tell_right_gradients_from_wrong_ones() -> None:
    """Whatever masks the loss has, its slopes belong to its gradients."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))
    sample = torch.randn(32, 8)

    def step(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(model(x), 0.3).square().mean()

    def other_masks_in_backward(x: torch.Tensor) -> torch.Tensor:
        return _FromAnotherLoss.apply(step(x), step(x))

    before = [p.detach().clone() for p in model.parameters()]
    assert slope_error(model, step, sample) < 0.01
    assert slope_error(model, other_masks_in_backward, sample) > 0.05
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class _FromAnotherLoss(torch.autograd.Function):
    """The first loss, with the second's gradients."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:  # type: ignore[override]
        return None, gradient
