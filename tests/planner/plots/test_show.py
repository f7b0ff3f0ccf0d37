from __future__ import annotations

from pathlib import Path

import torch
from typer.testing import CliRunner

from planner import optimize
from planner.cli.app import app
from tests.planner.small import Net


def test_show_draws_a_plan(tmp_path: Path) -> None:
    """``remat show plan.json --plots`` writes both figures of the plan, in a new folder."""
    optimize(Net(), torch.randn(64, 32), budget_gb=1).save(tmp_path / "plan.json")
    folder = tmp_path / "new" / "figures"
    arguments = ["show", str(tmp_path / "plan.json"), "--plots", str(folder), "--name", "Net"]
    outcome = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    for name in ("memory.png", "layers.png"):
        assert f"drawn {folder / name}" in outcome.output.replace("\n", "")
        assert (folder / name).stat().st_size > 1000
