"""Gradients leave as they are made, at equal bits, and hooks may use them at once."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from benchmarks.testing.bitwise import assert_same_tensors, assert_same_training
from benchmarks.testing.zoo import Case, cases
from graph_capture.folding import leaving
from planner import CallMismatchError, Plan, measure, optimize
from planner.running.planned_forward import PlannedForward
from tests.planner.small import Net, make, plan_for, sample, square


@pytest.fixture(autouse=True)
def many_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut wherever a gradient leaves."""
    monkeypatch.setattr(leaving, "SMALLEST_BYTES", 1)
    monkeypatch.setattr(leaving, "MANY_GROUPS", 10**6)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan that recomputes, dropout and batch norm included."""
    return plan_for(make(), sample(), loss_fn=square)


def segments_of(model: nn.Module) -> int:
    forward = model.forward
    assert isinstance(forward, PlannedForward)
    return len(forward._main.prepared[0].step._backward.segments)


def arrivals(model: nn.Module) -> list[str]:
    """Modules in the order in which their gradients arrive."""
    names: list[str] = []
    handles = [
        p.register_post_accumulate_grad_hook(lambda _, name=name: names.append(name))
        for name, p in model.named_parameters()
    ]
    torch.manual_seed(0)
    square(model(sample())).backward()
    for handle in handles:
        handle.remove()
    return [path for path, _ in itertools.groupby(n.rpartition(".")[0] for n in names)]


def test_gradients_arrive_in_eagers_order() -> None:
    """Module by module from the end, as without a plan."""
    plain = make()
    planned = optimize(make(), sample(), budget_gb=1, loss_fn=square).apply(make())
    assert arrivals(planned) == arrivals(plain)
    assert segments_of(planned) >= 6
    assert_same_tensors(*({n: p.grad for n, p in m.named_parameters()} for m in (plain, planned)))


def test_gradients_arrive_one_after_another_with_recomputation(plan: Plan) -> None:
    """Where a weight is read again for a recomputation its gradient waits, the others do not."""
    model = plan.apply(make())
    found = arrivals(model)
    assert len(found) >= 5
    assert found[-1].startswith("blocks.0")


@pytest.mark.parametrize("smallest_bytes", [1, 2**40], ids=["many segments", "one segment"])
def test_hooks_that_draw_get_eagers_numbers(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, smallest_bytes: int
) -> None:
    """Noise that hooks add to gradients is drawn in eager's order, recomputation or not."""
    monkeypatch.setattr(leaving, "SMALLEST_BYTES", smallest_bytes)
    found = []
    for model in (make(), plan.apply(make())):
        for p in model.parameters():
            p.register_hook(lambda g: g + torch.randn_like(g))
        torch.manual_seed(3)
        square(model(sample())).backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    assert_same_tensors(*found)


class InBackward:
    """An SGD step for each parameter when its gradient has arrived, which is then freed."""

    def __init__(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self.step)

    @staticmethod
    @torch.no_grad()
    def step(parameter: Tensor) -> None:
        parameter.sub_(parameter.grad, alpha=0.1)
        parameter.grad = None


