"""What a bug report says: ``show_versions``, ``remat --version``, ``remat doctor``."""

from __future__ import annotations

import io
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from planner import show_versions
from planner.cli import doctor
from planner.cli.app import app
from planner.versions import NEEDED

ROOT = Path(__file__).parent.parent.parent


def test_versions_of_what_is_needed_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Each dependency stands in a line with its installed version."""
    show_versions()
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [[name, version(name)] for name in NEEDED] == said[: len(NEEDED)]


def test_every_dependency_is_named() -> None:
    """The list holds this package and what pyproject.toml says it cannot do without."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {requirement.split(">=")[0] for requirement in project["dependencies"]}
    assert set(NEEDED) == needed | {project["name"]}


def test_versions_go_where_they_are_wanted() -> None:
    """``file=`` takes them, PyTorch's threads among them."""
    file = io.StringIO()
    show_versions(file)
    assert f"torch threads      {torch.get_num_threads()}\n" in file.getvalue()


def test_the_command_says_its_version() -> None:
    """``remat --version`` is a line with the package's version."""
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"remat-planner {version('remat-planner')}\n")


def test_doctor_names_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that raises is told with its error, the others go on, and the exit status is 4."""

    def breaks() -> str:
        raise OSError("no such library")

    monkeypatch.setattr(doctor, "CHECKS", {"first": breaks, "second": lambda: "fine"})
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 4
    assert "FAILED  first: OSError: no such library\n" in done.stdout
    assert "ok      second: fine\n" in done.stdout
    assert "1 of 2 checks failed: first" in done.stderr


def test_a_planned_step_is_checked() -> None:
    """The check plans a step below its peak and compares its numbers."""
    assert "loss and gradients equal" in doctor.CHECKS["planned step"]()


def test_other_numbers_fail_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with another loss is not called equal."""
    losses = iter((1.0, 2.0))
    monkeypatch.setattr(doctor, "_gradients", lambda *_: [torch.tensor(next(losses))])
    with pytest.raises(RuntimeError, match="loss and gradients differ"):
        doctor.CHECKS["planned step"]()


@pytest.mark.slow
def test_doctor_finds_nothing_here() -> None:
    """Where the tests run, every check passes."""
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\nok ") == len(doctor.CHECKS)
