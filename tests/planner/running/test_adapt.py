"""Calls of other shapes that ``"adapt"`` plans from the plan at hand."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from benchmarks.testing.bitwise import assert_same_tensors
from planner import InfeasibleBudgetError, Plan, PlanWarning, applied_plan, measure, optimize
from planner.planning.make_plan import make_plan
from planner.running import planned_forward
from tests.planner.small import Net, make, plan_for, sample, square


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan for 256 rows, the most that come."""
    return plan_for(make(), sample(), loss_fn=square)


@pytest.fixture
def solves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item for each call that was solved in the loop."""
    found: list[int] = []

    def counting(*args, own=make_plan):
        found.append(1)
        return own(*args)

    monkeypatch.setattr("planner.planning.adapt.make_plan", counting)
    return found


def trained(model: nn.Module, rows: int, seed: int = 0) -> dict[str, Tensor]:
    """Loss, gradients, buffers and random state after one step."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = square(model(sample(seed, rows=rows)))
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    return {"loss": loss.detach(), **grads, **buffers, "generator": torch.get_rng_state()}


ROWS = (256, 200, 17, 1 + 1, 199, 256, 17, 200)


def test_every_smaller_shape_runs_without_a_solver(plan: Plan, solves: list[int]) -> None:
    """Bits as in eager, peak within the budget, one capture for each shape, nothing said."""
    plain, planned = make(), plan.apply(make(), on_shape_change="adapt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed, rows in enumerate(ROWS):
            assert_same_tensors(trained(plain, rows, seed), trained(planned, rows, seed))
    assert solves == []
    applied = applied_plan(planned)
    assert applied is not None
    assert applied.planned_steps == len(ROWS)
    assert applied.unplanned_steps == 0
    assert applied.captures == len(set(ROWS)) - 1
    assert applied.capture_s > 0
    assert plan.predicted_peak_bytes <= applied.peak_bytes <= plan.budget_bytes


@pytest.mark.parametrize("rows", [255, 230, 150])
def test_what_is_predicted_for_a_shape_is_measured(plan: Plan, rows: int) -> None:
    """The plan that a shape got peaks where it says, and no higher than the budget."""
    model = plan.apply(make(), on_shape_change="adapt")
    trained(model, rows)
    found = applied_plan(model)
    assert found is not None
    (other,) = found.other_plans
    measured = measured_peak_bytes(model, rows)
    assert measured == other.predicted_peak_bytes <= plan.budget_bytes
    assert other.predicted_step_us >= other.lower_bound_us


def measured_peak_bytes(model: nn.Module, rows: int) -> int:
    """Peak of a real step."""
    return measure(model, sample(rows=rows), loss_fn=square, repeats=0).peak_bytes


def test_a_shape_that_the_schedule_does_not_fit_is_solved_and_said(
    plan: Plan, solves: list[int]
) -> None:
    """A few rows more than planned may fit after a solve; the loop hears of it once."""
    plain, model = make(), plan.apply(make(), on_shape_change="adapt")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for rows in (264, 266):
            assert_same_tensors(trained(plain, rows), trained(model, rows))
    assert [w.category for w in said] == [PlanWarning]
    assert "solved anew" in str(said[0].message)
    assert solves == [1, 1]
    found = applied_plan(model)
    assert found is not None
    assert found.peak_bytes <= plan.budget_bytes


def test_a_shape_that_nothing_fits_is_refused(plan: Plan) -> None:
    """Above the budget there is no step, but an error with the least budget."""
    model = plan.apply(make(), on_shape_change="adapt")
    with pytest.raises(InfeasibleBudgetError, match="least budget"):
        trained(model, 5000)


def test_another_call_is_planned_too(plan: Plan) -> None:
    """A plain argument that changes the wiring is captured, and the schedule is aligned."""
    plain, model = make(), plan.apply(make(), on_shape_change="adapt")
    for scale in (1.0, 0.5, 1.0, 0.5):
        for m in (plain, model):
            torch.manual_seed(3)
            m.zero_grad()
            square(m(sample(), scale=scale)).backward()
        grads = [{n: p.grad for n, p in m.named_parameters()} for m in (plain, model)]
        assert_same_tensors(*grads)
    found = applied_plan(model)
    assert found is not None
    assert (found.captures, found.planned_steps) == (1, 4)


def test_the_plans_used_last_are_kept(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more plans stay in memory than stated; one that has gone is made again."""
    monkeypatch.setattr(planned_forward, "MAX_CALLS", 2)
    model = plan.apply(make(), on_shape_change="adapt")
    for rows, captures in ((100, 1), (101, 2), (100, 2), (102, 3), (100, 3), (101, 4), (256, 4)):
        trained(model, rows)
        found = applied_plan(model)
        assert found is not None
        assert found.captures == captures, rows
        assert len(found.other_plans) <= 2


def test_a_copy_adapts_as_well(plan: Plan) -> None:
    """A copy keeps the policy and makes its own plans."""
    plain, model = make(), plan.apply(make(), on_shape_change="adapt")
    trained(model, 100)
    twin = copy.deepcopy(model)
    trained(plain, 100)
    assert_same_tensors(trained(plain, 90), trained(twin, 90))


def test_a_model_that_changes_takes_its_other_calls_along(plan: Plan) -> None:
    """A changed dropout is captured again for each shape that comes."""
    plain, model = make(), plan.apply(make(), on_shape_change="adapt")
    assert isinstance(plain, Net)
    assert isinstance(model, Net)
    for p in (0.2, 0.4, 0.2):
        plain.dropout.p = model.dropout.p = p
        for rows in (256, 100):
            assert_same_tensors(trained(plain, rows), trained(model, rows))


def test_a_call_that_failed_under_another_autocast_is_tried_again(plan: Plan) -> None:
    """What does not fit in float32 may fit in bfloat16."""
    model = plan.apply(make(), on_shape_change="adapt")
    more = sample(rows=2000)
    with pytest.raises(InfeasibleBudgetError) as first:
        model(more)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InfeasibleBudgetError) as second:
        model(more)
    assert str(first.value) != str(second.value)


def test_a_schedule_that_would_hold_a_gradient_longer_is_not_taken_over(
    solves: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parameter that is read after its gradient has left sends the call to the solver."""
    plan = plan_for(make(), sample(), loss_fn=square, grads="accumulated")
    model = plan.apply(make(), on_shape_change="adapt")
    asked: list[int] = []

    def late(*_: object) -> str:
        asked.append(1)
        return "'addmm' reads 'weight'"

    monkeypatch.setattr("planner.planning.adapt.late_read", late)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlanWarning)
        trained(model, 200)
    assert asked == [1]
    assert solves == [1]


def test_the_error_of_a_call_that_does_not_fit_names_it() -> None:
    """In a loop it says which call has no plan, and that its budget is a share of another's."""
    model = make()
    plan = optimize(model, sample(), budget="100%", loss_fn=square)
    plan.apply(model, on_shape_change="adapt")
    with pytest.raises(InfeasibleBudgetError) as caught:
        trained(model, 5000)
    (note,) = caught.value.__notes__
    assert "float32[5000, 32]" in note
    assert "for float32[256, 32] on cpu, 100% of its peak" in note
