"""Random generators that a step sets, puts back or makes are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graph_capture import capture
from graph_capture.errors import CaptureError

from ..odd import WIDTH, Three, mean_square, normal, plan_of


class OwnCheckpoint(torch.autograd.Function):
    """Runs again in backward, with the generator as it was."""

    @staticmethod
    def forward(ctx: Any, function: Any, x: Tensor, *_parameters: Tensor) -> Tensor:
        ctx.function, ctx.state = function, torch.get_rng_state()
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            y = ctx.function(x)
        torch.set_rng_state(now)
        return None, *torch.autograd.grad(y, x, gradients), None, None


class ChecksPoints(Three):
    def forward(self, x: Tensor) -> Tensor:
        def part(t: Tensor) -> Tensor:
            return nn.functional.dropout(self.b(t), 0.5)

        return self.c(OwnCheckpoint.apply(part, self.a(x), *self.b.parameters()))


class Forks(Three):
    def forward(self, x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            noise = torch.randn_like(x)
        return self.c(self.a(x + noise))


@pytest.mark.parametrize("make", [ChecksPoints, Forks])
def test_a_generator_that_is_put_back_is_refused(make: Callable[[], nn.Module]) -> None:
    """A checkpoint of the model's own draws its mask again; a graph would draw another."""
    model = make()
    state = torch.get_rng_state()
    with pytest.raises(CaptureError, match=r"puts back an earlier state .*torch.utils.checkpoint"):
        plan_of(model)
    assert torch.equal(torch.get_rng_state(), state)


class MakesGenerator(Three):
    """Draws from a generator that it makes itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * float(np.random.default_rng().random())


def test_a_generator_made_in_forward_is_refused() -> None:
    """A plan would repeat its first number."""
    with pytest.raises(CaptureError, match=r"np.random.default_rng\(\)"):
        capture(MakesGenerator().train(), normal(0, 16, WIDTH), loss_fn=mean_square)
    assert np.random.default_rng(0).random() == np.random.default_rng(0).random()
