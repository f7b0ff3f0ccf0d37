"""Collectives of ``torch.distributed`` in a step: refused where planned, none while planning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.testing.bitwise import assert_same_tensors
from graph_capture.errors import NotFittingError
from planner import CaptureError, applied_plan, optimize
from planner.integrations.loop_loss import LoopLoss
from tests.planner.small import make, sample, square

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="a PyTorch without distributed")


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process."""
    meeting: Path = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gathered(tensor: Tensor) -> Tensor:
    """As accelerate gathers what is logged."""
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor)
    return torch.cat(found)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class _Talking(nn.Module):
    """Calls a collective on what its first layer makes."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.way == "gathers":
            x = x - gathered(x.detach()).mean(0)
        elif self.way == "reduces":
            mean = x.detach().mean(0)
            dist.all_reduce(mean)
            x = x - mean
        elif self.way == "functional":
            from torch.distributed import _functional_collectives as functional

            x = x - functional.all_reduce(x.detach().mean(0), "sum", dist.group.WORLD)
        else:
            x = _Summed.apply(x)
        return self.last(torch.tanh(x))


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("gathers", r"forward calls c10d\.allgather_.*test_collectives\.py"),
        ("reduces", r"forward calls c10d\.allreduce_.*functional_collectives"),
        ("in backward", r"backward calls c10d\.allreduce_.*in the training loop"),
    ],
)
def test_a_collective_that_fills_tensors_is_refused_by_name(way: str, words: str) -> None:
    """Nothing in a graph would wait for it; the message has the line and what works."""
    with pytest.raises(CaptureError, match=words):
        optimize(make(lambda: _Talking(way)), sample(), budget_gb=1, loss_fn=square)


def test_a_functional_collective_is_planned() -> None:
    """It is what the refusal of the others advises."""
    found = []
    for planned in (False, True):
        model = make(lambda: _Talking("functional"))
        if planned:
            optimize(model, sample(), budget_gb=1, loss_fn=square).apply(model)
        square(model(sample())).backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    assert_same_tensors(*found)
    assert applied_plan(model).planned_steps == 1


class _Owner:
    """A trainer that gathers numbers to log them."""

    def __init__(self) -> None:
        self.logged: list[float] = []

    def loss(self, model: nn.Module, targets: Tensor) -> Tensor:
        output = model(sample())
        count = gathered((targets > 0).sum()[None]).sum()
        if count > 0:  # a branch on what others give
            total = output.detach().mean()[None]
            dist.all_reduce(total)
            self.logged.append((total / count).item())
        return square(output)


def test_a_trainers_loss_may_gather_what_it_logs() -> None:
    """Others are taken to give what this process does; a loss of one's own has to say."""
    model, owner, targets = make(), _Owner(), torch.ones(3)
    loss = LoopLoss(model, owner)
    with loss.of(lambda: owner.loss(model, targets)):
        plan = optimize(model, sample(), budget_gb=1, loss_fn=loss)
    assert plan.loss.region.workspace_bytes > 0
    assert not owner.logged
    with pytest.raises(NotFittingError, match="asks for a value that is not known"):
        optimize(
            model,
            sample(),
            budget_gb=1,
            loss_fn=lambda out: out.mean() * bool(gathered(targets)[0]),
        )
