"""What a repetition must not touch: outputs that are in the user's hands."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planner import CallMismatchError, measure, optimize


class VarianceHead(nn.Module):
    """Returns the square root of a variance whose mean is needed again."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(self.first(x), 1)
        h = mean
        for layer in self.layers:
            h = torch.sin(F.gelu(layer(h)))
        return (h * mean).mean(), torch.sqrt(variance)


class NormHead(nn.Module):
    """Returns a norm that an in-place call changed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(self.first(x)).tanh_()
        return (h * h).mean(), h


def both(output: tuple[Tensor, Tensor]) -> Tensor:
    return output[0] + output[1].square().mean()


def assert_same(planned: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """Outputs are compared after backward, in which repetitions run."""
    expected, actual = plain(x), planned(x)
    both(expected).backward()
    both(actual).backward()
    for a, b in zip(expected, actual, strict=True):
        assert torch.equal(a, b)
    for p, q in zip(plain.parameters(), planned.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("fraction", [0.9, 0.8, 0.7])
def test_a_repetition_does_not_write_over_a_kept_output(fraction: float) -> None:
    """An operator that is repeated for one result leaves its other, returned one alone."""
    model, x = VarianceHead(), torch.randn(512, 2, 64)
    plain = copy.deepcopy(model)
    peak = optimize(model, x, budget_gb=1, loss_fn=both).baseline_peak_bytes
    plan = optimize(model, x, budget_bytes=int(fraction * peak), loss_fn=both, time_limit_s=1)
    assert_same(plan.apply(model), plain, x)


def test_a_repeated_in_place_call_does_not_change_the_output_again() -> None:
    """``always_recompute`` repeats a norm and its in-place activation beside the kept one."""
    model, x = NormHead(), torch.randn(64, 32)
    plain = copy.deepcopy(model)
    plan = optimize(model, x, budget_gb=1, loss_fn=both, always_recompute=["norm"])
    assert_same(plan.apply(model), plain, x)
    assert measure(model, x, loss_fn=both, repeats=0).peak_bytes <= plan.predicted_peak_bytes


def test_an_output_that_the_loop_does_not_use_is_named() -> None:
    """Without loss_fn every output is planned as differentiated; a loop that uses one is told."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": self.a(x), "b": self.b(x)}

    model, x = Heads(), torch.randn(4, 8)
    optimize(model, x, budget_gb=1).apply(model)
    with pytest.raises(CallMismatchError, match=r"output 'b'.*loss_fn"):
        model(x)["a"].sum().backward()
