"""A block plan is held to its word by real steps, in Python and from the shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from planner import BlockPlan, PlanError, PlanMismatchError, applied_blocks, optimize
from planner.cli.app import app
from planner.errors import CallMismatchError

from .small_blocks import Layer, Small, batch, small, small_plan

TARGET = f"{__name__}:target"


def target() -> tuple[nn.Module, Any]:
    """What the commands plan."""
    return small(), batch()


class WithoutLoss(Small):
    """Returns logits."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        hidden = self.embed(x)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def test_the_peak_and_the_bits_are_as_promised() -> None:
    """Predicted and measured peaks of both steps are side by side; nothing stays applied."""
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = small_plan().validate(model, batch(), repeats=2)
    assert found.within_budget
    assert found.bits == "equal"
    assert found.peak.measured == found.peak.predicted == small_plan().predicted_peak_bytes
    assert found.unplanned_peak is not None
    assert found.overhead is not None
    assert abs(found.unplanned_peak.error) < 0.001
    assert applied_blocks(model) is None
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_an_applied_plan_stays() -> None:
    """Its count of steps does not see those of the trial."""
    model = small_plan().apply(small())
    small_plan().validate(model, batch(), repeats=0)
    applied = applied_blocks(model)
    assert applied is not None
    assert applied.planned_steps == 0


@pytest.mark.slow
def test_a_plan_from_a_file_needs_its_loss(tmp_path: Path) -> None:
    """The process that planned knows it; a file cannot hold it."""
    torch.manual_seed(0)
    model, (x, wanted) = WithoutLoss().train(), batch()

    def loss_fn(logits: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, wanted)

    plan = optimize(model, x, budget="80%", loss_fn=loss_fn, granularity="blocks", time_limit_s=0.6)
    assert plan.validate(model, x, repeats=0).bits == "equal"
    plan.save(tmp_path / "plan.json")
    loaded = BlockPlan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="made with a loss_fn"):
        loaded.validate(model, x, repeats=0)
    found = loaded.validate(model, x, loss_fn=loss_fn, repeats=0)
    assert found.bits == "equal"
    assert 0 <= plan.predicted_peak_bytes - found.peak.measured <= wanted.element_size()


def test_another_call_and_another_model_are_refused() -> None:
    """The message names what differs; a block by its path."""
    with pytest.raises(CallMismatchError, match=r"input\.x is float32\[32, 8\]"):
        small_plan().validate(small(), batch(32), repeats=0)
    other = small()
    other.layers[1] = Layer(8, 1)
    with pytest.raises(PlanMismatchError, match=r"block 'layers\.1'"):
        small_plan().validate(other, batch(), repeats=0)
    with pytest.raises(ValueError, match="eval mode"):
        small_plan().validate(small().eval(), batch(), repeats=0)


def test_from_the_shell(tmp_path: Path) -> None:
    """``remat plan --blocks``, then ``show``, ``validate`` and ``explain`` of its file."""
    file = tmp_path / "plan.json"

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, list(words))

    made = run(
        "plan", TARGET, "--budget=70%", "--blocks=layers.*", "--time-limit-s=0.6", f"--out={file}"
    )
    assert made.exit_code == 0, made.output
    shown = run("show", str(file))
    assert "blocks    3, with" in made.stdout
    assert shown.stdout in made.stdout
    validated = run("validate", str(file), TARGET, "--repeats=0", "--json")
    assert validated.exit_code == 0, validated.output
    assert json.loads(validated.stdout)["bits"] == "equal"
    assert run("explain", str(file), "--more=0").stdout.startswith("Peak of ")
    refused = run("export", str(file), "--to=transformers")
    assert refused.exit_code == 1
    assert "plan the whole step" in refused.stderr


def test_the_shell_names_a_wrong_pattern() -> None:
    """In a line, with a path that there is."""
    done = CliRunner().invoke(app, ["plan", TARGET, "--budget=70%", "--blocks=layer.*"])
    assert done.exit_code == 1
    assert "no module of this Small is at 'layer.*'" in done.stderr


def test_the_shell_plans_for_one_rank() -> None:
    """``--distributed fsdp2:ranks=2`` with ``--blocks``; without them the line says so."""
    words = ["plan", TARGET, "--budget=80%", "--distributed=fsdp2:ranks=2", "--time-limit-s=0.6"]
    made = CliRunner().invoke(app, [*words, "--blocks=layers.*"])
    assert made.exit_code == 0, made.output
    assert "one rank's part of fsdp2:ranks=2" in made.stdout
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 1
    assert "counted in plans in blocks only" in refused.stderr
