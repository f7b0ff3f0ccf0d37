"""What a planned module does in all the ways in which people use a module."""

from __future__ import annotations

import pytest
import torch

from benchmarks.testing.bitwise import (
    assert_same_tensors,
)
from planner import (
    Plan,
    PlanError,
    PlanWarning,
    optimize,
)
from planner.running.attach import applied_plan
from planner.running.planned_forward import PlannedForward
from tests.planner.small import Net, make, sample, square

from .common import assert_same_after, gradients


def test_apply_changes_nothing_that_one_can_see(plan):
    """The same object, class, state_dict and attributes, but for its forward."""
    model = make()
    keys, attributes = list(model.state_dict()), set(model.__dict__)
    assert plan.apply(model) is model
    assert type(model) is Net
    assert list(model.state_dict()) == keys
    assert set(model.__dict__) - attributes == {"forward", "_remat_planned_forward"}
    assert applied_plan(model).plan is plan


def test_remove_gives_the_forward_back(plan):
    """After remove the instance has no forward of its own."""
    model = make()
    assert plan.remove(plan.apply(model)) is model
    assert "forward" not in model.__dict__
    assert applied_plan(model) is None


def test_remove_gives_an_own_forward_back(plan):
    """A forward that was set on the instance is there again."""
    model = make()
    own = model.forward
    model.forward = own
    Plan.remove(plan.apply(model))
    assert model.__dict__["forward"] is own


def test_applying_twice_keeps_one_plan(plan):
    """The second plan takes the place of the first, and one remove suffices."""
    model = make()
    other = optimize(model, sample(), budget_gb=1, loss_fn=square)
    plan.apply(model)
    other.apply(model)
    assert applied_plan(model).plan is other
    Plan.remove(model)
    assert not isinstance(model.forward, PlannedForward)


def test_planning_a_planned_model_plans_its_own_forward(plan):
    """A plan made on a planned model is the plan of the model itself."""
    model = plan.apply(make())
    again = optimize(model, sample(), budget_bytes=plan.budget_bytes, loss_fn=square)
    assert again.fingerprint == plan.fingerprint


def test_remove_without_a_plan():
    """Nothing to remove is an error that names the model."""
    with pytest.raises(PlanError, match="no plan is applied to this Net"):
        Plan.remove(make())


def test_unknown_policy(plan):
    """A misspelt policy is refused before anything is applied."""
    model = make()
    with pytest.raises(ValueError, match=r"'error', 'unplanned', 'replan'.*'eror'"):
        plan.apply(model, on_shape_change="eror")
    assert "forward" not in model.__dict__


def test_the_signature_stays(plan):
    """inspect.signature, which trainers use to choose columns, sees the model's own names."""
    import inspect

    model = plan.apply(make())
    assert list(inspect.signature(model.forward).parameters) == ["x", "scale"]


def test_eval_runs_the_own_forward(plan):
    """In eval mode any shape is fine and outputs are those of the plain model."""
    plain, planned = make().eval(), plan.apply(make()).eval()
    assert torch.equal(plain(sample(rows=3)), planned(sample(rows=3)))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_own_forward_runs(plan, context):
    """Training mode without gradients takes any shape."""
    model = plan.apply(make())
    with context():
        assert not model(sample(rows=3)).requires_grad


def test_training_goes_on_after_eval(plan):
    """Validation between two steps leaves the steps as they are."""

    def run(model):
        for i in range(2):
            model.train()
            model.zero_grad()
            square(model(sample(i))).backward()
            model.eval()
            model(sample(7, rows=5))

    assert_same_after(run, plan)


@pytest.mark.slow
def test_a_planned_model_in_torch_compile(plan):
    """torch.compile around a planned model leaves the planned step alone."""
    plain, planned = make(), plan.apply(make())
    for model in (plain, torch.compile(planned, backend="eager")):
        torch.manual_seed(1)
        square(model(sample(1))).backward()
    assert_same_tensors(gradients(plain), gradients(planned))


def test_functional_call(plan):
    """torch.func.functional_call swaps the parameters in, and the plan uses those."""
    other = {name: p.detach() + 0.1 for name, p in make().named_parameters()}
    found = []
    for model in (make(), plan.apply(make())):
        weights = {name: t.clone().requires_grad_() for name, t in other.items()}
        torch.manual_seed(1)
        square(torch.func.functional_call(model, weights, (sample(1),))).backward()
        found.append({name: t.grad for name, t in weights.items()})
    assert_same_tensors(*found)


def test_parameters_that_lie_in_memory_beside_others_are_said(plan):
    """functional_call with a second set of parameters holds both, which the budget cannot."""
    model = plan.apply(make())
    square(model(sample())).backward()
    others = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with pytest.warns(PlanWarning, match="still in memory that others took the place of"):
        square(torch.func.functional_call(model, others, (sample(),))).backward()
