"""``remat frontier``: a step at many budgets from the shell."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from planner import Plan
from planner.cli.app import app
from tests.planner.cli.small_training import TARGET

QUICK = ("--time-limit-s=1",)


def test_it_plans_and_writes_each_budget(tmp_path: Path) -> None:
    """As many points as are asked for, less time for more memory, and a plan file for each."""
    folder = tmp_path / "plans"
    done = CliRunner().invoke(
        app, ["frontier", TARGET, "--budgets=3", *QUICK, f"--out={folder}", "--json"]
    )
    assert done.exit_code == 0, done.output
    points = json.loads(done.stdout)["points"]
    assert len(points) == 3
    steps = [point["step_us"] for point in points]
    assert steps == sorted(steps, reverse=True)
    assert points[-1]["overhead"] == 0
    for point in points:
        plan = Plan.load(folder / f"plan_{point['budget_bytes']}.json")
        assert plan.predicted_peak_bytes == point["peak_bytes"]
    assert done.stderr.count("written to ") == 3


def test_budgets_that_are_named() -> None:
    """Shares and bytes, in a table from the lowest up."""
    done = CliRunner().invoke(app, ["frontier", TARGET, "--budgets=90%, 1MB", *QUICK])
    assert done.exit_code == 0, done.output
    assert "at 2 budgets" in done.stdout
    assert "1 MB" in done.stdout.splitlines()[-2]


def test_a_large_number_is_bytes() -> None:
    """Nobody asks for a million plans."""
    done = CliRunner().invoke(app, ["frontier", TARGET, "--budgets=1000000", *QUICK])
    assert done.exit_code == 0, done.output
    assert "at 1 budget for" in done.stdout
    assert "1 MB" in done.stdout


def test_nothing_fits() -> None:
    """Exit status 3, and the table says what is known to work."""
    done = CliRunner().invoke(app, ["frontier", TARGET, "--budgets=1kB", *QUICK])
    assert done.exit_code == 3
    assert "no plan; the least known to work is" in done.stdout
    assert "nothing is known to fit any of these budgets" in done.stderr


def test_wrong_budgets_and_folders(tmp_path: Path) -> None:
    """One line says what is wrong, before anything is planned."""
    file = tmp_path / "file"
    file.write_text("")
    for option, words in (
        ("--budgets=1", "a number from 2 on"),
        ("--budgets=many", "many"),
        (f"--out={file}", "--out is a folder, and"),
    ):
        done = CliRunner().invoke(app, ["frontier", TARGET, option])
        assert done.exit_code == 1
        assert words in done.stderr
        assert "Traceback" not in done.output
