from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.figures import app
from tests.planner.plots.made import whole_comparison


@pytest.mark.slow
def test_figures_of_a_model(tmp_path: Path) -> None:
    """A plan's two figures, and both of a comparison that was written before."""
    whole_comparison().save(tmp_path / "chain.json")
    arguments = ["mobilenet", "--size", "tiny", "--budget", "1", "--out", str(tmp_path)]
    more = ["--comparison", str(tmp_path / "chain.json"), "--limit-s", "10"]
    outcome = CliRunner().invoke(app, [*arguments, *more], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    for kind in ("memory", "layers", "pareto", "pareto_measured"):
        assert (tmp_path / f"{kind}_mobilenet.png").stat().st_size > 1000


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    """The error lists those that there are."""
    outcome = CliRunner().invoke(app, ["gpt9", "--out", str(tmp_path)])
    assert outcome.exit_code == 2
    assert "models are bert" in " ".join(outcome.output.replace("│", " ").split())
