"""The examples run, at small sizes."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from planner import Comparison

FOLDER = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_is_short_and_named() -> None:
    """No script is over 40 lines of code, and the folder's page and the docs name each."""
    scripts = sorted(FOLDER.glob("*.py"))
    assert len(scripts) == 7
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    for script in scripts:
        lines = script.read_text(encoding="utf-8").splitlines()
        assert sum(bool(line.strip()) for line in lines) <= 40
        assert f"`{script.name}`" in page


def test_plain_loop(capsys: pytest.CaptureFixture[str]) -> None:
    """A loop by a plan has the losses of one without, and something is recomputed."""
    load("plain_loop").main(width=32, rows=2048, num_steps=2, budget="6MB")
    said = capsys.readouterr().out
    assert "recompute" in said
    assert said.endswith("True\n")


@pytest.mark.slow
def test_estimate_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Batches of a step on an H100 are sized without one."""
    load("estimate_without_a_gpu").main(num_layers=1, sequence=64, time_limit_s=1)
    said = capsys.readouterr().out
    assert "on NVIDIA H100 80 GB SXM" in said
    assert "with a plan     batch" in said


@pytest.mark.parametrize("measure", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_research_comparison(
    measure: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A strategy of one's own is judged beside the others, and run, and the table is saved."""
    load("research_comparison").main(
        num_layers=2, width=16, batch=2, measure=measure, out=tmp_path / "table.json"
    )
    assert "save_every_kth" in capsys.readouterr().out
    rows = Comparison.load(tmp_path / "table.json").rows
    own = [row for row in rows if row.strategy == "save_every_kth"]
    assert own
    assert [row.measured.bits for row in own if row.measured] == ["equal"] * len(own) * measure


TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformers_trainer": ("accelerate", {"layers": 2, "num_steps": 2}),
    "trl_lora": ("trl", {"layers": 2, "num_steps": 2, "budget": "90%"}),
    "lightning_trainer": ("pytorch_lightning", {"width": 64, "rows": 512}),
    "accelerate_loop": ("accelerate", {"width": 64, "rows": 512}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:.*does not have many workers.*",
    "ignore:.*smaller than the logging interval.*",
    "ignore:.*is not supported on CPU.*:UserWarning",
)
@pytest.mark.parametrize("name", TRAINERS)
def test_trainers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A trainer by a plan has the losses of one without."""
    library, sizes = TRAINERS[name]
    pytest.importorskip(library)
    state = pytest.importorskip("accelerate").state.AcceleratorState
    state._reset_state(reset_partial_state=True)  # a process has one precision else
    load(name).main(**sizes)
    said = capsys.readouterr().out
    assert re.search(r"^(\d) of \1 steps by the plan", said, re.M)
    assert "losses equal to those without: True" in said
