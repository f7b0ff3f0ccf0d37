"""Steps are told apart: equal, right to rounding, wrong, or not comparable."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planner.base.preserve_state import preserve_state
from planner.comparing.execution.step_verdict import judge_steps, slope_error
from planner.comparing.execution.training_run import TrainingRun
from planner.measuring.rounding import StepResults, StepVerdict
from tests.planner.comparing.peers.peer_models import (
    Stack,
    Statistics,
    made,
)


class Off(nn.Module):
    """A linear layer with dropout whose forward or backward pass can be disturbed."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("num_calls", torch.zeros(()))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        if self.how == "other draws":
            torch.rand(5)
        h = self.linear(x)
        if self.how == "python draws":
            h = h * random.random() * float(np.random.rand())
        if self.how == "generator":
            h = F.dropout(h, 0.5)
            torch.rand(5)
            return h.square().mean()
        wrong = self.how == "gradient" or (self.how == "second step" and self.num_calls > 1)
        if wrong:
            h.register_hook(lambda g: g * 1.5)
        if self.how == "rounding":
            h = h * 1.0000001
        if self.how == "buffer":
            self.num_calls += 1
        return F.dropout(h, 0.5).square().mean()


@pytest.mark.parametrize(
    ("how", "bits", "words"),
    [
        ("", "equal", ""),
        ("generator", "right", "the random generator 0 has other bits, in step 1"),
        ("rounding", "right", "has other bits"),
        ("gradient", "WRONG", " is off by 0.5 of its norm, in step 1"),
        ("second step", "WRONG", "in step 2 of seed 0"),
        ("buffer", "WRONG", "buffer num_calls is off"),
        ("other draws", "other draws", "the gradient is its own loss' slope"),
    ],
)
def test_what_is_off_is_found(how: str, bits: str, words: str) -> None:
    """Whatever a training loop goes on with is compared, over two steps."""
    model, sample = made(Off)
    other = copy.deepcopy(model)
    other.how = how
    values = {n: t.clone() for n, t in model.state_dict().items()}
    generator = torch.get_rng_state()
    steps = 1 if how == "generator" else 2  # the second step draws other numbers
    verdict = judge_steps(model, other, sample, seeds=(0,), num_steps=steps)
    assert verdict.bits == bits, verdict.difference
    assert words in verdict.difference
    assert verdict.gradients == (
        "WRONG" if how in ("gradient", "second step") else verdict.gradients
    )
    for m in (model, other):
        assert all(torch.equal(values[n], t) for n, t in m.state_dict().items())
        assert all(p.grad is None for p in m.parameters())
    assert torch.equal(generator, torch.get_rng_state())


def test_generators_of_python_and_numpy_are_in_step() -> None:
    """Models that draw from them draw the same numbers, as eager beside itself would."""
    model, sample = made(Off, how="python draws")
    states = random.getstate(), np.random.get_state()[1].tolist()
    assert judge_steps(model, copy.deepcopy(model), sample).bits == "equal"
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


def test_a_wrong_gradient_is_found_where_draws_differ() -> None:
    """The slope of the model's own loss tells, whatever its dropout draws."""
    for kind in (Stack, Off):
        assert slope_error(*made(kind)) < 0.02
    assert slope_error(*made(Off, how="gradient")) == pytest.approx(1 / 3, abs=0.02)


def test_statistics_of_batch_norm_are_compared() -> None:
    """Equal steps of a model with buffers have equal buffers."""
    model, sample = made(Statistics)
    verdict = judge_steps(model, copy.deepcopy(model), sample)
    assert (verdict.bits, verdict.buffers) == ("equal", "equal")


@pytest.mark.parametrize(
    ("how", "bits", "words"),
    [("rounding", "right", "other bits"), ("buffer", "WRONG", "buffer num_calls is off")],
)
def test_a_causal_mask_is_no_mistake_and_hides_none(how: str, bits: str, words: str) -> None:
    """A buffer of -inf beside the others changes no verdict."""
    model, sample = made(Off)
    model.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
    other = copy.deepcopy(model)
    other.how = how
    verdict = judge_steps(model, other, sample, seeds=(0,), num_steps=1)
    assert verdict.bits == bits, verdict.difference
    assert words in verdict.difference


# -- each tensor is judged alone -----------------------------------------------------


