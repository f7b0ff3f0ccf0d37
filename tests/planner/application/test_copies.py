"""Copies of planned modules, and several planned modules in one process."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from benchmarks.testing.bitwise import (
    assert_same_tensors,
    assert_same_training,
)
from planner.running.attach import applied_plan
from tests.planner.small import Net, make, plan_for, sample, square

from .common import assert_same_after


def _deepcopied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("copied", [_deepcopied, _pickled, _saved])
def test_a_copy_is_planned_and_trains_alone(plan, copied, used):
    """A copy carries the plan, has the bits of a plain copy, and leaves the original alone."""
    original = plan.apply(make())
    if used:
        square(original(sample(8))).backward()
        original.zero_grad()
        original.load_state_dict(make().state_dict())
    twin = copied(original)
    assert applied_plan(twin) is not None
    assert_same_training(make, lambda model: _with_weights(twin, model), sample, loss_fn=square)
    assert all(p.grad is None for p in original.parameters())
    assert_same_tensors(dict(make().state_dict()), dict(original.state_dict()))


def _with_weights(twin: nn.Module, model: nn.Module) -> nn.Module:
    twin.load_state_dict(model.state_dict())
    return twin


def test_a_plan_can_be_pickled(plan):
    """Without the captured step, which lives in one process."""
    twin = pickle.loads(pickle.dumps(plan))
    assert twin == plan
    assert_same_training(make, twin.apply, sample, loss_fn=square)


def test_two_planned_models_in_one_process(plan):
    """Steps of two models in turn do not disturb each other."""

    def run(model):
        other = plan.apply(make(seed=4))
        for i in range(2):
            model.zero_grad()
            other.zero_grad()
            output = model(sample(i))
            square(other(sample(i + 5))).backward()
            square(output).backward()

    assert_same_after(run, plan)


def test_a_planned_part_of_a_model():
    """Gradients flow through a planned submodule to what comes before it."""

    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(16, 32), Net(), nn.Linear(4, 1))

    plan = plan_for(make(), sample().requires_grad_(), loss_fn=square)

    def apply(model):
        plan.apply(model[1])
        return model

    assert_same_training(
        lambda: build().train(), apply, lambda i: sample(i, width=16), loss_fn=square
    )
