"""The command ``remat``."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from planner.cli.app import app


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
        "def takes(name):\n"
        "    return build()\n"
        "def misnamed():\n"
        "    return build()[0], {'tokens': torch.zeros(256, 32)}, torch.sum\n"
        "def number():\n"
        "    return build()[0], 256, torch.sum\n"
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
        (["plan", "my_training:build", "--budget", "many"], "not an amount of memory"),
        (["plan", "my_training:wrong", "--budget", "1GB"], "must return"),
        (["plan", "my_training:absent", "--budget", "1GB"], "absent"),
        (["plan", "my_training:takes", "--budget", "1GB"], "the function takes no arguments"),
        (["plan", "my_training:misnamed", "--budget", "1GB"], "the sample does not fit the call"),
        (["max-batch", "my_training:number", "--budget", "1GB"], "a dict of keyword arguments"),
        (["plan", "my_training:build", "--budget=1GB", "--out=no/plan.json"], "there is no folder"),
        (["max-batch", "my_training:build", "--budget=1GB", "--out=."], "--out is a file, and"),
        (["plan", "no_such_module:build", "--budget", "1GB"], "no_such_module"),
        (["plan", "my_training", "--budget", "1GB"], "module:function"),
        (["plan", "my_training:build", "--budget=1GB", "--device=abacus"], "known are cpu"),
        (["plan", "my_training:build", "--budget=1GB", "--autocast=int8"], "--autocast is one of"),
        (["plan", "my_training:build", "--budget=1GB", "--cost-model=guess"], "cost_model is"),
        (["plan", "my_training:build", "--budget=1GB", "--headroom=5"], "headroom is a fraction"),
        (["plan", "my_training:build", "--budget=1GB", "--headroom=lots"], "lots"),
        (["plan", "my_training:build", "--budget=1GB", "--outputs=lost"], "outputs is 'held' or"),
        (["plan", "my_training:build", "--budget=1GB", "--resident=lots"], "--resident='lots'"),
        (
            ["plan", "my_training:build", "--budget=1GB", "--blocks=auto,0"],
            "'auto' chooses all blocks by itself and cannot be joined with '0'",
        ),
        (["compare", "my_training:build", "--grads=some"], "grads is 'none' or"),
        (["estimate", "my_training:build", "--batch=1,x"], "--batch takes whole numbers"),
        (["estimate", "my_training:build", "--batch="], "--batch takes whole numbers"),
        (["estimate", "my_training:build", "--sequence=0"], "--sequence takes whole numbers"),
        (["estimate", "my_training:build", "--device=abacus"], "known are cpu"),
        (["estimate", "my_training:build", "--autocast=int8"], "--autocast is one of"),
        (["estimate", "my_training:build", "--budget=many"], "not an amount of memory"),
        (["estimate", "my_training:build", "--sequence=9"], "at any of these shapes"),
        (["max-batch", "my_training:build"], "give budget, budget_gb"),
        (["max-batch", "my_training:build", "--budget=1GB", "--largest=0"], "largest must be"),
        (["show", "absent.json"], "absent.json"),
        (["show", "my_training.py"], "not JSON"),
    ],
)
def test_errors_are_one_line(target: str, arguments: list[str], word: str) -> None:
    """What goes wrong is said in a line on stderr, with exit status 1 and no traceback."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert word in result.stderr
    assert "Traceback" not in result.output


def test_what_the_loop_holds_is_in_the_plan(target: str, tmp_path: Path) -> None:
    """The words go into the file, from which they are shown."""
    words = ["--outputs=released", "--grads=accumulated", "--resident=100kB"]
    planned = CliRunner().invoke(app, ["plan", target, "--budget=1GB", *words, "--out=plan.json"])
    assert planned.exit_code == 0, planned.output
    assert json.loads((tmp_path / "plan.json").read_text())["loop_holds"] == {
        "outputs": "released",
        "grads": "accumulated",
        "resident_bytes": 100_000,
    }
    shown = CliRunner().invoke(app, ["show", "plan.json"])
    assert "100 kB of the caller's own" in shown.output


def test_estimate(target: str) -> None:
    """`remat estimate` prints a table."""
    done = CliRunner().invoke(
        app,
        [
            "estimate",
            target,
            "--batch=1, 64",
            "--optimizer=adamw",
            "--budget=1MB",
        ],
    )
    assert done.exit_code == 0, done.output
    assert "fits" in done.stdout


def test_estimate_for_another_device(target: str) -> None:
    """A device that is not here has its own memory for a budget."""
    done = CliRunner().invoke(
        app, ["estimate", target, "--batch=8", "--device=h100", "--autocast=bfloat16"]
    )
    assert done.exit_code == 0, done.output
    assert "H100" in done.stdout
    assert "autocast bfloat16" in done.stdout
    assert "of it left as headroom" in done.stdout


def test_max_batch(target: str) -> None:
    """`remat max-batch` prints both batches and writes the plan of the larger one."""
    done = CliRunner().invoke(
        app,
        [
            "max-batch",
            target,
            "--budget=150kB",
            "--headroom=10%",
            "--out=plan.json",
            "--json",
        ],
    )
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert figures["headroom_bytes"] == 15_000
    assert 0 < figures["batch_without_plan"] < figures["batch"]
    assert done.stderr == "written to plan.json\n"
    shown = CliRunner().invoke(app, ["show", "plan.json"])
    assert shown.exit_code == 0
    assert "Plan for 150 kB" in shown.stdout


def test_a_budget_as_a_share(target: str) -> None:
    """`--budget 90%` is a share of the peak without a plan."""
    planned = CliRunner().invoke(app, ["plan", target, "--budget=90%", "--time-limit-s=2"])
    assert planned.exit_code == 0, planned.output
    assert "(90% of the peak without a plan)" in planned.stdout


def test_options_of_plan(target: str) -> None:
    """Device, autocast, cost model and headroom are those of optimize."""
    planned = CliRunner().invoke(
        app,
        [
            "plan",
            target,
            "--budget=1GB",
            "--device=a100",
            "--autocast=bf16",
            "--cost-model=roofline",
            "--headroom=0.05",
        ],
    )
    assert planned.exit_code == 0, planned.output
    assert "A100" in planned.stdout
    assert "50 MB" in planned.stdout


def test_schema_is_printed() -> None:
    """`remat schema` prints the published JSON Schema."""
    printed = json.loads(CliRunner().invoke(app, ["schema"]).stdout)
    assert printed["$schema"].endswith("2020-12/schema")


@pytest.mark.parametrize("target", [":x", ".:x", "..:x", "no.such:x"])
def test_a_module_that_cannot_be_named_is_said(target: str) -> None:
    """In one line, without a traceback."""
    result = CliRunner().invoke(app, ["plan", target, "--budget", "1"])
    assert result.exit_code == 1
    assert result.stderr.startswith("remat: ")


def test_show_refuses_a_pipe_and_shows_control_characters(tmp_path: Path) -> None:
    """A pipe is not waited for; what a file says is not obeyed by the terminal."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "plan.json").write_text('{"schema_version": "\\u001b[2J"}')
    for name, said in (("pipe", "not a regular file"), ("plan.json", r"\x1b[2J")):
        result = CliRunner().invoke(app, ["show", str(tmp_path / name)])
        assert result.exit_code == 1
        assert said in result.stderr
        assert "\x1b" not in result.stderr
