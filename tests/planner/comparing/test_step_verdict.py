"""Steps are told apart: equal, right to rounding, wrong, or not comparable."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planner.comparing.step_verdict import _distance, judge_steps, slope_error, verdict_word

from .peer_models import Stack, Statistics, made


@pytest.mark.parametrize(
    ("loss_error", "error", "dtype", "draws", "expected"),
    [
        (0.0, 0.0, None, True, "equal"),
        (1e-7, 1e-6, None, True, "right"),
        (1e-7, 0.3, None, True, "WRONG"),
        (0.3, 0.3, None, True, "other draws"),
        (0.3, 0.3, None, False, "WRONG"),
        (math.nan, 0.3, None, True, "other draws"),
        (1e-7, math.inf, None, True, "WRONG"),
        (1e-3, 1e-2, torch.bfloat16, True, "right"),
        (1e-3, 0.3, torch.bfloat16, True, "WRONG"),
    ],
)
def test_errors_are_judged_where_the_loss_is_eager_s(
    loss_error: float, error: float, dtype: torch.dtype | None, draws: bool, expected: str
) -> None:
    """Another loss means other dropout masks, or a mistake where nothing is drawn."""
    assert verdict_word(loss_error, error, dtype, draws=draws) == expected


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
        ("gradient", "WRONG", "all gradients together are off by 0.5 "),
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


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("expected", "actual", "error"),
    [
        ([3.0, 4.0, -INF, NAN], [3.0, 4.0, -INF, NAN], 0.0),
        ([3.0, 4.0, -INF, NAN], [3.0, 4.5, -INF, NAN], 0.1),
        ([3.0, 4.0, INF], [3.0, 4.0, 5.0], INF),
        ([3.0, 4.0, 5.0], [3.0, 4.0, NAN], INF),
        ([3.0, 4.0, INF], [3.0, 4.0, -INF], INF),
        ([3.0, 4.0, INF], [3.0, 4.0, NAN], INF),
        ([3.0, INF], None, INF),
        ([3.0, 4.0], None, 1.0),
        ([3.0, 4j], [3.0, 4.5j], 0.1),
    ],
)
def test_places_that_are_not_finite_must_coincide(
    expected: list[float], actual: list[float] | None, error: float
) -> None:
    """A mask of -inf is no difference and hides none; imaginary parts count."""
    found, most = _distance(
        {"buffer b": torch.tensor(expected)},
        {"buffer b": None if actual is None else torch.tensor(actual)},
        "buffer ",
    )
    assert found == pytest.approx(error)
    assert most == ("buffer b" if error else "")


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
