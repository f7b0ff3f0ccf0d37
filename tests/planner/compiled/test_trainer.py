"""Transformers' Trainer with ``torch_compile=True`` within a budget."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from planner.compiled import install
from tests.planner.integrations.loops import language_model
from tests.planner.integrations.test_transformers import run, trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
        "ignore:.*pin_memory.*:UserWarning",
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
        "ignore:a compiled graph is only a part",  # Trainer's loss lies outside of it
        "ignore:a graph break cuts",
    ),
    pytest.mark.skipif(
        not any(map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++"))),
        reason="Inductor needs a C++ compiler",
    ),
]

STEPS = 3


def test_trainer_compiles_within_a_budget(tmp_path: Path) -> None:
    """The model's plan recomputes, serves all steps, and the losses are those without a budget."""
    pytest.importorskip("accelerate")

    def losses(folder: str) -> list[float]:
        torch.compiler.reset()
        made = trainer(tmp_path / folder, language_model(), torch_compile=True, max_steps=STEPS)
        return [entry["loss"] for entry in run(made).losses]

    with install(budget_bytes=1_500_000) as plans:
        within = losses("within")
    assert plans[0].num_recomputed > 0
    assert plans[0].predicted_peak_bytes <= 1_500_000 < plans[0].unplanned_peak_bytes
    assert within == pytest.approx(losses("without"), rel=1e-5)
    assert len(within) == STEPS
