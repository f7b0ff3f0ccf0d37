"""Compiled steps beside each other: rows, their file and their text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from planner.comparing.compiled_steps import CompiledRow, CompiledSteps, compare_compiled
from planner.comparing.files import ComparisonFileError
from tests.planner.compiled.models import Block, model_and_sample

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

ROWS = (
    CompiledRow(kind="unbudgeted", peak_bytes=3000, error=0.0, bits_equal=True, time_ratio=1.0),
    CompiledRow(kind="pytorch", ratio=0.5, peak_bytes=2000, error=0.66, time_ratio=1.1),
    CompiledRow(
        kind="remat",
        ratio=0.5,
        budget_bytes=2000,
        predicted_bytes=1990,
        peak_bytes=1990,
        error=3e-7,
        time_ratio=1.05,
        overhead=0.02,
        least_overhead=0.015,
        gap=0.005,
        first_step_s=12.0,
    ),
    CompiledRow(kind="remat", ratio=0.1, budget_bytes=900, failure="No schedule fits"),
)
STEPS = CompiledSteps(name="bert", lower="inductor", rows=ROWS, about={"num_threads": 1})


def test_rows_say_what_came_of_them() -> None:
    """Wrong gradients in bold letters, prediction beside measurement, and why nothing ran."""
    lines = str(STEPS).splitlines()
    assert "| PyTorch's 0.5 |  |  | 2,000 | **wrong**, error 0.66 | 1.10 |  |  |" in lines
    assert (
        "| ours, at the peak of 0.5 | 2 kB | 1,990 | 1,990 | error 3.0e-07 | 1.05 | "
        "+2.0%, +1.5%, 0.50% | 12 |"
    ) in lines
    assert "| ours, at the peak of 0.1 | 900 B |  | No schedule fits |  |  |  |  |" in lines


def test_a_file_gives_the_same_rows(tmp_path: Path) -> None:
    """Written and read again; something else is refused by name."""
    path = tmp_path / "bert.json"
    STEPS.save(path)
    assert CompiledSteps.load(path) == STEPS
    path.write_text('{"format": "another"}', "utf-8")
    with pytest.raises(ComparisonFileError, match=r"bert\.json"):
        CompiledSteps.load(path)
    path.write_text('{"format": "remat-compiled-steps", "rows": [{"kin": 1}]}', "utf-8")
    with pytest.raises(ComparisonFileError, match="kin"):
        CompiledSteps.load(path)


def test_figures_show_what_was_timed() -> None:
    """Rows without a peak or a time are left out; ours has no ratio beside its marker."""
    kinds = [(p.kind, p.label, p.is_wrong) for p in STEPS.points]
    assert kinds == [("unbudgeted", "", False), ("pytorch", "0.5", True), ("remat", "", False)]


def test_ratios_are_checked_first() -> None:
    """Before anything is compiled."""
    model, x = model_and_sample()
    with pytest.raises(ValueError, match=r"ratio from 0 to 1, not 40"):
        compare_compiled(model, x, ratios=[40])


@pytest.mark.slow
def test_ours_keeps_the_peaks_of_pytorchs_ratios() -> None:
    """With right gradients where PyTorch's are wrong, and no more memory, by eager kernels."""
    model, x = model_and_sample()
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    told: list[CompiledRow] = []
    found = compare_compiled(
        model, x, ratios=[0.9, 0.1], lower="aot_eager", repeats=0, seed=3, on_row=told.append
    )
    plain, *rows = found.rows
    theirs, ours = rows[:2], rows[2:]
    assert tuple(told) == found.rows
    assert plain.bits_equal
    assert [row.kind for row in rows] == ["pytorch", "pytorch", "remat", "remat"]
    assert any(row.is_wrong for row in theirs)
    for their, own in zip(theirs, ours, strict=True):
        assert their.peak_bytes is not None
        assert own.budget_bytes == their.peak_bytes
        assert own.bits_equal
        assert own.peak_bytes is not None
        assert own.predicted_bytes == own.peak_bytes <= their.peak_bytes
        assert own.gap is not None
        assert own.time_ratio is None
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name])
        assert parameter.grad is None


@pytest.mark.slow
def test_a_loss_outside_becomes_part_of_the_graph() -> None:
    """With ``loss_fn`` the loss is compiled together with the model, whose buffers count."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(Block(32), torch.nn.BatchNorm1d(32))

    def loss(output: Tensor) -> Tensor:
        return output.square().mean()

    found = compare_compiled(
        model, torch.randn(128, 32), ratios=[0.5], loss_fn=loss, lower="aot_eager", repeats=0
    )
    own = found.rows[-1]
    assert own.kind == "remat"
    assert own.predicted_bytes == own.peak_bytes
