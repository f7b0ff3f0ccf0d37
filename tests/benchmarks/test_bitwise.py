"""The equality helper can fail, and says where."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.testing.bitwise import (
    assert_same_training,
    same_bits,
)
from benchmarks.testing.zoo import cases


@pytest.mark.parametrize("case", cases("tiny"))
def test_a_model_trains_like_itself(case):
    """Eager PyTorch is deterministic on every model of the zoo."""
    assert_same_training(
        case.build, lambda model: model, case.sample, loss_fn=case.loss_fn, context=case.context
    )


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def sample(seed: int) -> torch.Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))


def disturbed(disturb):
    """Run ``disturb(model)`` after each forward pass."""

    def apply(model: nn.Module) -> nn.Module:
        def hook(module: nn.Module, args: object, output: object) -> None:
            disturb(module)

        model.register_forward_hook(hook)
        return model

    return apply


@pytest.mark.parametrize(
    ("disturb", "message"),
    [
        (
            lambda m: m[1].num_batches_tracked.add_(1),
            "in step 1 of 3: buffer 1.num_batches_tracked differs, 1 of 1 values",
        ),
        (lambda m: torch.rand(1), "state of the CPU generator differs"),
        (lambda m: m[0].bias.requires_grad_(False), "gradient of 0.bias is"),
    ],
)
def test_a_disturbance_is_found_and_named(disturb, message):
    """A buffer, the generator, a gradient that is missing."""

    with pytest.raises(AssertionError, match=message):
        assert_same_training(build, disturbed(disturb), sample)


def test_an_error_is_reported_with_its_size():
    """The first tensor that differs is named with its largest absolute error."""

    def apply(model: nn.Module) -> nn.Module:
        model[0].bias.register_hook(lambda grad: grad + 0.5)
        return model

    with pytest.raises(
        AssertionError, match=r"gradient of 0\.bias differs, 4 of 4 .* error 5\.000e-01"
    ):
        assert_same_training(build, apply, sample)


def test_bits_are_compared_not_values():
    """Equal NaNs are the same, zeros of different sign are not."""
    nan = torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.zeros(1), -torch.zeros(1))
