"""What users of autograd do with a planned step's outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.testing.bitwise import (
    assert_same_tensors,
)
from planner import (
    Plan,
    PlanWarning,
    measure,
    optimize,
)
from planner.running.attach import applied_plan
from tests.planner.small import Heads, Net, make, plan_for, sample, square

from .common import assert_same_after


@pytest.fixture(scope="module")
def heads_plan() -> Plan:
    """A plan for ``Heads``, every output differentiated."""
    return plan_for(make(Heads), sample(), share=0.8)


def test_gradients_accumulate(plan):
    """Two backward calls without zero_grad add up; that the budget does not count it is said."""
    with pytest.warns(PlanWarning, match=r"kB of gradients are there when a planned step begins"):
        assert_same_after(lambda m: [square(m(sample(i))).backward() for i in range(2)], plan)


def test_gradients_that_fit_beside_a_step_are_not_mentioned():
    """Where the budget has room for one more set of gradients there is nothing to say."""
    model = optimize(make(), sample(), budget_gb=1, loss_fn=square).apply(make())
    for i in range(2):
        square(model(sample(i))).backward()


def test_two_forwards_before_one_backward(plan):
    """The saved tensors of two steps live side by side, which is said."""
    with pytest.warns(PlanWarning, match="counts 1. Plan with concurrent_calls=2"):
        assert_same_after(lambda m: (square(m(sample(1))) + square(m(sample(2)))).backward(), plan)


def test_a_forward_without_a_backward_is_no_second_one(plan):
    """A call whose output is dropped waits for nothing; neither does a loss kept after backward."""
    model = plan.apply(make())
    model(sample(0))
    loss = square(model(sample(1)))
    loss.backward()
    model.zero_grad()
    square(model(sample(2))).backward()
    assert applied_plan(model).planned_steps == 3


def test_two_forwards_and_their_backwards_in_either_order(plan):
    """First forward, second forward, first backward, second backward."""

    def run(model):
        losses = [square(model(sample(i))) for i in range(2)]
        for loss in losses:
            loss.backward()

    with pytest.warns(PlanWarning):
        assert_same_after(run, plan)


def test_an_output_that_was_written_to_is_noticed():
    """What backward reads of an output is looked at for writes by others, as in eager."""

    def ends_in_tanh() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 32), nn.Tanh())

    plan = optimize(make(ends_in_tanh), sample(), budget_gb=1)
    output = plan.apply(make(ends_in_tanh))(sample())
    with torch.no_grad():
        output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_retain_graph(plan):
    """Backward may run twice where the graph is retained, recomputing twice."""

    def run(model):
        loss = square(model(sample(1)))
        loss.backward(retain_graph=True)
        loss.backward()

    with pytest.warns(PlanWarning, match="retain_graph=True"):
        assert_same_after(run, plan)


def test_backward_twice_without_retaining(plan):
    """The second backward is autograd's own error."""
    loss = square(plan.apply(make())(sample(1)))
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_autograd_grad(plan):
    """torch.autograd.grad of some parameters gives the same bits as in eager."""
    found = []
    for model in (make(), plan.apply(make())):
        torch.manual_seed(1)
        chosen = [model.head.weight, model.blocks[0][0].bias]
        found.append(dict(enumerate(torch.autograd.grad(square(model(sample(1))), chosen))))
    assert_same_tensors(*found)


def test_backward_of_a_sum_of_two_outputs(heads_plan):
    """Both outputs take part in one loss."""

    def run(model):
        left, right = model(sample(1))
        (left.square().sum() + right.sum()).backward()

    assert_same_after(run, heads_plan, Heads)


def test_backward_of_several_outputs_at_once(heads_plan):
    """torch.autograd.backward with a gradient for each output, the planned step itself."""

    def run(model):
        outputs = model(sample(1))
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])

    assert_same_after(run, heads_plan, Heads)


