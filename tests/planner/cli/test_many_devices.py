"""``remat estimate-mesh`` and ``remat pipeline``: many devices from the shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from planner import Plan
from planner.cli.app import app

LAYER_BYTES = 4 * (32 * 64 + 64 + 64 * 32 + 32)
"""Parameters of one layer."""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer() for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def build() -> Any:
    """A model and a batch by name."""
    return Net(), {"x": torch.zeros(64, 32)}


def build_tuple() -> Any:
    """The batch without its name."""
    return Net(), torch.zeros(64, 32)


def build_stage(stage: Any) -> Any:
    """A stage of a pipeline of layers."""
    sample = torch.zeros(64, 32, requires_grad=stage.index > 0)
    return nn.Sequential(*(Layer() for _ in range(stage.first, stage.end))), sample


def wrong_stage(stage: Any) -> Any:
    """Forgets the sample."""
    return nn.Sequential(Layer())


def no_stage() -> Any:
    """Asks for no stage."""
    return build()


def run(command: str, function: str, *options: str) -> Any:
    return CliRunner().invoke(app, [command, f"{__name__}:{function}", *options])


def test_a_mesh() -> None:
    """Each of two data-parallel ranks has all parameters, and buckets as large."""
    done = run("estimate-mesh", "build", "--mesh=dp=2", "--bandwidth=dp=20", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["mesh"] == {"dp": 2, "tp": 1, "pp": 1}
    (stage,) = said["stages"]
    categories = dict(stage["memory"]["by_category"])
    assert categories["parameter"] == categories["bucket"] == 2 * LAYER_BYTES
    assert [each["axis"] for each in stage["traffic"]] == ["dp"]


def test_a_mesh_in_words() -> None:
    """Without a bandwidth its table names the option."""
    done = run("estimate-mesh", "build", "--mesh=dp=2")
    assert done.exit_code == 0, done.output
    assert "dp 2 × tp 1 × pp 1" in done.stdout
    assert "no bandwidth is known: give --bandwidth" in done.stdout


def test_a_mesh_that_does_not_fit() -> None:
    """Exit status 3."""
    done = run("estimate-mesh", "build", "--mesh=dp=2", "--budget=10kB", "--time-limit-s=1")
    assert done.exit_code == 3
    assert "not every stage is known to fit" in done.stderr


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        ("build", ["--mesh=64"], "--mesh takes axes and numbers"),
        ("build", ["--mesh=dp=2,dp=4"], "names the axis 'dp' twice"),
        ("build", ["--mesh=dp=two"], "--mesh takes a whole number of ranks"),
        ("build", ["--mesh=dp=0"], "axis 'dp' has a whole number of ranks"),
        ("build", ["--mesh=ep=2"], "the axes that are estimated are dp, tp, pp"),
        ("build", ["--mesh=dp=2", "--bandwidth=dp=fast"], "--bandwidth takes GB/s"),
        ("build", ["--mesh=pp=2"], "--num-microbatches is needed"),
        ("build", ["--mesh=dp=2", "--budget=60%"], "a share of no one peak"),
        ("build", ["--mesh=dp=2", "--data-parallel=fsdp2"], "by --blocks"),
        ("build_tuple", ["--mesh=dp=2"], "sample_input is a dict of keyword arguments"),
    ],
)
def test_a_wrong_mesh(function: str, options: list[str], words: str) -> None:
    """One line on stderr says what is wrong, in words of the command line."""
    done = run("estimate-mesh", function, *options)
    assert done.exit_code == 1
    assert words in done.stderr
    assert "Traceback" not in done.output


PIPELINE = ("--num-layers=3", "--num-stages=2", "--num-microbatches=2", "--time-limit-s=1")


def test_a_pipeline(tmp_path: Path) -> None:
    """All layers have a stage; each stage's plan counts its micro-batches in flight."""
    folder = tmp_path / "stages"
    options = (*PIPELINE, "--budget=1MB", "--alike", f"--out={folder}", "--json")
    done = run("pipeline", "build_stage", *options)
    assert done.exit_code == 0, done.output
    stages = json.loads(done.stdout)["stages"]
    assert [stage["calls_in_flight"] for stage in stages] == [2, 1]
    assert (stages[0]["first_layer"], stages[-1]["end_layer"]) == (0, 3)
    assert stages[0]["end_layer"] == stages[1]["first_layer"]
    for stage in stages:
        plan = Plan.load(folder / f"stage_{stage['stage']}.json")
        assert plan.holds.concurrent_calls == stage["calls_in_flight"]
        assert plan.holds.grads == "accumulated"
        assert plan.predicted_peak_bytes == stage["peak_bytes"] <= 10**6


@pytest.mark.slow
def test_a_pipeline_that_does_not_fit() -> None:
    """Exit status 3, with the least budget known to work."""
    fewer = ("--num-layers=2", *PIPELINE[1:])
    done = run("pipeline", "build_stage", *fewer, "--budget=20kB")
    assert done.exit_code == 3
    assert "The least budget known to work" in done.stderr


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        ("build_stage", [*PIPELINE, "--budget=60%"], "a share of no one peak"),
        ("build_stage", [*PIPELINE, "--budget=1MB", "--schedule=zb"], "gpipe"),
        ("wrong_stage", [*PIPELINE, "--budget=1MB"], "must return (model, sample_input)"),
        ("no_stage", [*PIPELINE, "--budget=1MB"], "too many positional arguments; give module:"),
        ("LAYER_BYTES", [*PIPELINE, "--budget=1MB"], "which cannot be called; give module:"),
    ],
)
def test_a_wrong_pipeline(function: str, options: list[str], words: str) -> None:
    """One line on stderr says what is wrong."""
    done = run("pipeline", function, *options)
    assert done.exit_code == 1
    assert words in done.stderr
    assert "Traceback" not in done.output
