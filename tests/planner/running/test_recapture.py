"""Plans for other calls that ``"replan"`` makes: what is captured, and how often."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from benchmarks.testing.bitwise import assert_same_tensors
from planner import (
    CaptureError,
    InfeasibleBudgetError,
    PlanWarning,
    applied_plan,
)
from planner import optimize as make_plan
from planner.planning.make_plan import replan
from planner.running.recapture import capture_for
from tests.planner.small import Net, make, sample, square


class Routes(Net):
    """Picks rows by their values where there are few of them."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        h = super().forward(x, scale)
        return h if len(x) > 100 else h[h[:, 0] > 0]


@pytest.fixture
def captures(monkeypatch) -> list[str]:
    """Which of the two ways to capture was taken, in order."""
    found: list[str] = []
    for name, place, own in (
        ("capture_for", "planner.running.planned_call.capture_for", capture_for),
        ("replan", "planner.plan.replan", replan),
    ):

        def counting(*args, own=own, name=name, **options):
            found.append(name)
            return own(*args, **options)

        monkeypatch.setattr(place, counting)
    return found


def planned(kind=Net, **options) -> nn.Module:
    options = {"budget_gb": 1, "loss_fn": square, **options}
    return make_plan(make(kind), sample(), **options).apply(make(kind), on_shape_change="replan")


def trained(model: nn.Module, rows: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model.zero_grad()
    loss = square(model(sample(rows=rows)))
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}


def test_a_call_that_cannot_be_captured_is_captured_once(captures):
    """The same error is raised again, and other calls go on."""
    eager, model = make(Routes), planned(Routes)
    messages = []
    for _ in range(3):
        with pytest.raises(CaptureError) as caught:
            model(sample(rows=17))
        messages.append(str(caught.value))
    assert captures == ["replan"]
    assert len(set(messages)) == 1
    assert_same_tensors(trained(eager, 200), trained(model, 200))


def test_a_call_that_no_budget_holds_is_planned_once(captures):
    """An error about the budget keeps its numbers."""
    eager = make_plan(make(), sample(), budget_gb=1, loss_fn=square)
    model = planned(budget_gb=None, budget_bytes=eager.baseline_peak_bytes)
    least = []
    for _ in range(2):
        with pytest.raises(InfeasibleBudgetError) as caught:
            model(sample(rows=5000))
        least.append(caught.value.min_budget_bytes)
    assert captures == ["replan"]
    assert least[0] == least[1]


def test_another_call_of_a_changed_model_captures_no_plan_but_its_own(captures):
    """Arguments are compared first: plans for other arguments are left as they are."""
    eager, model = make(), planned()
    trained(model, 256)
    trained(model, 100)
    trained(model, 200)
    captures.clear()
    eager.dropout.p = model.dropout.p = 0.3
    assert_same_tensors(trained(eager, 100), trained(model, 100))
    assert captures == ["capture_for"]


def test_a_plan_that_a_change_has_made_useless_is_tried_once(captures):
    """Calls in turn on a model that has become another one are captured once each."""
    eager, model = make(), planned()
    for rows in (256, 200):
        trained(model, rows)
    for m in (eager, model):
        m.blocks[0][1].register_forward_hook(lambda _m, _args, out: out * 0.5)
    for rows in (256, 200):
        assert_same_tensors(trained(eager, rows), trained(model, rows))
    captures.clear()
    for rows in (256, 200, 256, 200):
        trained(model, rows)
    assert captures == []


def test_steps_are_counted_once_after_parameters_are_replaced():
    """Old parameters live on; a step that then passes the plans by is one, and is said."""
    model = planned()
    for rows in (256, 200):
        trained(model, rows)
    old = list(model.parameters())
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            module._parameters[name] = nn.Parameter(parameter.detach().clone())
    for rows in (256, 200, 256, 200):
        trained(model, rows)
    assert applied_plan(model).planned_steps == 6
    assert applied_plan(model).unplanned_steps == 0
    model.forward = lambda x: type(model).forward(model, x)
    with pytest.warns(PlanWarning, match="its forward was replaced by"):
        trained(model, 256)
    assert applied_plan(model).unplanned_steps == 1
    assert not any(p._post_accumulate_grad_hooks for p in old)


def test_a_module_that_was_replaced_is_let_go_of(captures):
    """And is known again where the loop has kept it and puts it back."""
    layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    x = torch.ones(2, 4)
    model = nn.Sequential(layers[0], nn.Tanh())
    make_plan(model, x, budget_gb=1).apply(model, on_shape_change="replan")
    for layer in (*layers, *layers):
        model[0] = layer
        model(x).sum().backward()
    assert captures == ["capture_for"]
    gone = weakref.ref(layers[0])
    del layer, layers
    gc.collect()
    assert gone() is None
