"""Gradients of outputs that share memory: such a plan holds for equal models and from files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.testing.bitwise import assert_same_training
from planner import Plan, PlanError, optimize
from planner.saving.serialize import (
    plan_from_dict,
    plan_to_dict,
)


class _TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.tanh(self.body(x))
        return self.left(hidden), self.right(hidden)


class _Halves(_TwoHeads):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.left(torch.tanh(self.body(x)))
        return hidden[:, :8], hidden[:, 8:]


class _Twice(_TwoHeads):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.left(torch.tanh(self.body(x)))
        return hidden, hidden


class _Spectrum(_TwoHeads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.left(torch.tanh(self.body(x)))
        return torch.stft(hidden, 8, window=torch.hann_window(8), return_complex=True)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return (a * b).sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        a, b = ctx.saved_tensors
        return b, a


_CASES: dict[str, tuple[type[nn.Module], Callable[[Any], torch.Tensor]]] = {
    "one tensor": (_TwoHeads, lambda o: (o[0] + o[1]).square().mean()),
    "one element": (_TwoHeads, lambda o: o[0].sum() + o[1].sum()),
    "parts": (_TwoHeads, lambda o: torch.cat(o, 1).square().mean()),
    "part of more": (
        _TwoHeads,
        lambda o: torch.cat([o[0], o[0].new_ones(4, 3)], 1).cumsum(1).sum(),
    ),
    "parts of one output": (_Halves, lambda o: torch.cat(o, 1).square().mean()),
    "twice returned": (_Twice, lambda o: (o[0] + o[1]).square().mean()),
    "each other's output": (_TwoHeads, lambda o: _Product.apply(*o)),
    "complex": (_Spectrum, lambda o: o.abs().mean()),
}


@pytest.mark.parametrize("name", _CASES)
def test_a_plan_with_shared_gradients_applies_from_a_file(name: str, tmp_path: Path) -> None:
    """To a model that was never seen, with the same bits."""
    make, loss = _CASES[name]
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    optimize(make(), x, budget_gb=1, loss_fn=loss).save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert_same_training(make, plan.apply, lambda _: x, loss_fn=loss, steps=1)


def test_a_file_without_shared_gradients_says_nothing_of_them() -> None:
    """So that it is as it was before there was a word for it."""
    plan = optimize(_TwoHeads(), torch.randn(4, 16), budget_gb=1, loss_fn=lambda o: o[0].mean())
    assert "memory" not in plan_to_dict(plan)["loss"]


@pytest.mark.parametrize("change", [{"offset": 10**9}, {"size_bytes": 4}, {"size_bytes": 10**12}])
def test_a_gradient_outside_of_its_block_is_refused(change: dict[str, int]) -> None:
    """Before a tensor is made of it."""
    make, loss = _CASES["one tensor"]
    plan = optimize(make(), torch.randn(4, 16), budget_gb=1, loss_fn=loss)
    data = json.loads(json.dumps(plan_to_dict(plan)))
    data["loss"]["memory"][0].update(change)
    with pytest.raises(PlanError, match="memory"):
        plan_from_dict(data)
