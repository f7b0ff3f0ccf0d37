"""What the how-to pages say to type runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from planner import Comparison
from solvers import SolveResult, SolveStatus
from solvers.strategies import StrategyOutcome

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "how-to"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the Python blocks of a page, one after another, and gives what they define."""
    monkeypatch.chdir(ROOT)

    def run(name: str, num_blocks: int | None = None) -> dict[str, Any]:
        text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
        found: dict[str, Any] = {}
        blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
        for i, block in enumerate(blocks[:num_blocks]):
            exec(compile(block, f"{name}.md, block {i + 1}", "exec"), found)
        return found

    return run


def test_each_page_is_tried() -> None:
    """A page without a test here is not said to work.

    Training with a trainer or in a pipeline has tests of its own.
    """
    pages = {path.stem for path in FOLDER.glob("*.md")}
    assert {page for page in pages if not page.startswith("train-")} == {
        "add-a-strategy",
        "add-a-solver",
        "add-a-device",
        "add-a-peer",
        "compile-within-a-budget",
    }


def test_add_a_strategy(run: Any) -> None:
    """The page's strategy finds a schedule that fits."""
    outcome: StrategyOutcome = run("add-a-strategy", num_blocks=3)["outcome"]
    assert outcome.fits
    assert outcome.num_candidates > 1


@pytest.mark.slow
def test_compare_a_strategy(run: Any) -> None:
    """And it stands in the table beside the others."""
    table: Comparison = run("add-a-strategy")["table"]
    assert "save_small" in {row.strategy for row in table.rows}


def test_add_a_solver(run: Any) -> None:
    """The page's solver finds a schedule within the budget, and no proof."""
    result: SolveResult = run("add-a-solver")["result"]
    assert result.solver == "drop_largest"
    assert result.status is SolveStatus.FEASIBLE


def test_add_a_device(run: Any) -> None:
    """A card that is in no table is planned for."""
    found = run("add-a-device")
    assert found["plan"].costs.device == "My card, 48 GB"
    assert found["faster_attention"].efficiency["attention"] == 0.6


@pytest.mark.slow
def test_add_a_peer(run: Any) -> None:
    """The page's peer is run and has eager's bits."""
    table: Comparison = run("add-a-peer")["table"]
    (row,) = (row for row in table.rows if row.kind == "peer")
    assert row.measured is not None, row
    assert row.measured.bits == "equal"


# The page has `pass` where training goes, within install().
nothing_trained = pytest.mark.filterwarnings("ignore:nothing was planned:planner.PlanWarning")


@nothing_trained
def test_compile_within_a_budget(run: Any) -> None:
    """The page's budget is below what the step takes, and kept."""
    (plan,) = run("compile-within-a-budget", num_blocks=3)["plans"]
    assert plan.predicted_peak_bytes <= 2_050_000 < plan.unplanned_peak_bytes


@pytest.mark.slow
@nothing_trained
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # Dynamo reads it
)
def test_compare_compiled_steps(run: Any) -> None:
    """The page's table has compiled steps, ours with right gradients."""
    table: Comparison = run("compile-within-a-budget")["table"]
    assert table.compiled is not None
    kinds = [row.kind for row in table.compiled.rows]
    assert kinds == ["unbudgeted", "pytorch", "remat"]
    assert table.compiled.rows[-1].bits == "equal"