def test_the_output_is_the_callers_to_change(plan):
    """An output may be changed in place before the loss, as in eager."""
    assert_same_after(lambda m: square(m(sample(1)).mul_(0.5)).backward(), plan)


def test_a_scalar_loss_may_be_divided_in_place():
    """``loss /= 4`` before backward, as loops that accumulate gradients do."""

    class Loss(Net):
        def forward(self, x):
            return square(super().forward(x))

    def run(model):
        loss = model(sample(1))
        loss /= 4
        loss.backward()

    assert_same_after(run, plan_for(make(Loss), sample()), Loss)


def test_a_gradient_may_be_looked_at(plan):
    """retain_grad and tensor hooks on the output see the gradient that eager sees."""
    seen = []
    for model in (make(), plan.apply(make())):
        torch.manual_seed(1)
        output = model(sample(1))
        output.retain_grad()
        hooked = []
        output.register_hook(hooked.append)
        square(output).backward()
        seen.append({"retained": output.grad, "hooked": hooked[0]})
    assert_same_tensors(*seen)


def test_a_gradient_in_another_layout(plan):
    """A transposed gradient arrives right, and that it is copied is said."""

    def run(model):
        output = model(sample(1))
        (output.t().contiguous() * torch.arange(256.0)).t().sum().backward()

    with pytest.warns(PlanWarning, match="lies in memory otherwise than planned, and is copied"):
        assert_same_after(run, plan)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_hooks_fire(plan):
    """Hooks of the root module and of parameters fire as often, in training and in backward."""

    def fired(model):
        calls = []
        model.register_forward_pre_hook(lambda m, args: calls.append("before"))
        model.register_forward_hook(lambda m, args, out: calls.append("after"))
        model.register_full_backward_hook(lambda m, grads, out: calls.append("backward"))
        for name, p in model.named_parameters():
            p.register_hook(lambda g, name=name: calls.append(name))
            p.register_post_accumulate_grad_hook(lambda p, name=name: calls.append(f"{name} done"))
        square(model(sample(1))).backward()
        return sorted(calls)

    assert fired(plan.apply(make())) == fired(make())


def test_a_parameter_hook_changes_the_gradient(plan):
    """What a hook returns is what is accumulated."""

    def run(model):
        model.head.weight.register_hook(lambda g: g * 3)
        square(model(sample(1))).backward()

    assert_same_after(run, plan)


def test_a_gradient_is_not_shared(plan):
    """No two gradients lie in one memory, so that each may be scaled in place."""
    model = plan.apply(make())
    square(model(sample(1))).backward()
    places = [p.grad.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_optimizers_step(plan, kind):
    """Three steps of an optimizer leave the same weights."""

    def run(model):
        optimizer = kind(model.parameters(), lr=0.01)
        for i in range(3):
            optimizer.zero_grad()
            square(model(sample(i))).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()

    assert_same_after(run, plan)


def test_nothing_is_left_after_a_step(plan):
    """A second step takes no more memory than the first."""
    model = plan.apply(make())
    first, second = (measure(model, sample(), loss_fn=square, repeats=0) for _ in range(2))
    assert first.peak_bytes == second.peak_bytes <= plan.budget_bytes


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")
def test_a_nan_under_anomaly_detection_is_said_to_be_in_the_planned_step(plan):
    """Autograd's own error names one function for the whole step."""
    model = plan.apply(make())
    with (
        torch.autograd.detect_anomaly(),
        pytest.warns(PlanWarning, match=r"unplanned\(model\)"),
        pytest.raises(RuntimeError, match="nan values"),
    ):
        model(sample() * float("nan")).sum().backward()


def test_anomaly_detection(plan):
    """Under detect_anomaly, as in eager."""

    def run(model):
        with (
            pytest.warns(UserWarning, match="Anomaly Detection"),
            torch.autograd.detect_anomaly(),
        ):
            square(model(sample(1))).backward()

    assert_same_after(run, plan)
