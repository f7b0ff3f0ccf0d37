"""Compiled steps in a comparison: beside eager rows, in the table, in files and in the figure."""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from planner import Comparison, compare
from planner.comparing.compiled_steps import compare_compiled
from planner.comparing.execution import compiled_part
from planner.compiled_record import CompiledRecord, CompiledRow
from planner.plots.compiled_frontier import compiled_points
from tests.planner.compiled.models import WithLoss, model_and_sample
from tests.planner.plots.made import MB, whole_comparison
from tests.planner.small import make, sample, square

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++"))),
    reason="Inductor needs a C++ compiler",
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

ROWS = (
    CompiledRow(kind="unbudgeted", peak_bytes=80 * MB, error=0.0, bits_equal=True, time_ratio=1.01),
    CompiledRow(kind="pytorch", ratio=0.5, peak_bytes=70 * MB, error=0.66, time_ratio=1.2),
    CompiledRow(kind="pytorch", ratio=0.4, peak_bytes=60 * MB, error=None, time_ratio=1.3),
    CompiledRow(kind="pytorch", ratio=0.1, failure="a compiler says no"),
    CompiledRow(
        kind="remat",
        ratio=0.5,
        budget_bytes=70 * MB,
        predicted_bytes=69 * MB,
        peak_bytes=69 * MB,
        error=3e-7,
        time_ratio=1.1,
        overhead=0.02,
        least_overhead=0.015,
        gap=0.005,
        first_step_s=12.0,
    ),
    CompiledRow(
        kind="remat",
        ratio=0.4,
        budget_bytes=60 * MB,
        predicted_bytes=60 * MB,
        peak_bytes=61 * MB,
        error=0.0,
        bits_equal=True,
    ),
)
RECORD = CompiledRecord(
    name="Chain",
    lower="inductor",
    rows=ROWS,
    eager_peak_bytes=100 * MB,
    eager_ratio=0.8,
    about={"num_threads": 1, "versions": {"torch": "2"}, "load_average": 0.5},
)


@pytest.fixture
def comparison() -> Comparison:
    """Eager rows by hand, and compiled ones."""
    return replace(whole_comparison(), compiled=RECORD)


def test_the_table_says_what_is_eager_and_what_is_compiled(comparison: Comparison) -> None:
    """Which rows are which, and what each figure is against; nothing of it without them."""
    text = str(comparison)
    eager, compiled = text.split("compiled steps, by inductor: model and loss as one graph\n")
    assert "rows are of eager steps, against eager's; those of the last table of compiled" in eager
    assert "compiled without a budget, it takes 0.80 of eager's time" in compiled
    assert "times and gradients are against the compiled step without a budget" in compiled
    lines = {" ".join(line.split()) for line in compiled.splitlines()}
    assert "no budget 80,000,000 equal to the bit 1.01" in lines
    assert "PyTorch's 0.5 70,000,000 WRONG, error 0.66 1.20" in lines
    assert "PyTorch's 0.4 60,000,000 WRONG, error not finite 1.30" in lines
    assert "PyTorch's 0.1 failed: a compiler says no" in lines
    assert (
        "* ours, at the peak of 0.5 70 MB 69,000,000 69,000,000 error 3.0e-07 1.10 "
        "+2.0%, +1.5%, 0.50% 12"
    ) in lines
    assert any("61,000,000 OVER BUDGET" in line for line in lines)
    assert "compiled" not in str(whole_comparison())


def test_files_hold_compiled_rows(comparison: Comparison, tmp_path: Path) -> None:
    """JSON both ways; files from before there were any are read; CSV says what ratios are over."""
    path = tmp_path / "table.json"
    comparison.save(path)
    found = Comparison.load(path)
    assert found.compiled == RECORD
    assert str(found) == str(comparison)
    data = json.loads(path.read_text())
    del data["compiled"]
    path.write_text(json.dumps(data))
    assert Comparison.load(path).compiled is None
    comparison.save(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    own = [line for line in lines if line["kind"] == "compiled"]
    assert [line["strategy"] for line in own] == [f"compiled_{row.kind}" for row in ROWS]
    assert {line["measured_against"] for line in own} == {"compiled step without a budget"}
    assert [line["bits"] for line in own] == ["equal", "WRONG", "WRONG", "", "right", "equal"]
    assert (own[3]["outcome"], own[-1]["outcome"]) == ("failed", "over_budget")
    others = [line for line in lines if line["kind"] != "compiled"]
    assert {line["measured_against"] for line in others} == {"", "eager step"}


def test_the_figure_has_compiled_steps_and_eager_plans(comparison: Comparison) -> None:
    """Times of eager steps are brought to the same measure, by the ratio of the two."""
    points = compiled_points(RECORD, comparison)
    at = {(p.kind, p.peak_bytes // MB): p.time_ratio for p in points}
    assert at == {
        ("unbudgeted", 80): 1.01,
        ("pytorch", 70): 1.2,
        ("pytorch", 60): 1.3,
        ("remat", 69): 1.1,
        ("eager", 100): pytest.approx(1 / 0.8),
        ("eager_plan", 40): pytest.approx(1.21 / 0.8),
    }
    figure = comparison.plot_compiled()
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {'backend="remat"', "activation_memory_budget", "eager, plans"} <= set(shown)
    assert figure.axes[0].get_title() == "compiled by inductor"
    with pytest.raises(ValueError, match="no compiled step to draw"):
        whole_comparison().plot_compiled()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"compiled_ratios": [40]}, "ratio from 0 to 1, not 40"),
        ({"compiled_ratios": "0.5"}, "ratios are numbers from 0 to 1"),
        ({"lower": "nvcc"}, "lower is 'inductor' or 'aot_eager', got 'nvcc'"),
        ({"measure": False}, "compiled_ratios have measured figures only, and measure is False"),
        ({"device": "h100"}, "compiled_ratios have measured figures only, and the step is for"),
        ({"grads": "accumulated"}, "Leave compiled_ratios out, or these"),
        ({"outputs": "released"}, "Leave compiled_ratios out, or these"),
    ],
)
def test_what_cannot_be_compared_is_refused_first(options: dict[str, Any], word: str) -> None:
    """Before anything is solved."""

    def too_late(event: Any) -> None:
        raise AssertionError(f"{event.message} before")

    asked = {"compiled_ratios": [0.5], "progress": too_late, **options}
    with pytest.raises(ValueError, match=word):
        compare(make(), sample(), loss_fn=square, **asked)


