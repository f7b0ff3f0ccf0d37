"""What a script sees of the planner on its terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys
import torch
from torch import nn
from planner import optimize

model = nn.Sequential(*[m for _ in range(8) for m in (nn.Linear(64, 64), nn.GELU())])
sample = torch.randn(128, 64)
free = optimize(model, sample, budget_gb=1, loss_fn=torch.sum)
budget_bytes = int(0.8 * free.baseline_peak_bytes)
plan = optimize(
    model, sample, budget_bytes=budget_bytes, loss_fn=torch.sum, solver=sys.argv[1], time_limit_s=20
)
plan.apply(model)
model(sample).sum().backward()
"""


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["auto", "checkmate_milp", "moccasin"])
def test_a_script_writes_nothing(solver: str) -> None:
    """Planning, applying and a step leave stdout and stderr empty, those of libraries included."""
    command = [sys.executable, "-c", SCRIPT, solver]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("", "")
