"""Gradients that a plan does not hold: to be differentiated again, or of some outputs alone."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn

from benchmarks.testing.bitwise import assert_same_tensors
from graph_capture.folding import leaving
from planner import CallMismatchError, PlanWarning, applied_plan, optimize, unplanned
from planner.running.autograd_chain import StepCall
from tests.planner.small import Heads, Net, make, plan_for, sample


def critic() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Dropout(0.3), nn.Linear(32, 1))


def planned(kind, x, **options) -> nn.Module:
    model = make(kind)
    return optimize(model, x, budget_gb=1, **options).apply(model)


@pytest.mark.parametrize("input_grad", [True, False])
def test_a_gradient_that_can_be_differentiated_again_is_refused(input_grad):
    """The error names the plan and both ways out, before any number is wrong."""
    x = sample(width=16).requires_grad_()
    model = planned(critic, x, loss_fn=torch.mean)
    of = [x] if input_grad else list(model.parameters())
    with pytest.warns(PlanWarning, match="retain_graph"):
        found = torch.autograd.grad(model(x).sum(), of, create_graph=True)
    assert all(g.requires_grad for g in found)
    with pytest.raises(CallMismatchError, match=r"create_graph=True.*planner\.unplanned\(model\)"):
        found[0].square().sum().backward()


def test_a_second_derivative_by_the_parameters_is_refused_in_words_of_the_plan():
    """Autograd's own error would say that a parameter was not used in the graph."""
    model = planned(critic, sample(width=16), loss_fn=torch.mean)
    parameters = list(model.parameters())
    with pytest.warns(PlanWarning, match="retain_graph"):
        first = torch.autograd.grad(model(sample(width=16)).sum(), parameters, create_graph=True)
    with pytest.raises(CallMismatchError, match=r"create_graph=True.*planner\.unplanned\(model\)"):
        torch.autograd.grad(sum(g.square().sum() for g in first), parameters)


@pytest.mark.parametrize("several", [False, True], ids=["one node", "several nodes"])
def test_a_second_derivative_by_a_weight_of_the_loss_is_refused(several, monkeypatch):
    """As GradNorm balances losses: the gradient's norm is differentiated by a task's weight."""
    if several:
        monkeypatch.setattr(leaving, "SMALLEST_BYTES", 1)
        monkeypatch.setattr(leaving, "MANY_GROUPS", 10**6)
    model = planned(Heads, sample())
    weight = torch.ones((), requires_grad=True)
    outputs = model(sample())
    shared = next(model.parameters())
    loss = weight * outputs[0].square().mean() + outputs[1].square().mean()
    with pytest.warns(PlanWarning, match="retain_graph"):
        (found,) = torch.autograd.grad(loss, shared, create_graph=True)
    with pytest.raises(CallMismatchError, match="a gradient of a planned model is differentiated"):
        torch.autograd.grad(found.norm(), weight)


def test_many_backward_passes_at_once_are_refused():
    """A vmap over backward has no rule for a plan; the error says what to do."""
    model = planned(critic, sample(width=16), loss_fn=torch.mean)
    output = model(sample(width=16))
    many = torch.ones(3, *output.shape)
    with pytest.raises(CallMismatchError, match="many backward passes at once"):
        torch.autograd.grad(output, list(model.parameters()), many, is_grads_batched=True)


def test_a_gradient_penalty_beside_planned_calls():
    """A critic's loss by the plan, the penalty on its gradient under unplanned(): eager's bits."""
    x = sample(width=16).requires_grad_()

    def trained(model: nn.Module) -> dict[str, Tensor]:
        found = {}
        for i in range(3):
            torch.manual_seed(i)
            model.zero_grad()
            y = sample(i, width=16).requires_grad_()
            loss = model(y).mean()
            with unplanned(model):
                (g,) = torch.autograd.grad(model(y).sum(), y, create_graph=True)
            (loss + (g.norm(2, 1) - 1).square().mean()).backward()
            found |= {f"{i} {n}": p.grad.clone() for n, p in model.named_parameters()}
            found[f"{i} generator"] = torch.get_rng_state()
        return found

    model = planned(critic, x, loss_fn=torch.mean)
    assert_same_tensors(trained(make(critic)), trained(model))
    applied = applied_plan(model)
    assert (applied.planned_steps, applied.unplanned_steps) == (3, 3)
    assert "was not: the loop made this call under planner.unplanned()" in str(applied)


