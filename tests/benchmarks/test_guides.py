"""The table of what fits where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.guides import SIZES, WAYS, app, tables
from benchmarks.scale import WEIGHTS
from benchmarks.shapes import SHAPES

CELL = {"size": "1.5b", "way": "fp32", "batch": 16, "budget_bytes": 20_000_000_000}


def test_sizes_and_ways_are_known() -> None:
    """Every size is a shape, and every way names numbers that there are."""
    assert {size.model for size in SIZES.values()} <= SHAPES.keys()
    assert {way.numbers for way in WAYS.values()} <= WEIGHTS.keys()


def test_says_what_fits() -> None:
    """Headroom is no room: a peak between budget less headroom and budget does not fit as it is."""
    plan = {
        **CELL,
        "status": "optimal",
        "headroom_bytes": 1_000_000_000,
        "unplanned_bytes": 19_500_000_000,
        "peak_bytes": 18_900_000_000,
        "overhead": 0.05,
        "lower_bound_us": 1040.0,
        "unplanned_us": 1000.0,
        "gap": 0.01,
        "solve_s": 2.0,
    }
    line = tables([plan], "a card").splitlines()[6]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:] == ["20", "19.50", "no", "yes", "18.90", "5.00%", "4.00%", "1.000%", "2.0"]


def test_says_why_nothing_fits() -> None:
    """The least budget is in the table, and the reason below it, once for all budgets."""
    none = {
        **CELL,
        "status": "infeasible",
        "unplanned_bytes": 90_000_000_000,
        "min_budget_bytes": 40_500_000_000,
        "optimize_s": 3.0,
        "why": "the optimizer holds it up",
    }
    words = tables([none, none], "a card")
    assert words.count("no: 40.50 GB are needed") == 2
    assert words.count("- 1.5B (GPT-2 XL): the optimizer holds it up") == 1


def test_an_error_is_a_line() -> None:
    """Where a worker failed, its words are in the table, in a line of full length."""
    lines = tables([{**CELL, "error": "worker ended with 1"}], "a card").splitlines()
    assert "worker ended with 1" in lines[6]
    assert lines[6].count("|") == lines[4].count("|")


def test_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    """A wrong size, way or device is named before anything runs."""
    for wrong in (["--size", "7b"], ["--way", "int4"], ["--device", "abacus"]):
        outcome = CliRunner().invoke(app, [*wrong, "--out", str(tmp_path)])
        assert outcome.exit_code == 2


@pytest.mark.slow
def test_leaves_a_table(tmp_path: Path) -> None:
    """Two layers of the smallest size fit into 32 GB as they are, and JSON says so."""
    pytest.importorskip("transformers")
    arguments = ["--size", "125m", "--way", "bf16", "--layers", "2", "--budget-gb", "32"]
    outcome = CliRunner().invoke(
        app,
        [*arguments, "--device", "cpu", "--sequence", "128", "--out", str(tmp_path)],
        catch_exceptions=False,
    )
    assert outcome.exit_code == 0, outcome.output
    (row,) = json.loads((tmp_path / "guides-cpu-128.json").read_text(encoding="utf-8"))["rows"]
    assert row["unplanned_bytes"] <= 32e9
    assert row["overhead"] == 0
    assert "not needed" in outcome.output
