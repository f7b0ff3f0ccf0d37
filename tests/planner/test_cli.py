"""The command ``remat``."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from planner.cli import app


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module beside the current folder, as a user has it."""
    (tmp_path / "my_training.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def build():\n"
        "    layers = [m for _ in range(4) for m in (nn.Linear(32, 32), nn.Tanh())]\n"
        "    return nn.Sequential(*layers), torch.zeros(256, 32), torch.sum\n"
        "def wrong():\n"
        "    return 1\n"
    )
    monkeypatch.chdir(tmp_path)
    return "my_training:build"


def test_plan_and_show(target: str, tmp_path: Path) -> None:
    """`remat plan` prints and writes a plan that `remat show` reads."""
    planned = CliRunner().invoke(
        app,
        ["plan", target, "--budget=1GB", "--optimizer=adamw", "--reorder", "--out=plan.json"],
    )
    assert planned.exit_code == 0, planned.output
    assert "Plan for 1 GB" in planned.output
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["budget_bytes"] == 10**9
    assert written["solver"]["reorder"]
    shown = CliRunner().invoke(app, ["show", "plan.json"])
    assert shown.exit_code == 0
    assert "AdamW state and step" in shown.output


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["plan", "my_training:build", "--budget", "1kB"], "No schedule fits"),
        (["plan", "my_training:build", "--budget", "many"], "not an amount of memory"),
        (["plan", "my_training:wrong", "--budget", "1GB"], "must return"),
        (["plan", "my_training:absent", "--budget", "1GB"], "absent"),
        (["plan", "no_such_module:build", "--budget", "1GB"], "no_such_module"),
        (["plan", "my_training", "--budget", "1GB"], "module:function"),
        (["show", "absent.json"], "absent.json"),
        (["show", "my_training.py"], "no JSON"),
    ],
)
def test_errors_are_one_line(target: str, arguments: list[str], word: str) -> None:
    """What goes wrong is said in a line on stderr, with exit status 1 and no traceback."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert word in result.stderr
    assert "Traceback" not in result.output


def test_schema_is_printed() -> None:
    """`remat schema` prints the published JSON Schema."""
    printed = json.loads(CliRunner().invoke(app, ["schema"]).stdout)
    assert printed["$schema"].endswith("2020-12/schema")
