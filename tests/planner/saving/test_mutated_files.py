"""A thousand damaged plan files: refused in one line, or as good as an honest one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from planner import CallMismatchError, Plan, PlanError, PlanMismatchError, measure, optimize
from planner.saving.serialize import plan_to_dict
from tests.hostile import mutated

_CALL = {"x": torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), "scale": 0.5}


class _Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop, self.norm = nn.Dropout(), nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.norm(self.b(self.drop(torch.tanh(self.a(x)) * scale))).sum(-1)


def _make() -> nn.Module:
    torch.manual_seed(0)
    return _Tiny()


def _loss(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def _trained(model: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(1)
    _loss(model(**_CALL)).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*gradients, *model.buffers(), torch.get_rng_state()]


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    """A plan that recomputes, with an optimizer, as a file holds it."""
    options: dict[str, Any] = {"loss_fn": _loss, "optimizer": "adamw", "time_limit_s": 1}
    peak_bytes = optimize(_make(), _CALL, budget_gb=1, **options).predicted_peak_bytes
    plan = optimize(_make(), _CALL, budget_bytes=peak_bytes - 1, **options)
    assert plan.schedule.recomputed()
    return json.loads(json.dumps(plan_to_dict(plan)))


def _said(outcome: str, error: Exception) -> str:
    """The outcome, where the error is one line with nothing that a terminal obeys."""
    assert str(error).isprintable()
    assert len(str(error)) < 1500
    return outcome


def _outcome(path: Path, expected: list[torch.Tensor]) -> str:
    """What becomes of a file; any error but those that are documented ends the test."""
    try:
        plan = Plan.load(path)
    except PlanError as error:
        return _said("not loaded", error)
    assert all(line.isprintable() for line in str(plan).split("\n"))
    try:
        model = plan.apply(_make())
    except PlanMismatchError as error:
        return _said("not applied", error)
    try:
        found = _trained(model)
    except CallMismatchError:
        return "for another call"
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what measuring does beside the step
        taken = measure(model, _CALL, loss_fn=_loss, optimizer="adamw", repeats=0)
    assert taken.peak_bytes <= plan.budget_bytes
    return "trains"


def _outcomes(written: dict[str, Any], count: int, seed: int, folder: Path) -> dict[str, int]:
    path = folder / "plan.json"
    expected = _trained(_make())
    outcomes: dict[str, int] = {}
    for text in mutated(written, count, seed):
        path.write_bytes(text)
        outcome = _outcome(path, expected)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


def test_damaged_files_are_refused_or_train_right(written: dict[str, Any], tmp_path: Path) -> None:
    """A sample of the next test."""
    outcomes = _outcomes(written, 150, 1, tmp_path)
    assert outcomes["not loaded"] > 100


@pytest.mark.slow
def test_a_thousand_damaged_files(written: dict[str, Any], tmp_path: Path) -> None:
    """Each is refused with one clear line, or trains with eager's bits within its budget."""
    outcomes = _outcomes(written, 1000, 10, tmp_path)
    assert outcomes["not loaded"] > 800
    assert outcomes["trains"] > 5