def test_an_optimizer_in_hooks_sees_what_it_sees_in_eager(plan: Plan) -> None:
    """A parameter may change as soon as its gradient is there: nothing reads the old one."""
    plain, planned = make(), plan.apply(make())
    for model in (plain, planned):
        InBackward(model)
        for seed in range(3):
            torch.manual_seed(seed)
            square(model(sample(seed))).backward()
    assert_same_tensors(plain.state_dict(), planned.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("case", cases("tiny", "gpt2", "unet", "vit", "gpt2_bf16"))
def test_models_have_the_same_bits_and_the_same_peak(case: Case) -> None:
    """Cut at every gradient, a plan computes what it did, and takes as much memory."""
    with case.context():
        torch.manual_seed(0)
        model, call = case.make(), case.sample(0)
        plan = optimize(model, call, budget="75%", loss_fn=case.loss_fn, time_limit_s=1)
        planned = plan.apply(copy.deepcopy(model))
        found = measure(planned, call, loss_fn=case.loss_fn, repeats=0)
        assert found.peak_bytes == plan.predicted_peak_bytes
        assert segments_of(planned) > 5
    assert_same_training(
        case.make,
        plan.apply,
        case.sample,
        loss_fn=case.loss_fn,
        context=case.context,
    )


def steps(model: nn.Module) -> Iterator[Tensor]:
    for parameter in model.parameters():
        assert parameter.grad is not None
        yield parameter.grad.clone()


@pytest.mark.filterwarnings("ignore:.*retain_graph:planner.PlanWarning")
def test_a_second_backward_pass_runs_all_segments_again(plan: Plan) -> None:
    """With retain_graph=True the whole chain runs twice, and gradients add up."""
    plain, planned = make(), plan.apply(make())
    for model in (plain, planned):
        torch.manual_seed(0)
        loss = square(model(sample()))
        loss.backward(retain_graph=True)
        loss.backward()
    for one, other in zip(steps(plain), steps(planned), strict=True):
        assert torch.equal(one, other)


def test_a_backward_pass_of_a_freed_graph_is_autograds_own_error(plan: Plan) -> None:
    """As in eager, the saved tensors are gone."""
    model = plan.apply(make())
    loss = square(model(sample()))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_only_some_gradients_are_asked_for(plan: Plan) -> None:
    """torch.autograd.grad of one parameter runs the segments up to it, and no others."""
    plain, planned = make(), plan.apply(make())
    for pick in ("head.weight", "blocks.0.0.weight"):
        found = []
        for model in (plain, planned):
            torch.manual_seed(0)
            loss = square(model(sample()))
            found.append(torch.autograd.grad(loss, [model.get_parameter(pick)])[0])
        assert torch.equal(*found)


def test_what_no_gradient_needs_is_let_go_of(plan: Plan) -> None:
    """After one parameter's gradient no values wait for later segments, while the loss lives."""
    model = plan.apply(make())
    loss = square(model(sample()))
    forward = model.forward
    assert isinstance(forward, PlannedForward)
    (call,) = forward.tally.waiting
    (gradient,) = torch.autograd.grad(loss, [model.get_parameter("head.weight")])
    assert loss.grad_fn is not None
    assert gradient is not None
    assert call.values == {}


@pytest.mark.filterwarnings("ignore::planner.PlanWarning")
def test_second_derivatives_are_refused_in_every_segment(plan: Plan) -> None:
    """The gradient of a gradient is no plan's, whichever segment it left with."""
    model = plan.apply(make())
    for pick in ("head.weight", "blocks.0.0.weight"):
        loss = square(model(sample()))
        (gradient,) = torch.autograd.grad(loss, [model.get_parameter(pick)], create_graph=True)
        with pytest.raises(CallMismatchError, match="differentiated again"):
            gradient.square().sum().backward()


def test_an_input_that_requires_grad(plan: Plan) -> None:
    """Its gradient leaves with the segment that makes it."""
    call = sample().requires_grad_()
    planned_for = plan_for(make(), call, loss_fn=square)
    found = []
    for model in (make(), planned_for.apply(make())):
        x = sample().requires_grad_()
        torch.manual_seed(0)
        square(model(x)).backward()
        found.append(x.grad)
    assert torch.equal(*found)


class Tied(nn.Module):
    """The first weight is read again by the last operator of backward's way."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(32, 32, bias=False)
        self.middle = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.middle(torch.tanh(self.embed(x))))
        return torch.nn.functional.linear(torch.tanh(h), self.embed.weight.t())


def test_a_gradient_waits_for_the_last_reader_of_its_parameter() -> None:
    """A tied weight is stepped in its hook only when no recomputation reads it any more."""
    plan = plan_for(make(Tied), sample(), loss_fn=square, share=0.8)
    plain, planned = make(Tied), plan.apply(make(Tied))
    for model in (plain, planned):
        InBackward(model)
        for seed in range(2):
            square(model(sample(seed))).backward()
    assert_same_tensors(plain.state_dict(), planned.state_dict())


def test_small_steps_are_one_segment(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    """Under a megabyte of gradients another node would cost more than it brings."""
    monkeypatch.undo()
    model = plan.apply(make())
    square(model(sample())).backward()
    assert segments_of(model) == 0
    assert isinstance(model, Net)
