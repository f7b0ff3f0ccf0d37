"""Hidden values that a model returns beside what it makes of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.testing.bitwise import assert_same_tensors
from planner import CallMismatchError, optimize
from planner.running.inner_outputs import inner_outputs
from tests.capturing import trace_step
from tests.planner.small import make, sample


class Hidden(nn.Module):
    """Returns its result, the hidden values it comes from, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(32, 32), nn.Linear(32, 8), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.tanh(self.first(x))
        return self.second(hidden), hidden, self.third(hidden.detach())


def of_first(outputs: tuple[Tensor, ...]) -> Tensor:
    return outputs[0].square().mean()


def of_all(outputs: tuple[Tensor, ...]) -> Tensor:
    return outputs[0].square().mean() + outputs[1].abs().mean() + outputs[2].sum()


def planned(loss_fn: Callable[..., Tensor]) -> nn.Module:
    return optimize(make(Hidden), sample(), budget_gb=1, loss_fn=loss_fn).apply(make(Hidden))


@pytest.mark.parametrize("loss_fn", [of_first, of_all])
def test_what_leads_to_another_output_is_known(loss_fn: Callable[..., Tensor]) -> None:
    """The hidden values do; what is made of them, detached or not, does not."""
    assert inner_outputs(trace_step(make(Hidden), {"x": sample()}, loss_fn)) == (1,)


@pytest.mark.parametrize("loss_fn", [of_first, of_all])
@pytest.mark.parametrize("asks", [Tensor.retain_grad, lambda t: t.register_hook(lambda g: g)])
def test_their_gradients_are_not_a_plans(
    loss_fn: Callable[..., Tensor], asks: Callable[[Tensor], object]
) -> None:
    """Eager adds what comes from inside; the error says so before a number is wrong."""
    outputs = planned(loss_fn)(sample())
    asks(outputs[1])
    with pytest.raises(CallMismatchError, match=r"gradient of output '1'.*planner\.unplanned"):
        loss_fn(outputs).backward()


def test_a_gradient_by_them_alone_is_refused() -> None:
    """As multi-objective descent asks for: the part from inside would be missing."""
    model = planned(of_all)
    outputs = model(sample())
    with pytest.raises(CallMismatchError, match="gradient of output '1'"):
        torch.autograd.grad(of_all(outputs), outputs[1], retain_graph=True)
    of_all(outputs).backward()  # which is another pass
    assert all(p.grad is not None for p in model.parameters())


def test_other_outputs_may_keep_their_gradients() -> None:
    """Where nothing inside the model adds to them, they are eager's."""
    found = []
    for model in (make(Hidden), planned(of_all)):
        outputs = model(sample())
        for output in (outputs[0], outputs[2]):
            output.retain_grad()
        of_all(outputs).backward()
        kept = {f"output {i}": outputs[i].grad for i in (0, 2)}
        found.append({**kept, **{n: p.grad for n, p in model.named_parameters()}})
    assert_same_tensors(*found)
