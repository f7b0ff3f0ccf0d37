"""Gradient formulas under ``torch.func`` and with batches of gradients, inside forward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.testing.bitwise import assert_same_training
from planner import optimize


def _basis(t: Tensor) -> Tensor:
    return torch.eye(t.numel())[:4].reshape(-1, *t.shape)


def _batched(t: Tensor, h: Tensor, **options: bool) -> Tensor:
    return torch.autograd.grad(t, h, _basis(t), is_grads_batched=True, **options)[0].sum(0)


def _by(t: Tensor, h: Tensor) -> Tensor:
    return torch.autograd.grad(t.sin().sum(), h, retain_graph=True)[0]


def _zeroed(h: Tensor) -> Tensor:
    return torch.where(h > 0.5, 0.0, h)


DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "grad": lambda h: torch.func.grad(lambda t: t.prod(1).square().sum())(h),
    "jacrev of prod(dim)": lambda h: torch.func.jacrev(lambda t: t.prod(1))(h).sum(0),
    "jacrev of prod": lambda h: torch.func.jacrev(lambda t: t[:2, :3].prod())(h),
    "vmap of grad": lambda h: torch.func.vmap(torch.func.grad(lambda t: t.prod().square()))(h),
    "a batch": lambda h: _batched(h.prod(1), h, retain_graph=True),
    "a batch, again": lambda h: _batched(h.prod(1), h, create_graph=True),
    "a batch of masked_fill": lambda h: _batched(
        h.masked_fill(h > 0.2, h.mean()), h, create_graph=True
    ),
    "prod in double": lambda h: _by(_zeroed(h).prod(1, dtype=torch.float64), h),
    "cumprod in double": lambda h: _by(h.cumprod(1, dtype=torch.float64), h),
    "cumprod in double, with zeros": lambda h: _by(_zeroed(h).cumprod(1, dtype=torch.float64), h),
}


class _Derives(nn.Module):
    def __init__(self, derivative: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self._derivative = [derivative]

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h) * self._derivative[0](h).sin()


@pytest.mark.parametrize("name", DERIVATIVES)
def test_batches_of_gradients_have_eager_bits(name: str) -> None:
    """Which formula eager takes depends on what is wrapped, and so it does in a plan."""
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))

    def make() -> nn.Module:
        return _Derives(DERIVATIVES[name])

    def loss(output: Tensor) -> Tensor:
        return output.square().mean()

    if torch.__version__ < "2.12" and name == "cumprod in double, with zeros":
        with pytest.raises(RuntimeError, match="to have same dtypes"):
            make()(x)  # eager itself fails before torch 2.12
        return
    torch.manual_seed(0)
    plan = optimize(make(), x, budget_gb=1, loss_fn=loss, time_limit_s=1)
    assert_same_training(make, plan.apply, lambda _seed: x, loss_fn=loss, steps=1)
