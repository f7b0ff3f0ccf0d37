"""The command ``remat compare``."""

import csv
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from planner import Comparison
from planner.cli.app import app


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module beside the current folder, with strategies of its own."""
    (tmp_path / "my_comparison.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from solvers.schedule import Schedule\n"
        "def build():\n"
        "    layers = [m for _ in range(4) for m in (nn.Linear(32, 32), nn.Tanh())]\n"
        "    return nn.Sequential(*layers), torch.zeros(256, 32), torch.sum\n"
        "def keep(graph, budget_bytes):\n"
        "    return Schedule.keep_all(graph)\n"
        "def broken(graph, budget_bytes):\n"
        "    return graph.no_such_thing\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    return "my_comparison:build"


@pytest.mark.slow
def test_compare(target: str, tmp_path: Path) -> None:
    """`remat compare` prints, writes and draws; what is broken is told in its row."""
    done = CliRunner().invoke(
        app,
        [
            "compare",
            target,
            "--budgets=80%, 0.7,500kB,uniform_sqrt",
            "--strategies=uniform_sqrt,auto",
            "--strategy-from=my_comparison:keep",
            "--strategy-from=my_comparison:broken",
            "--peers=checkpoint_per_block",
            "--optimizer=adamw",
            "--repeats=1",
            "--time-limit-s=1",
            "--out=table.json",
            "--out=table.csv",
            "--plots=figures",
        ],
    )
    assert done.exit_code == 0, done.output
    assert "AttributeError" in done.stdout
    found = Comparison.load(tmp_path / "table.json")
    assert [bound.budget for bound in found.bounds] == ["80%", "70%", "500kB", "uniform_sqrt"]
    assert found.row("auto", "80%").measured is not None
    assert found.row("keep").measured is not None
    assert found.row("checkpoint_per_block").kind == "peer"
    with (tmp_path / "table.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(found.rows)
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn >= {"pareto.png", "predicted.png"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_steps(target: str, tmp_path: Path) -> None:
    """`--compiled-ratios` adds compiled rows to table, file and figures."""
    done = CliRunner().invoke(
        app,
        [
            "compare",
            target,
            "--budgets=80%",
            "--strategies=auto",
            "--compiled-ratios=0.9, 0.5",
            "--lower=aot_eager",
            "--repeats=1",
            "--time-limit-s=1",
            "--out=table.json",
            "--plots=figures",
        ],
    )
    assert done.exit_code == 0, done.output
    assert "compiled steps, by aot_eager" in done.stdout
    assert "ours, at the peak of 0.5" in done.stdout
    found = Comparison.load(tmp_path / "table.json").compiled
    assert found is not None
    assert [row.ratio for row in found.rows] == [None, 0.9, 0.5, 0.9, 0.5]
    assert (tmp_path / "figures" / "compiled.png").exists()


def test_prediction_alone(target: str) -> None:
    """With --no-measure nothing runs."""
    done = CliRunner().invoke(
        app, ["compare", target, "--budgets=0.8", "--strategies=none,auto", "--no-measure"]
    )
    assert done.exit_code == 0, done.output
    assert "measured" not in done.stdout


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--budgets=lots"], "not a budget: 'lots'"),
        (["--budgets="], "not a budget"),
        (["--budgets=12"], "write '12GB'"),
        (["--strategies=chen"], "unknown strategy 'chen'"),
        (["--peers=magic"], "unknown peer 'magic'"),
        (["--out=table.txt"], "--out is a .json or .csv file"),
        (["--out=absent/table.json"], "no folder"),
        (["--strategy-from=my_comparison:number"], "neither a function nor a strategy"),
        (["--strategy-from=my_comparison:absent"], "absent"),
        (["--strategy-from=my_comparison"], "module:function"),
        (["--autocast=int8"], "--autocast is one of"),
        (["--device=abacus", "--no-measure"], "known are cpu"),
        (["--device=h100", "--measure"], "measure=True, but"),
        (["--repeats=-1"], "repeats must be"),
        (["--compiled-ratios=half"], "--compiled-ratios are numbers from 0 to 1"),
        (["--compiled-ratios=2"], "ratio from 0 to 1, not 2.0"),
        (["--compiled-ratios=0.5", "--no-measure"], "compiled_ratios have measured figures only"),
        (["--compiled-ratios=0.5", "--lower=nvcc"], "lower is 'inductor' or 'aot_eager'"),
    ],
)
def test_errors_are_one_line(target: str, options: list[str], word: str) -> None:
    """What goes wrong is said on stderr, with exit status 1 and no traceback."""
    result = CliRunner().invoke(app, ["compare", target, *options])
    assert result.exit_code == 1
    assert word in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("folder", ["taken", "taken/figures"])
def test_a_folder_that_cannot_be_is_told_at_the_start(
    target: str, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """--plots that names a file is refused before anything is solved."""

    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("compared before")

    Path("taken").write_text("")
    monkeypatch.setattr("planner.cli.compare.compare", too_late)
    result = CliRunner().invoke(app, ["compare", target, f"--plots={folder}"])
    assert result.exit_code == 1
    assert "--plots is a folder" in result.stderr


def test_files_are_written_whatever_stdout_is(target: str, tmp_path: Path) -> None:
    """A stdout that cannot say everything costs no work; nor does a file that fails."""
    options = ["--budgets=0.8", "--strategies=none", "--no-measure", "--name=Größe"]
    (tmp_path / "table.json").write_text("")
    done = CliRunner(charset="ascii").invoke(
        app, ["compare", target, *options, "--out=table.json", "--out=table.csv"]
    )
    assert done.exit_code == 0, done.output
    assert "Gr??e" in done.stdout
    assert Comparison.load(tmp_path / "table.json").model == "Größe"


def test_a_file_that_fails_costs_no_other(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is printed and the other file written, and the failure is told."""
    save = Comparison.save

    def full(self: Comparison, path: Path) -> None:
        if path.suffix == ".json":
            raise OSError("no space left")
        save(self, path)

    monkeypatch.setattr(Comparison, "save", full)
    options = ["--budgets=0.8", "--strategies=none", "--no-measure"]
    done = CliRunner().invoke(
        app, ["compare", target, *options, "--out=table.json", "--out=table.csv"]
    )
    assert done.exit_code == 1
    assert "table.json: no space left" in done.stderr
    assert "budget 80%" in done.stdout
    assert (tmp_path / "table.csv").exists()


def test_a_missing_matplotlib_is_told_at_the_start(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --plots nothing is captured, solved or run that could not be drawn."""

    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("compared before")

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("planner.cli.compare.compare", too_late)
    result = CliRunner().invoke(app, ["compare", target, "--plots=figures"])
    assert result.exit_code == 1
    assert "--plots: figures need matplotlib" in result.stderr
    assert not Path("figures").exists()
