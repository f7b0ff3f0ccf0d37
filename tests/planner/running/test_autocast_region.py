"""Several planned steps within one autocast region."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from benchmarks.testing.bitwise import assert_same_tensors
from planner import PlanWarning, optimize
from tests.planner.small import make, sample, square


def _layers() -> nn.Module:
    return make(lambda: nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)))


def _planned() -> nn.Module:
    plan = optimize(_layers(), sample(), budget_gb=1, loss_fn=square, autocast=torch.bfloat16)
    return plan.apply(_layers())


def _trained(model: nn.Module, *, region: str, steps: bool = True) -> dict[str, Tensor]:
    """Three steps: all in one region, or each in one of its own."""

    def autocast(where: str):
        return torch.autocast("cpu", torch.bfloat16) if where == region else nullcontext()

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with autocast("all"):
        for _ in range(3):
            optimizer.zero_grad()
            with autocast("step"):
                with autocast("forward"):
                    loss = square(model(sample()))
                loss.backward()
                if steps:
                    optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_steps_of_the_optimizer_within_one_region_are_said():
    """Eager goes on with casts of old parameters there, and the plan does not."""
    with pytest.warns(PlanWarning, match="Leave the region before optimizer"):
        found = _trained(_planned(), region="all")
    eager = _trained(_layers(), region="all")
    assert not all(torch.equal(found[name], eager[name]) for name in found)


@pytest.mark.parametrize("region", ["step", "forward"])
def test_a_region_for_each_step_says_nothing(region):
    """What the warning says to do makes both alike."""
    assert_same_tensors(_trained(_layers(), region=region), _trained(_planned(), region=region))


def test_backward_passes_without_a_step_say_nothing():
    """While no parameter changes, no cast is an old one."""
    _trained(_planned(), region="all", steps=False)


class _PartlyFloat(nn.Module):
    """A layer that forward keeps out of autocast, as routers and norms are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.exact = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        with torch.autocast("cpu", enabled=False):
            return self.exact(hidden.float())


def _partly_planned() -> nn.Module:
    model = make(_PartlyFloat)
    plan = optimize(model, sample(), budget_gb=1, loss_fn=square, autocast=torch.bfloat16)
    return plan.apply(model)


def test_a_backward_pass_that_autocast_would_cast_is_said():
    """Eager multiplies in bfloat16 there what forward took in float32, and the plan does not."""
    with pytest.warns(PlanWarning, match=r"Leave the region before backward\(\)"):
        found = _trained(_partly_planned(), region="step")
    eager = _trained(make(_PartlyFloat), region="step")
    assert not all(torch.equal(found[name], eager[name]) for name in found)


def test_a_backward_pass_outside_of_autocast_says_nothing():
    """What the warning says to do makes both alike."""
    eager = _trained(make(_PartlyFloat), region="forward")
    assert_same_tensors(eager, _trained(_partly_planned(), region="forward"))
