"""What commands print where, and their exit statuses."""

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import planner
from planner.cli.answers import EPILOG, Answer, ExitCode, command
from planner.cli.app import COMMANDS, app

from .small_training import HEADS, TARGET, build

ROOT = Path(__file__).parents[3]


@pytest.fixture
def rich_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a terminal, where progress is shown."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")


def answered(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of a command; stdout must hold nothing else."""
    done = CliRunner().invoke(app, [*arguments, "--json"])
    return done.exit_code, json.loads(done.stdout)


def test_a_plan_as_json(tmp_path: Path) -> None:
    """The file's own figures without its graph; what was written is said on stderr."""
    out = tmp_path / "plan.json"
    done = CliRunner().invoke(app, ["plan", TARGET, "--budget=1GB", f"--out={out}", "--json"])
    said, written = json.loads(done.stdout), json.loads(out.read_text())
    assert said["prediction"] == written["prediction"]
    assert "operators" not in said
    assert done.stderr == f"written to {out}\n"


def test_a_plan_file_as_json(plan_file: Path) -> None:
    """Each command about a plan file answers in JSON, a value for each field."""
    plan = planner.Plan.load(plan_file)
    shown = answered("show", str(plan_file))
    assert (shown[0], shown[1]["prediction"]["peak_bytes"]) == (0, plan.predicted_peak_bytes)
    explained = answered("explain", str(plan_file), "--more=0")
    assert explained == (0, json.loads(json.dumps(plan.explain(more=0).to_dict())))
    status, exported = answered("export", str(plan_file), "--to=megatron")
    assert exported == json.loads(json.dumps(plan.export("megatron").to_dict()))
    assert (status == 0) == exported["fits"]


def test_doctor_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions and checks, and 4 where one failed."""

    def breaks() -> str:
        raise OSError("no such library")

    monkeypatch.setattr("planner.cli.doctor.CHECKS", {"first": breaks})
    status, said = answered("doctor")
    assert status == ExitCode.NOT_AS_PROMISED
    assert said["versions"]["torch"] == version("torch")
    assert said["checks"] == [
        {"name": "first", "passed": False, "found": "OSError: no such library"}
    ]


def test_estimate_and_schema_as_json() -> None:
    """Figures of each row; the schema is JSON anyway."""
    status, said = answered("estimate", TARGET, "--batch=2,8", "--budget=1GB")
    assert (status, [row["batch"] for row in said["rows"]]) == (0, [2, 8])
    assert answered("schema") == (0, json.loads(CliRunner().invoke(app, ["schema"]).stdout))


@pytest.mark.slow
def test_a_comparison_as_json(tmp_path: Path) -> None:
    """It is the file that ``Comparison.load`` reads."""
    status, said = answered(
        "compare", TARGET, "--budgets=90%", "--strategies=none,uniform_sqrt", "--no-measure"
    )
    (tmp_path / "table.json").write_text(json.dumps(said))
    found = planner.Comparison.load(tmp_path / "table.json")
    assert status == 0
    assert {row.strategy for row in found.rows} == {"none", "uniform_sqrt"}


@pytest.mark.parametrize("command", ["plan", "max-batch"])
def test_nothing_fits(command: str) -> None:
    """Exit status 3, with the least budget that would; a line on stderr, no traceback."""
    status, said = answered(command, HEADS, "--budget=9kB", "--time-limit-s=1")
    assert status == ExitCode.NOTHING_FITS
    error = said["error"]
    assert error["exit_status"] == 3
    assert error["budget_bytes"] == 9_000 < error["lower_bound_bytes"]
    assert error["lower_bound_bytes"] <= error["min_budget_bytes"]
    done = CliRunner().invoke(app, [command, HEADS, "--budget=9kB", "--time-limit-s=1"])
    assert (done.exit_code, done.stdout) == (ExitCode.NOTHING_FITS, "")
    assert "Traceback" not in done.stderr


def test_an_error_as_json() -> None:
    """What failed is in an object, and on stderr as without --json."""
    done = CliRunner().invoke(app, ["show", "absent.json", "--json"])
    assert done.exit_code == ExitCode.FAILED
    message = json.loads(done.stdout)["error"]["message"]
    assert done.stderr == f"remat: {message}\n"


def test_json_has_finite_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """``NaN`` would be no JSON."""

    @command
    def strange(as_json: bool) -> Answer:
        return Answer(text="", data={"rows": [{"ratio": math.nan, "count": 1}]})

    strange(as_json=True)
    assert json.loads(capsys.readouterr().out) == {"rows": [{"ratio": None, "count": 1}]}


def test_a_wrong_command_line() -> None:
    """Exit status 2 is the parser's own."""
    assert CliRunner().invoke(app, ["plan", TARGET]).exit_code == ExitCode.USAGE


@pytest.mark.usefixtures("rich_stderr")
def test_progress_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    """With bars shown, stdout has the answer alone."""
    model, sample_input, loss_fn = build()
    planner.optimize(
        model, sample_input, budget="90%", loss_fn=loss_fn, time_limit_s=1, progress=True
    )
    planner.estimate(model, sample_input, batch_sizes=(8,), loss_fn=loss_fn, progress=True)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_says_its_exit_statuses(name: str) -> None:
    """``--help`` names both."""
    shown = " ".join(CliRunner().invoke(app, [name, "--help"]).stdout.split())
    assert "--json" in shown
    assert "3 nothing fits" in shown


def test_the_page_has_every_command_and_exit_status() -> None:
    """``docs/command-line.md`` lists them."""
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"`remat {name}" not in page] == []
    assert [code for code in ExitCode if f"| {int(code)} |" not in page] == []
    assert all(f"{int(code)} " in EPILOG for code in ExitCode)
