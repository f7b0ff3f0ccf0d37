"""Code of a training loop that runs ahead of time leaves nothing behind."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from graph_capture.errors import NotFittingError
from graph_capture.reads.foreign_generators import ForeignGenerators
from graph_capture.reads.undone import undone
from planner import optimize
from planner.integrations.loop_loss import LoopLoss, first_called

SEEN: list[int] = []
count = 0


class History:
    """An object of the user's."""

    total = 0

    def __init__(self) -> None:
        self.numbers: list[Tensor] = []

    def note(self, number: Tensor) -> None:
        History.total += 1
        self.numbers.append(number)


class Stateful(nn.Module):
    """A loss, and a trainer around ``net``, that does all that a training step may do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.teacher = [nn.Linear(4, 4).requires_grad_(False)]  # hidden from parameters()
        self.history = History()
        self.own = torch.Generator().manual_seed(1)
        self.numpys = np.random.default_rng(1)
        self.array = np.zeros(2)

    def forward(self, output: Tensor) -> Tensor:
        global count
        count += 1
        SEEN.append(count)
        self.steps += 1
        self.array += 1
        self.history.note(output.detach().mean())
        with torch.no_grad():
            self.teacher[0].weight.mul_(0.5)
        noise = torch.rand(4, generator=self.own) + torch.rand(4) + self.numpys.random()
        return (self.norm(output) * noise).square().mean() * (1 + random.random())

    def training_step(self, x: Tensor) -> Tensor:
        x.mul_(2)
        self(x)
        return self(self.net(x))

    def state(self) -> list[Any]:
        """Everything that a step changes."""
        return [
            *self.state_dict().values(),
            *(p.clone() for p in self.teacher[0].parameters()),
            *(self.own.get_state(), torch.get_rng_state(), torch.tensor(self.array)),
            *(count, list(SEEN), len(self.history.numbers), History.total),
            *(self.numpys.bit_generator.state, random.getstate()),
        ]


def assert_unchanged(owner: Stateful, run: Callable[[], Any]) -> None:
    before = copy.deepcopy(owner.state())
    run()
    for then, now in zip(before, owner.state(), strict=True):
        assert torch.equal(then, now) if isinstance(then, Tensor) else then == now


def test_all_that_code_did_is_undone() -> None:
    """Tensors in place, attributes, globals, class attributes, generators, arrays."""
    owner, x = Stateful(), torch.ones(2, 4)

    def run() -> None:
        with undone(owner):
            owner.training_step(x)
            assert owner.steps == 2
            assert count == 2

    assert_unchanged(owner, run)
    assert torch.equal(x, torch.ones(2, 4))
    assert x._version == 1  # what is put back is no write to autograd


def test_a_loss_is_computed_while_planning_without_a_trace() -> None:
    """Its buffers and statistics are the loop's, and so are its generators."""
    owner = Stateful()
    model, x = nn.Linear(4, 4), torch.ones(2, 4)
    assert_unchanged(owner, lambda: optimize(model, x, budget_gb=1, loss_fn=owner))


def test_a_training_step_is_called_while_planning_without_a_trace() -> None:
    """Up to the first call of a model, and with its output."""
    owner, x = Stateful(), torch.ones(2, 4)

    def step() -> Tensor:
        return owner.training_step(x)

    assert_unchanged(owner, lambda: first_called(owner, step, ()))
    loss = LoopLoss(owner.net, owner)

    def run() -> None:
        with loss.of(step):
            loss.call()
            optimize(owner.net, x, budget_gb=1, loss_fn=loss)

    assert_unchanged(owner, run)
    assert torch.equal(x, torch.ones(2, 4))


def test_what_a_training_step_keeps_is_there_while_its_loss_is_differentiated() -> None:
    """It counts as it does for a loss that is passed; it is put back later."""

    class Keeping:
        kept: list[Tensor] | None = None

        def __init__(self) -> None:
            self.net = nn.Linear(4, 4)

        def loss(self, output: Tensor) -> Tensor:
            self.kept = [output.detach().exp()]
            return output.square().mean()

    owner, x = Keeping(), torch.ones(64, 4)
    loss = LoopLoss(owner.net, owner)
    with loss.of(lambda: owner.loss(owner.net(x))):
        by_trainer = optimize(owner.net, x, budget_gb=1, loss_fn=loss)
    passed = optimize(owner.net, x, budget_gb=1, loss_fn=owner.loss)
    assert by_trainer.loss.region.workspace_bytes == passed.loss.region.workspace_bytes
    assert owner.kept is None


@pytest.mark.parametrize("kind", ["loader", "generator", "enumerate"])
def test_items_that_an_iterator_gave_out_are_missed(kind: str) -> None:
    """They cannot be put back, so the loss is refused in words."""
    items = {
        "loader": lambda: iter(DataLoader([1.0, 2.0])),
        "generator": lambda: (i for i in (1.0, 2.0)),
        "enumerate": lambda: enumerate(x for x in (1.0, 2.0)),
    }[kind]()

    def loss(output: Tensor) -> Tensor:
        next(items)
        return output.mean()

    with pytest.raises(NotFittingError, match=r"items"), undone(loss):
        loss(torch.ones(2))


def test_numbers_in_long_lists_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set in lists has millions, which lead nowhere; its lists are put back."""
    met: list[Any] = []
    monkeypatch.setattr(ForeignGenerators, "meet", lambda _, value, path: met.append(value))
    rows = [{"tokens": list(range(300 * i, 300 * i + 300))} for i in range(3)]
    with undone(SimpleNamespace(rows=rows)):
        rows[0]["tokens"].clear()
    assert [len(row["tokens"]) for row in rows] == [300, 300, 300]
    assert not any(isinstance(value, int) for value in met)
