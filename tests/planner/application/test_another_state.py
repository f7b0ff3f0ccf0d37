"""A planned module whose state is another one than when it was planned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.testing.bitwise import (
    assert_same_tensors,
)
from planner import (
    CallMismatchError,
    PlanError,
    PlanMismatchError,
    optimize,
)
from tests.planner.small import Net, make, plan_for, sample, square

from .common import assert_same_after, gradients


def test_a_submodule_in_eval(plan):
    """A frozen batch norm is another step; the message names the module."""
    model = plan.apply(make())
    model.blocks[1][2].eval()
    with pytest.raises(CallMismatchError, match=r"'blocks\.1\.2' is in eval mode"):
        model(sample())


def test_a_parameter_frozen_after_planning(plan):
    """The message names the parameter."""
    model = plan.apply(make())
    model(sample())
    model.head.bias.requires_grad_(False)
    with pytest.raises(CallMismatchError, match=r"state\.head\.bias.*requires_grad"):
        model(sample())


def test_a_model_in_another_dtype(plan):
    """After .double() the call differs in its parameters."""
    model = plan.apply(make())
    model(sample())
    model.double()
    with pytest.raises(CallMismatchError, match="float64"):
        model(sample())


def test_parameters_with_other_strides(plan):
    """A weight whose memory is laid out differently is another step."""
    model = plan.apply(make())
    model(sample())
    weight = model.head.weight
    weight.data = weight.data.t().contiguous().t()
    with pytest.raises(CallMismatchError, match=r"state\.head\.weight has strides"):
        model(sample())


def test_autocast_on(plan):
    """A plan in float32 is not for autocast; the message has both."""
    model = plan.apply(make())
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(CallMismatchError, match="autocast is bfloat16, planned was off"),
    ):
        model(sample())


def test_autocast_off():
    """A plan under autocast is not for float32."""
    with torch.autocast("cpu", torch.bfloat16):
        plan = plan_for(make(), sample(), loss_fn=square, share=0.7)
    with pytest.raises(CallMismatchError, match="autocast is off, planned was bfloat16"):
        plan.apply(make())(sample())


def test_a_replaced_submodule_of_the_same_shape_is_used(plan):
    """A new head takes part in the next step; the old one gets no gradient."""

    def run(model):
        square(model(sample(1))).backward()
        model.zero_grad()
        model.head = make(lambda: nn.Linear(32, 4), seed=5)
        square(model(sample(2))).backward()

    assert_same_after(run, plan)


def test_a_replaced_submodule_of_another_kind_is_refused(plan):
    """A module that computes something else is not run by the old plan."""
    model = plan.apply(make())
    model(sample())
    model.blocks[1][1] = nn.ReLU()
    with pytest.raises(PlanMismatchError, match="operator"):
        model(sample())


def test_a_deleted_parameter_is_named(plan):
    """A parameter that is gone is a mismatch, no KeyError."""
    model = plan.apply(make())
    model(sample())
    model.head.bias = None
    with pytest.raises(PlanError, match=r"head\.bias"):
        model(sample())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32, bias=False)
        self.second = nn.Linear(32, 32, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x).sigmoid().exp()))


def test_an_untied_weight_is_noticed():
    """Weights that were one when planned and are two now are another step."""
    plan = optimize(make(Tied), sample(), budget_gb=1, loss_fn=square)
    model = plan.apply(make(Tied))
    model(sample())
    model.second.weight = nn.Parameter(torch.zeros(32, 32))
    with pytest.raises(PlanMismatchError, match="another model"):
        model(sample())


def test_replaced_parameters_are_used(plan):
    """A parameter that was assigned anew is the one that is trained."""

    def run(model):
        square(model(sample(1))).backward()
        model.zero_grad()
        model.head.weight = nn.Parameter(torch.ones(4, 32))
        square(model(sample(2))).backward()

    assert_same_after(run, plan)


def test_loading_weights_after_apply(plan):
    """load_state_dict works as before, and the next step uses the new weights."""

    def run(model):
        square(model(sample(1))).backward()
        model.zero_grad()
        model.load_state_dict(make(seed=9).state_dict())
        square(model(sample(2))).backward()

    assert_same_after(run, plan)


def test_a_model_with_other_weights(plan):
    """A plan holds no weights: it trains any model of the same shape."""
    plain, planned = make(seed=3), plan.apply(make(seed=3))
    for model in (plain, planned):
        torch.manual_seed(1)
        square(model(sample(1))).backward()
    assert_same_tensors(gradients(plain), gradients(planned))


class Wider(Net):
    def __init__(self) -> None:
        super().__init__(64)


class OtherActivation(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1][1] = nn.ReLU()


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (Wider, r"state\.blocks\.0\.0\.weight is float32\[64, 64\].*planned was float32\[32, 32\]"),
        (OtherActivation, r"aten\.relu.*blocks\.1\.1.*planned was"),
        (lambda: nn.Linear(32, 4), r"state\.blocks\.0\.0\.weight is missing"),
        (lambda: make().requires_grad_(False), r"planned was float32.*requires_grad"),
        (lambda: make().double(), "float64"),
    ],
)
def test_another_model_is_refused_with_the_difference(plan, kind, named):
    """The message names the first thing that differs, and the model stays unplanned."""
    model = make(kind)
    with pytest.raises(PlanMismatchError, match=named):
        plan.apply(model)
    assert "forward" not in model.__dict__


def test_another_torch_version_is_refused(plan):
    """A plan of another version of torch is refused with both versions."""
    import dataclasses

    other = dataclasses.replace(plan, torch_version="1.0.0")
    with pytest.raises(PlanMismatchError, match=rf"1\.0\.0.*{torch.__version__[:4]}"):
        other.apply(make())


def test_apply_leaves_training_flags_and_generator(plan):
    """Applying to a model in eval mode captures it as planned and puts it back."""
    model = make().eval()
    before = torch.get_rng_state()
    plan.apply(model)
    assert not any(module.training for module in model.modules())
    assert torch.equal(before, torch.get_rng_state())
