"""Values that a loss asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.testing.bitwise import assert_same_training
from graph_capture.captured_step import CapturedStep
from graph_capture.errors import CaptureError
from planner import optimize
from tests.capturing import capture_step

TARGETS = torch.tensor([0, 1, -100, 3, -100, 2])
MASK = TARGETS != -100
cross_entropy = nn.functional.cross_entropy


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)).train()


def sample(seed: int) -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))


def capture(loss: Callable[[Tensor], Tensor], given: Any = None) -> CapturedStep:
    given = sample(0) if given is None else given
    return capture_step(make(), {"input": given}, loss=loss, measure_scratch=False)


def checking(output: Tensor) -> Tensor:
    """Asks whether the loss is finite, and logs it."""
    loss = output.square().mean()
    assert torch.isfinite(loss)
    assert loss.item() > 0
    return loss


def sorting(output: Tensor) -> Tensor:
    """Matches in NumPy."""
    order = np.argsort(output.detach().cpu().numpy().sum(1))
    return output[torch.as_tensor(order.copy())].cumsum(0).square().mean()


@pytest.mark.parametrize(
    "loss",
    [
        lambda output: cross_entropy(output[MASK], TARGETS[MASK]),
        lambda output: cross_entropy(output[TARGETS != -100], TARGETS[TARGETS != -100]),
        lambda output: output[(TARGETS > 0).nonzero().squeeze(1)].square().mean(),
        lambda output: output.masked_select((TARGETS > 0)[:, None]).square().mean(),
        lambda output: (output.sum(-1) * MASK).sum() / MASK.sum().item(),
        lambda output: sum(output[:n].square().mean() for n in TARGETS.clamp(min=1).tolist()),
        lambda output: output[torch.zeros(6, dtype=torch.bool).logical_or_(TARGETS > 0)].sum(),
        checking,
        sorting,
    ],
)
def test_losses_that_ask_for_values_of_targets_train_to_the_same_bits(loss: Any) -> None:
    """Masks, counts and lists of targets are what they are; numbers of outputs are the sample's."""
    plan = optimize(make(), sample(0), budget_bytes=10**8, loss_fn=loss, time_limit_s=1)
    assert_same_training(make, plan.apply, sample, loss_fn=loss, steps=2)


def test_a_size_that_the_output_decides_is_refused_with_what_works() -> None:
    """A mask of outputs has another count in each step, and the error says what to write."""
    with pytest.raises(CaptureError, match="multiply by the mask"):
        capture(lambda output: output[output > 0].sum())
    capture(lambda output: (output * (output > 0)).sum())


def test_lengths_of_a_ctc_loss_in_lists_are_refused_in_words() -> None:
    """As in a forward: the error says what to write."""
    targets = torch.tensor([[1, 1, 1]])
    with pytest.raises(CaptureError, match=r"give input_lengths and target_lengths as tensors"):
        capture(lambda output: nn.functional.ctc_loss(output[:, None], targets, [6], [3]))


def test_a_value_of_targets_that_were_written_to_is_not_known() -> None:
    """After a write through a view nobody knows the whole, and nothing stale is answered."""

    def loss(output: Tensor) -> Tensor:
        mask = torch.zeros(6, dtype=torch.bool)
        mask[0] = output.sum() > 0
        return output[mask].sum()

    with pytest.raises(CaptureError, match="multiply by the mask"):
        capture(loss)


def test_a_question_without_values_is_refused() -> None:
    """With a sample on meta nothing of the output is known."""
    given = sample(0).to("meta")
    with pytest.raises(CaptureError, match="loss_fn asks for a value"):
        capture(checking, given)


class _WithDerivative(nn.Module):
    """Returns its output and the derivative by the input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = self.net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return u, slope


def test_a_loss_that_differentiates_by_the_input_is_told_to_move_into_forward() -> None:
    """What a physics-informed loss is told works: the same derivative taken in forward."""
    x = torch.rand(16, 2).requires_grad_()

    def residual(u: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return slope.square().mean() + u.square().mean()

    net = _WithDerivative().net
    with pytest.raises(CaptureError, match="into the model's forward"):
        capture_step(net, {"input": x}, loss=residual, measure_scratch=False)
    capture_step(
        _WithDerivative().train(),
        {"x": x},
        loss=lambda o: o[1].square().mean() + o[0].square().mean(),
        measure_scratch=False,
    )


class HandsBack(nn.Sequential):
    """Returns its input beside its output."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def test_a_loss_that_differentiates_by_the_input_is_told_where_that_works() -> None:
    """Also where forward hands the input back."""

    def loss(output: Any) -> Tensor:
        (found,) = torch.autograd.grad(output[0].sum(), output[1], create_graph=True)
        return found.square().sum()

    model = HandsBack(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    given = {"x": sample(0).requires_grad_()}
    with pytest.raises(CaptureError, match="into the model's forward"):
        capture_step(model, given, loss=loss, measure_scratch=False)


class _Weighs(nn.Module):
    """A loss with weights of its own, which it differentiates by."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.weights, self.again = nn.Parameter(torch.ones(5)), again

    def forward(self, output: Tensor) -> Tensor:
        loss = (self.weights * output.square()).mean()
        (found,) = torch.autograd.grad(
            loss, self.weights, create_graph=self.again, retain_graph=True
        )
        return loss + found.square().sum()


@pytest.mark.parametrize("again", [False, True])
def test_a_loss_may_differentiate_by_weights_of_its_own(again: bool) -> None:
    """Between those and the loss lies nothing of the planned step."""
    loss = _Weighs(again)
    plan = optimize(make(), sample(0), budget_bytes=10**8, loss_fn=loss, time_limit_s=1)
    assert_same_training(make, plan.apply, sample, loss_fn=loss, steps=2)


class _BalancesInside(nn.Module):
    """Weighs two losses by their gradients at the last layer, in forward or outside."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.body, self.last, self.inside = nn.Linear(8, 8), nn.Linear(8, 5), inside

    def forward(self, x: Tensor) -> Tensor:
        output = self.last(torch.tanh(self.body(x)))
        return self.balance(output) if self.inside else output

    def balance(self, output: Tensor) -> Tensor:
        both = output.square().mean(), output.abs().mean()
        first, second = (
            torch.autograd.grad(loss, self.last.weight, retain_graph=True)[0] for loss in both
        )
        return both[0] + (first.norm() / second.norm()).detach() * both[1]


def test_a_loss_that_differentiates_by_a_parameter_is_told_where_that_works() -> None:
    """The parameter is named, and what the error says works: the same in forward."""
    model = _BalancesInside(inside=False)
    with pytest.raises(CaptureError, match=r"by parameter 'last\.weight' of the model.*forward"):
        capture_step(model, {"x": sample(0)}, loss=model.balance, measure_scratch=False)

    def inside() -> nn.Module:
        return _BalancesInside(inside=True)

    plan = optimize(inside(), sample(0), budget_bytes=10**8, time_limit_s=1)
    assert_same_training(inside, plan.apply, sample, steps=2)