def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Inductor generates for a card is not read."""
    monkeypatch.setattr(compiled_part, "single_device", lambda *_: torch.device("cuda", 0))
    with pytest.raises(ValueError, match="on the CPU, and the model lies on cuda:0"):
        compare(make(), sample(), loss_fn=square, compiled_ratios=[0.5])


@pytest.mark.slow
def test_rows_beside_eager_ones_are_of_the_same_step() -> None:
    """Optimizer and the loop's bytes count in both; ours keeps PyTorch's peak; all is restored."""
    model, x = model_and_sample()
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.get_rng_state()
    told: list[str] = []
    found = compare(
        model,
        x,
        budgets=["75%"],
        strategies=["auto"],
        compiled_ratios=[0.9, 0.1],
        lower="aot_eager",
        optimizer="adamw",
        resident_bytes=100_000,
        repeats=0,
        time_limit_s=2,
        progress=lambda event: told.append(event.message),
    )
    steps = found.compiled
    assert steps is not None
    assert found.eager is not None
    assert steps.eager_peak_bytes == found.eager.peak_bytes
    assert steps.eager_ratio is None
    assert [row.kind for row in steps.rows] == ["unbudgeted", *2 * ["pytorch"], *2 * ["remat"]]
    assert [row.failure for row in steps.rows] == [""] * 5
    assert steps.rows[0].bits == "equal"
    for their, own in zip(steps.rows[1:3], steps.rows[3:], strict=True):
        assert own.budget_bytes == their.peak_bytes
        assert own.bits_equal
        assert not own.is_over_budget
        assert own.predicted_bytes == own.peak_bytes
    assert "compiled by ours at the peak of 0.1" in told
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name])
        assert parameter.grad is None
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.slow
def test_a_loss_beside_the_model_and_its_labels_count() -> None:
    """What a loss function carries is in eager peaks, and in those of compiled steps."""
    labels = torch.randn(256, 4)
    found = compare(
        make(),
        sample(),
        loss_fn=lambda output: (output - labels).square().mean(),
        budgets=[],
        strategies=["none"],
        compiled_ratios=[0.5],
        lower="aot_eager",
        repeats=2,
        time_limit_s=2,
    )
    steps = found.compiled
    assert steps is not None
    assert steps.eager_ratio is not None
    assert steps.rows[-1].kind == "remat"
    assert steps.rows[-1].failure == ""
    assert steps.rows[-1].predicted_bytes == steps.rows[-1].peak_bytes
    assert found.eager is not None
    assert steps.eager_peak_bytes is not None
    assert abs(steps.eager_peak_bytes - found.eager.peak_bytes) <= labels.nbytes


class Broken(WithLoss):
    """A graph break between its blocks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        return self.blocks[1](x).square().mean()


@pytest.mark.slow
@pytest.mark.filterwarnings(  # Dynamo's, at a break, and ours about parts of a step
    r"ignore:The \.grad attribute of a Tensor:UserWarning", "ignore::planner.PlanWarning"
)
def test_steps_in_several_graphs_are_told_in_their_rows() -> None:
    """Ours has no one plan for them; PyTorch's rows stand."""
    torch.manual_seed(0)
    found = compare_compiled(
        Broken(), torch.randn(128, 32), ratios=[0.9], lower="aot_eager", repeats=0
    )
    plain, theirs, ours = found.rows
    assert (plain.failure, theirs.failure) == ("", "")
    assert "Dynamo cut the training step into 2 graphs" in ours.failure
    assert ours.peak_bytes is None


class Uncompiled(nn.Module):
    """Fails under the compiler only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


@pytest.mark.slow
def test_what_cannot_be_compiled_costs_no_eager_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of the step without a budget says why, and the table has it."""

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", fails)
    found = compare(
        Uncompiled(),
        torch.randn(64, 16),
        budgets=[],
        strategies=["none"],
        compiled_ratios=[0.5],
        repeats=0,
    )
    assert found.row("none").measured is not None
    assert found.compiled is not None
    (row,) = found.compiled.rows
    assert "no compiler here" in row.failure
    assert "no compiler here" in str(found)


@needs_compiler
@pytest.mark.slow
def test_by_inductor_ours_keeps_the_peak_too() -> None:
    """With right gradients, and the predicted peak."""
    torch.manual_seed(0)
    found = compare(
        WithLoss(1),
        torch.randn(128, 32),
        budgets=[],
        strategies=["none"],
        compiled_ratios=[0.9],
        repeats=0,
        time_limit_s=3,
    )
    assert found.compiled is not None
    plain, theirs, ours = found.compiled.rows
    assert (plain.bits, ours.failure) == ("equal", "")
    assert ours.budget_bytes == theirs.peak_bytes
    assert ours.bits in ("equal", "right")
    assert not ours.is_over_budget
    assert ours.peak_bytes is not None
    assert ours.predicted_bytes == pytest.approx(ours.peak_bytes, rel=0.02)
