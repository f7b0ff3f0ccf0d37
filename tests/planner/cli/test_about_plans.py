"""The commands ``explain``, ``validate`` and ``export``."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from planner import Plan
from planner.cli.app import app

from .small_training import HEADS, TARGET, build


def test_explain(plan_file: Path) -> None:
    """The peak, what runs again, and what more memory buys."""
    done = CliRunner().invoke(app, ["explain", str(plan_file), "--more=2kB", "--lines=3"])
    assert done.exit_code == 0, done.output
    peak, again, more = done.stdout.split("\n\n")
    assert peak.startswith("Peak of ")
    assert len(peak.splitlines()) == 1 + 2 * 3 + 1
    assert again.startswith("Recomputes ")
    assert more.startswith("2 kB more would save ")


def test_explain_refuses_what_is_no_amount(plan_file: Path) -> None:
    """The message says how to write one."""
    done = CliRunner().invoke(app, ["explain", str(plan_file), "--more=lots"])
    assert done.exit_code == 1
    assert "more='100MB', or 0 for none" in done.stderr


@pytest.mark.slow
def test_validate(plan_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real steps keep the budget and the bits; where one of them does not, the status is 4."""
    arguments = ["validate", str(plan_file), TARGET, "--repeats=0"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["within_budget"], said["bits"]) == (True, "equal")
    found = Plan.load(plan_file).validate(*build()[:2], loss_fn=build()[2], repeats=0)
    over = replace(found, budget_bytes=found.budget_bytes // 2)
    other = replace(found, bits="different", first_difference="the loss")
    for broken, word in ((over, "OVER BUDGET"), (other, "OTHER BITS")):
        monkeypatch.setattr(Plan, "validate", lambda *_, broken=broken, **__: broken)
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 4
        assert done.stdout.startswith(word)


def test_validate_of_another_model(plan_file: Path) -> None:
    """It is refused in a line."""
    done = CliRunner().invoke(app, ["validate", str(plan_file), HEADS])
    assert done.exit_code == 1
    assert done.stderr.startswith("remat: ")
    assert "Traceback" not in done.output


def test_export(plan_file: Path, tmp_path: Path) -> None:
    """Text with the code, which ``--out`` writes alone."""
    out = tmp_path / "code.py"
    done = CliRunner().invoke(app, ["export", str(plan_file), "--to=transformers", f"--out={out}"])
    found = Plan.load(plan_file).export("transformers")
    assert done.exit_code == (0 if found.fits else 3)
    assert done.stdout == f"{found}\nwritten to {out}\n"
    assert out.read_text() == found.code + "\n"


def test_export_to_an_unknown_tool(plan_file: Path) -> None:
    """The message has the nearest name and all of them."""
    done = CliRunner().invoke(app, ["export", str(plan_file), "--to=megatrom"])
    assert done.exit_code == 1
    assert "unknown tool 'megatrom'; did you mean 'megatron'?" in done.stderr


def test_export_where_nothing_fits(small_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit status 3, and the least budget that it needs."""
    tight = replace(small_plan, budget_bytes=small_plan.graph.resident_bytes)
    monkeypatch.setattr("planner.cli.export.load_plan", lambda path: tight)
    done = CliRunner().invoke(app, ["export", "plan.json", "--to=transformers"])
    found = tight.export("transformers")
    assert not found.fits
    assert done.exit_code == 3
    assert f"({found.least_budget_bytes} bytes)" in done.stdout
