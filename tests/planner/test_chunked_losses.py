"""Losses over chunks, which work in one buffer and sum up in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.testing.bitwise import assert_same_training
from planner import InfeasibleBudgetError, Plan, measure, optimize

ROWS, WIDTH, WORDS, CHUNK = 32, 16, 256, 64


class OneBuffer(torch.autograd.Function):
    """Each chunk's logits are written over the last one's; gradients are summed in place."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        buffer, total = torch.empty(len(h), 2 * CHUNK), torch.zeros(len(h))
        picked = torch.zeros(len(h))
        for i in range(0, WORDS, CHUNK):
            tile = buffer[:, :CHUNK]
            torch.mm(h, weight[i : i + CHUNK].t(), out=tile)
            total.add_(tile.exp().sum(-1))
            inside = (labels >= i) & (labels < i + CHUNK)
            value = tile.gather(1, (labels - i).clamp(0, CHUNK - 1)[:, None])[:, 0]
            picked.copy_(torch.where(inside, value, picked))
        ctx.save_for_backward(h, weight, labels, total)
        return (total.log() - picked).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        h, weight, labels, total = ctx.saved_tensors
        grad_h, grad_weight = torch.zeros_like(h), torch.zeros_like(weight)
        buffer = torch.empty(len(h), 2 * CHUNK)
        for i in range(0, WORDS, CHUNK):
            tile = buffer[:, :CHUNK]
            torch.mm(h, weight[i : i + CHUNK].t(), out=tile)
            hit = torch.arange(i, i + CHUNK) == labels[:, None]
            tile.copy_((tile.exp() / total[:, None] - hit.float()) * (grad / len(h)))
            grad_h.addmm_(tile, weight[i : i + CHUNK])
            grad_weight[i : i + CHUNK].addmm_(tile.t(), h)
        return grad_h, grad_weight, None


class GradientsInForward(torch.autograd.Function):
    """Rows in chunks; the gradients are made in forward and scaled in backward."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        grad_h, grad_weight = torch.zeros_like(h), torch.zeros_like(weight)
        loss = torch.zeros(len(h))
        for i in range(0, len(h), 8):
            x, y = h[i : i + 8], labels[i : i + 8, None]
            logits = x @ weight.t()
            norm = logits.logsumexp(-1)
            loss[i : i + 8] = norm - logits.gather(1, y)[:, 0]
            p = torch.exp(logits - norm[:, None])
            p.scatter_add_(1, y, -torch.ones(len(x), 1))
            grad_h[i : i + 8] = p @ weight
            torch.addmm(grad_weight, p.t(), x, out=grad_weight)
        ctx.save_for_backward(grad_h, grad_weight)
        return loss.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_h, grad_weight = ctx.saved_tensors
        return grad_h.mul_(grad / len(grad_h)), grad_weight.mul_(grad / len(grad_h)), None


class Head(nn.Module):
    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.randn(WORDS, WIDTH) * 0.1)
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(torch.tanh(self.layer(x)), self.weight, labels)


class SummedExperts(nn.Module):
    """Eight summands, one after the other, into one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for expert in self.experts:
            total.index_add_(0, torch.arange(len(x)), torch.tanh(expert(x)))
        return (total * torch.tanh(total)).mean()


MODELS = {
    "one buffer": lambda: Head(OneBuffer.apply),
    "gradients in forward": lambda: Head(GradientsInForward.apply),
    "summed experts": SummedExperts,
}


def _made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().train()


def _sample(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    return x, torch.randint(0, WORDS, (ROWS,), generator=generator)


def _at(name: str, budget_bytes: int) -> Plan:
    return optimize(_made(name), _sample(0), budget_bytes=budget_bytes, time_limit_s=0.5)


@pytest.mark.parametrize("name", MODELS)
def test_the_least_budget_is_below_what_eager_takes(name: str) -> None:
    """Its plan fits eager's measured peak, takes what it says, and computes eager's bits."""
    eager_bytes = measure(_made(name), _sample(0), repeats=0).peak_bytes
    with pytest.raises(InfeasibleBudgetError) as caught:
        _at(name, 1)
    assert caught.value.min_budget_bytes <= eager_bytes
    plan = _at(name, caught.value.min_budget_bytes)
    model = plan.apply(_made(name))
    peak_bytes = measure(model, _sample(0), repeats=0).peak_bytes
    assert peak_bytes == pytest.approx(plan.predicted_peak_bytes, abs=64)
    assert peak_bytes <= plan.budget_bytes
    assert_same_training(MODELS[name], plan.apply, _sample)


@pytest.mark.parametrize("name", MODELS)
def test_the_unplanned_peak_is_not_above_what_eager_takes(name: str) -> None:
    """Sums and buffers are not counted twice."""
    eager_bytes = measure(_made(name), _sample(0), repeats=0).peak_bytes
    assert _at(name, 10**9).baseline_peak_bytes <= eager_bytes
