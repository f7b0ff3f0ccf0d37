"""What a step differentiates, and the order in which it does things."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.testing.zoo import (
    ZOO,
    cases,
)
from planner.base.training_step import (
    build_optimizer,
    call_model,
    differentiate,
    train_step,
)


def leaf(*shape: int) -> torch.Tensor:
    return torch.ones(shape, requires_grad=True)


def test_loss_fn_comes_before_everything_else():
    """A loss_fn decides even where the output has a loss of its own."""
    output = SimpleNamespace(loss=leaf(), logits=leaf(3))
    target = differentiate(output, lambda o: o.logits.sum())
    assert target.loss is not None
    assert target.loss.item() == 3


def test_a_loss_attribute_is_the_loss():
    """output.loss alone is differentiated."""
    output = SimpleNamespace(loss=leaf(), logits=leaf(3))
    assert differentiate(output).tensors == (output.loss,)


def test_a_scalar_output_is_the_loss():
    """A tensor of one element is its own loss."""
    output = leaf()
    assert differentiate(output).loss is output


def test_a_key_named_loss_in_a_plain_dict_is_one_output_of_many():
    """Other outputs are not detached behind the user's back."""
    output = {"loss": leaf(), "auxiliary": leaf()}
    target = differentiate(output)
    assert target.loss is None
    assert len(target.tensors) == 2


def test_every_output_that_requires_grad_is_differentiated_once():
    """Integers and detached tensors are left out, repeated ones count once."""
    a, b = leaf(2), leaf(3)
    target = differentiate((a, {"b": b, "again": [a]}, torch.arange(3), torch.ones(2), None))
    assert target.tensors == (a, b)


def test_nothing_to_differentiate_is_an_error():
    """A model without trainable parameters has no step."""
    with pytest.raises(ValueError, match="no output of the model requires grad"):
        differentiate((torch.ones(2), "text"))


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (leaf(2), ValueError, r"must be a scalar; got a tensor of shape \(2,\)"),
        (torch.ones(()), ValueError, "does not require grad"),
        (1.0, TypeError, "got a float"),
    ],
)
def test_a_loss_that_cannot_be_differentiated_is_an_error(loss, error, message):
    """The message says what came back from loss_fn."""
    with pytest.raises(error, match=message):
        differentiate(leaf(2), lambda output: loss)


def test_the_three_forms_of_a_sample():
    """A tensor, positional arguments, keyword arguments."""

    def model(x, y=1):
        return x, y

    assert call_model(model, (2, 3)) == (2, 3)
    assert call_model(model, {"y": 4, "x": 5}) == (5, 4)
    assert call_model(model, torch.ones(1))[1] == 1
    with pytest.raises(TypeError, match="got a int"):
        call_model(model, 3)


def test_the_backward_pass_is_outside_autocast():
    """Autocast is off while gradients are computed, and on again afterwards."""
    seen = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch.is_autocast_enabled("cpu"))
            return grad

    with torch.autocast("cpu", torch.bfloat16):
        train_step(lambda x: Spy.apply(x).sum(), leaf(2))
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]


def test_autocast_around_the_step_equals_autocast_around_the_forward_pass():
    """train_step under autocast gives the gradients of the usual training loop."""
    case = ZOO["mlp_bf16"]("tiny")
    first, second = case.make(), case.make()
    x = case.sample(0)
    torch.manual_seed(1)
    with case.context():
        train_step(first, x, case.loss_fn)
    torch.manual_seed(1)
    with case.context():
        loss = case.loss_fn(second(x))
    loss.backward()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_optimizers_are_known_by_name():
    """Frozen parameters are left out; an unknown name lists the known ones."""
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizer = build_optimizer("AdamW", model.parameters())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert len(optimizer.param_groups[0]["params"]) == 1
    with pytest.raises(ValueError, match=r"unknown optimizer 'lion'; known by name: .*adamw"):
        build_optimizer("lion", model.parameters())


@pytest.mark.parametrize("case", cases("tiny"))
def test_every_model_of_the_zoo_trains(case):
    """Each gets gradients, the same ones for the same seed, and other ones for another."""
    model, sample = case.make(), case.sample(0)

    def gradients(seed: int) -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(seed)
        with case.context():
            train_step(model, sample, case.loss_fn)
        return [p.grad for p in model.parameters() if p.grad is not None]

    first, second = gradients(1), gradients(1)
    assert first
    assert all(torch.isfinite(g).all() for g in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("case", cases("tiny"))
def test_samples_of_the_zoo_leave_the_generator_alone(case):
    """A sample depends on its seed alone."""
    before = torch.get_rng_state()
    case.sample(3)
    assert torch.equal(before, torch.get_rng_state())