class Table(Statistics):
    """Batch norm beside tables that no step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("position_ids", torch.arange(1024))
        self.register_buffer("angles", torch.arange(1024.0))


class Spoilt(nn.Module):
    """Another model's step, after whose forward pass something is done to the model."""

    def __init__(self, model: nn.Module, spoil: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self._orig_mod = model
        self.spoil = spoil

    def forward(self, x: Tensor) -> Tensor:
        output = self._orig_mod(x)
        self.spoil(self._orig_mod)
        return output


def judged(kind: type[nn.Module], spoil: Callable[[nn.Module], None]) -> StepVerdict:
    """The verdict on a model whose step is spoilt."""
    model, sample = made(kind)
    return judge_steps(model, Spoilt(copy.deepcopy(model), spoil), sample)


def double(name: str) -> Callable[[nn.Module], None]:
    """Doubles a buffer."""
    return lambda model: model.get_buffer(name).data.mul_(2)


def move(name: str) -> Callable[[nn.Module], None]:
    """Adds one to a buffer."""
    return lambda model: model.get_buffer(name).data.add_(1)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (double("layers.3.1.running_mean"), "buffer layers.3.1.running_mean is off by 1 of its"),
        (move("layers.0.1.num_batches_tracked"), "buffer layers.0.1.num_batches_tracked is off,"),
        (move("position_ids"), "buffer position_ids is off,"),
        (move("angles"), "buffer angles is off by 0.00"),
    ],
)
def test_tables_beside_do_not_hide_a_wrong_buffer(
    spoil: Callable[[nn.Module], None], words: str
) -> None:
    """Large buffers that no step changes make no other's error smaller; integers are exact."""
    verdict = judged(Table, spoil)
    assert (verdict.bits, verdict.buffers) == ("WRONG", "WRONG")
    assert words in verdict.difference
    assert judged(Table, lambda model: None).bits == "equal"


class Unequal(nn.Module):
    """A bias whose gradient is a ten-thousandth of all gradients."""

    def __init__(self, lost: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.bias = nn.Parameter(torch.ones(16))
        self.lost = lost

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias * 1.0
        bias.register_hook(lambda g: g * self.lost)
        return (x.abs() * self.weight + 1e-4 * bias).sum()


def test_a_small_gradient_that_is_lost_is_wrong() -> None:
    """A tensor that is zeros instead of 0.01 % of the norm of all gradients is found."""
    model, sample = made(Unequal)
    other = copy.deepcopy(model)
    other.lost = 0.0
    verdict = judge_steps(model, other, sample, num_steps=1, seeds=(0,))
    assert verdict.bits == "WRONG"
    assert "the gradient of bias is off by" in verdict.difference
    other.lost = 1 + 1e-6
    assert judge_steps(model, other, sample, num_steps=1, seeds=(0,)).bits == "right"


class Attention(nn.Module):
    """BERT's attention, its scores once by one product and once head by head."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.by_hand = by_hand

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (4, 4)).transpose(-2, -3)
            for part in (self.query, self.key, self.value)
        )
        if self.by_hand:
            weights = ((q * 0.5) @ k.transpose(-1, -2)).exp()
            h = (weights / weights.sum(-1, keepdim=True)) @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v)
        return h.square().mean()


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_that_are_zero_but_for_rounding_are_no_mistake(autocast: bool) -> None:
    """The gradient of a key's bias is nothing but rounding; a query's bias still counts."""
    model, sample = made(Attention)
    other = copy.deepcopy(model)
    other.by_hand = True
    context = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with context:
        found = [next(iter(lane_results(m, sample))).tensors for m in (model, other)]
        name = "the gradient of key.bias"
        a, b = (results[name] for results in found)
        assert a is not None
        assert b is not None
        assert (a - b).norm() > 0.5 * a.norm()  # by its own norm it would be wrong
        verdict = judge_steps(model, other, sample)
    assert verdict.bits == "right", verdict.difference
    if not autocast:
        other.query.bias.register_hook(lambda g: g * 0)
        verdict = judge_steps(model, other, sample)
        assert "the gradient of query.bias is off by 1 of its" in verdict.difference


def lane_results(model: nn.Module, sample: Tensor) -> list[StepResults]:
    """What a step leaves."""
    with preserve_state(model, sample, None, "sgd"):
        return [TrainingRun(model, sample, None, seed=0).step()]