def test_only_a_gradient_that_is_differentiated_again_is_refused():
    """create_graph=False runs by the plan and says nothing."""
    model = planned(critic, sample(width=16).requires_grad_(), loss_fn=torch.mean)
    y = sample(width=16).requires_grad_()
    (g,) = torch.autograd.grad(model(y).sum(), y)
    assert not g.requires_grad


@pytest.mark.parametrize("loss_fn", [None, lambda o: o[0].square().mean() + o[1].abs().mean()])
def test_a_backward_pass_for_each_output(loss_fn):
    """Two heads, two backward passes: eager's gradients in both orders, and it is said."""

    def run(model: nn.Module, first: int) -> list[Tensor]:
        outputs = model(sample(1))
        found = []
        for i in (first, 1 - first):
            model.zero_grad()
            outputs[i].abs().mean().backward(retain_graph=i == first)
            found.append({n: copy.deepcopy(p.grad) for n, p in model.named_parameters()})
        return found

    for first in (0, 1):
        model = planned(Heads, sample(), loss_fn=loss_fn)
        with pytest.warns(PlanWarning, match="some of the outputs alone"):
            found = run(model, first)
        for expected, actual in zip(run(make(Heads), first), found, strict=True):
            assert_same_tensors(expected, actual)


def test_an_output_that_is_not_used_is_an_error():
    """Without retain_graph nothing says that the other output will be asked for: plan the loss."""
    model = planned(Heads, sample())
    with pytest.raises(CallMismatchError, match=r"no gradient came back for output '1'.*loss_fn"):
        model(sample())[0].sum().backward()


def test_buffers_that_forward_reads_and_writes_keep_it_from_running_again():
    """A second forward would begin from another state: the error says so."""

    class Average(Heads):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(32))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.mean.mul_(0.9).add_(x.detach().mean(0))
            return super().forward(x - self.mean)

    model = planned(Average, sample())
    left, _ = model(sample())
    with pytest.raises(CallMismatchError, match="reads buffers that it has written to"):
        left.sum().backward(retain_graph=True)


# -- outputs that came back without a gradient ---------------------------------------------


class WithLoss(nn.Module):
    """Returns a loss, and the logits that it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": logits.square().mean(), "logits": logits}


def test_a_loss_made_of_an_output_that_was_not_planned_is_an_error():
    """As in distillation: the second term would get no gradient."""
    model = planned(WithLoss, sample(), loss_fn=lambda o: o["loss"])
    output = model(sample())
    assert output["logits"].requires_grad
    with pytest.raises(CallMismatchError, match=r"'logits' was not planned.*loss_fn="):
        (output["loss"] + output["logits"].abs().mean()).backward()


def test_an_output_that_was_not_planned_may_be_looked_at():
    """Metrics of it, detached, cost nothing and change nothing."""
    plan = plan_for(make(WithLoss), sample(), loss_fn=lambda o: o["loss"])
    model = plan.apply(make(WithLoss))
    output = model(sample())
    assert output["logits"].detach().argmax(1).shape == (256,)
    output["loss"].backward()
    assert applied_plan(model).planned_steps == 1


def test_a_model_that_changed_since_is_refused() -> None:
    """The own forward would be another one than the planned one."""
    plan = plan_for(make(Heads), sample(), share=0.8)
    model = plan.apply(make(Heads))
    left, right = model(sample())
    with pytest.warns(PlanWarning):
        left.sum().backward(retain_graph=True)
    model.trunk.eval()
    with pytest.raises(CallMismatchError, match="the model has changed since the call"):
        right.sum().backward()


def test_gradients_by_the_own_forward_are_handed_over_and_not_kept() -> None:
    """A gradient that a step still held would be copied by autograd, and lie in memory twice."""
    model = planned(Heads, sample())
    left, right = model(sample())
    with pytest.warns(PlanWarning, match="own forward runs again"):
        left.sum().backward(retain_graph=True)
    calls = [o for o in gc.get_objects() if type(o) is StepCall]
    assert calls
    assert all(call.own is None for call in calls)
    assert right.requires_grad
