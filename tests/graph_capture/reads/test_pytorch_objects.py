"""PyTorch's own objects that forward reads: optimizers, schedules, distributions, data sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal, kl_divergence
from torch.optim.lr_scheduler import ExponentialLR

from graph_capture.calls.call_spec import bind_call
from graph_capture.errors import CaptureError
from graph_capture.reads.reads import Reads
from graph_capture.tracing.traced_step import TracedStep
from tests.capturing import trace_step

from ..odd import WIDTH, Three, mean_square, normal


class Scheduled(Three):
    """Computes with what the training loop keeps."""

    def prepare(self) -> None:
        self.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
        self.schedule = ExponentialLR(self.optimizer, 0.5)
        self.prior = Normal(torch.ones(WIDTH), 1.0)
        self.data = torch.utils.data.TensorDataset(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * (1 + self.optimizer.param_groups[0]["lr"])
        h = h * (1 + self.schedule.get_last_lr()[0])
        return (h + self.prior.loc) * self.data.tensors[0].sum()


class WithPrior(Three):
    """Asks a distribution for what it computes at the first question, and keeps."""

    def prepare(self) -> None:
        self.prior = Categorical(probs=torch.ones(WIDTH) / WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return kl_divergence(Categorical(logits=self.a(x)), self.prior)


def step_of(model: nn.Module) -> TracedStep:
    arguments = bind_call(model.forward, (normal(0, 16, WIDTH),), {})
    return trace_step(model, arguments, mean_square)


CHANGES: dict[str, Callable[[Scheduled], Any]] = {
    "param_groups": lambda model: model.optimizer.param_groups[0].update(lr=0.1),
    "_last_lr": lambda model: setattr(model.schedule, "_last_lr", [0.1]),
    "loc": lambda model: setattr(model.prior, "loc", torch.zeros(WIDTH)),
    "tensors": lambda model: setattr(model.data, "tensors", (torch.ones(4),)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_found_by_its_name(name: str) -> None:
    """A learning rate, the mean of a prior, a data set's tensors."""
    model = Scheduled().train()
    reads: Reads = step_of(model).reads
    assert reads.difference() is None
    assert reads.difference() is None  # as found by the quick comparison
    CHANGES[name](model)
    found = reads.difference()
    assert found is not None
    assert name in found


def test_what_a_distribution_keeps_is_no_stand_in() -> None:
    """The first question is refused with the remedy, and the distribution is as before it."""
    model = WithPrior().train()
    with pytest.raises(CaptureError, match=r"logits.*run the model once before planning"):
        step_of(model)
    assert "logits" not in vars(model.prior)
    model(normal(0, 16, WIDTH))
    step_of(model)
    assert type(model.prior.logits) is Tensor
