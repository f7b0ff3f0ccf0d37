"""The loss of a trainer's own code, which calls the model and logs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graph_capture.errors import CaptureError, NotFittingError
from graph_capture.loop.loss import LossRegion
from planner import optimize
from planner.integrations.loop_loss import LoopLoss, first_called


class Owner(nn.Module):
    """Looks at the model without gradients before it trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def step(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            before = self.other(self.net(x[:2])).mean()
        return self.net(x).square().mean() - before


def region(of_output: Callable[[Tensor], Tensor]) -> LossRegion:
    """What a trainer's loss costs."""
    owner, x = Owner(), torch.ones(64, 8)
    loss = LoopLoss(owner.net, owner)
    with loss.of(lambda: of_output(owner.net(x))):
        return optimize(owner.net, x, budget_gb=1, loss_fn=loss).loss.region


def test_a_call_without_gradients_is_not_the_training_call() -> None:
    """A reference's, or that of another batch, as for the KL term of KTO."""
    owner, x = Owner(), torch.ones(64, 8)
    loss = LoopLoss(owner.net, owner)
    with loss.of(lambda: owner.step(x)):
        (found,), _ = loss.call()
    assert found is x
    owner.net.requires_grad_(False)
    assert first_called(owner, lambda: owner.step(x), ()) is None


def test_what_a_mask_picks_to_be_logged_counts_whole() -> None:
    """Its size is another one in each step, and it takes no more than all."""

    def logging(mask_of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def loss(output: Tensor) -> Tensor:
            seen = output.detach()
            seen[mask_of(seen)].exp().max().item()
            return output.square().mean()

        return loss

    by_values, whole = (
        region(logging(mask)) for mask in (torch.isfinite, lambda t: torch.ones(t.shape) > 0)
    )
    assert by_values.workspace_bytes == whole.workspace_bytes


def test_what_a_mask_picks_to_be_trained_is_refused() -> None:
    """Its size may decide what else is done."""
    with pytest.raises((CaptureError, NotFittingError), match="makes a size out of values"):
        region(lambda output: output[output > 0].mean())
