"""The memory behind a call's tensors counts whole and once, as eager keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planner import Plan, PlanError, PlanWarning, applied_plan, measure, optimize
from planner.saving.serialize import plan_to_dict
from tests.planner.small import Net, least_bytes, make, sample, square


class Two(nn.Module):
    """Takes two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.left(x).tanh() + self.right(y).tanh()


def plan_of(model: nn.Module, call: Any, **options: Any) -> Plan:
    return optimize(model, call, budget_gb=1, loss_fn=square, **options)


def measured_bytes(model: nn.Module, call: Any, plan: Plan) -> int:
    planned = plan.apply(model)
    return measure(planned, call, loss_fn=square, repeats=0).peak_bytes


LARGE = sample(rows=1024)

CALLS = {
    "rows of a larger tensor": LARGE[:256],
    "columns of a larger tensor": sample(rows=256, width=64)[:, :32],
    "one tensor twice": (LARGE, LARGE),
    "two parts of one tensor": (LARGE[:256], LARGE[128:384]),
    "one of its own, one cut out": (sample(rows=256), LARGE[:256]),
    "expanded": (sample(rows=256), sample(rows=1).expand(256, 32)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_prediction_is_what_is_measured(call: Any, tmp_path: Path) -> None:
    """To the byte, of a plan from a file as well."""
    kind = Two if isinstance(call, tuple) else Net
    plan = plan_of(make(kind), call)
    assert measured_bytes(make(kind), call, plan) == plan.predicted_peak_bytes
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.guard == plan.guard
    assert measured_bytes(make(kind), call, loaded) == plan.predicted_peak_bytes


def test_validate_counts_a_tensor_that_is_passed_twice_once() -> None:
    """The inputs' figure is exact, too."""
    validation = plan_of(make(Two), (LARGE, LARGE)).validate(make(Two), (LARGE, LARGE), repeats=0)
    assert validation.peak.error == 0
    (inputs,) = (figure for figure in validation.at_peak if figure.name == "input")
    assert inputs.predicted == inputs.measured == LARGE.untyped_storage().nbytes()


def test_a_range_is_planned_in_the_memory_of_its_sample() -> None:
    """The largest call, too, is taken for a part of the tensor that the sample is cut from."""
    plan = plan_of(make(), LARGE[:8], shapes={"x": {0: 256}})
    assert measured_bytes(make(), LARGE[256:512], plan) == plan.predicted_peak_bytes


def test_larger_inputs_than_planned_are_said() -> None:
    """Where the loop's batches are slices and the sample was none, and the budget may not hold."""
    alone = LARGE[:256].clone()
    keeps_all = plan_of(make(), alone)
    plan = optimize(
        make(), alone, budget_bytes=keeps_all.predicted_peak_bytes, loss_fn=square, time_limit_s=1
    )
    model = plan.apply(make())
    model(alone.clone())
    with pytest.warns(PlanWarning, match=r"98\.3 kB of memory is kept by inputs that are slices"):
        plan.apply(make())(LARGE[:256])
    with pytest.warns(PlanWarning, match=r"98\.3 kB of memory is kept by inputs that are slices"):
        model(LARGE[:256])  # though a call of these shapes is known


def test_inputs_that_were_one_tensor_at_first_are_said() -> None:
    """Each of the two alone is as large as the one that the sample passed twice."""
    one = sample(rows=1024)
    shared = plan_of(make(Two), (one, one))
    plan = optimize(
        make(Two),
        (one, one),
        budget_bytes=shared.predicted_peak_bytes,
        loss_fn=square,
        time_limit_s=1,
    )
    model = plan.apply(make(Two))
    model(one, one)
    with pytest.warns(PlanWarning, match="or that were one tensor in the sample"):
        model(one, one.clone())


class Writes(nn.Module):
    """Writes to its first argument after it has read the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        before = self.layer(y * 3 + 1)
        x.mul_(2)
        return (before.tanh() * self.layer(x + 0)).sum()


def test_what_is_written_over_may_be_another_argument_too() -> None:
    """The second argument is read again only as it was, with two arguments in one memory."""
    call = sample(rows=1024), sample(rows=1024)
    budget_bytes = least_bytes(make(Writes), call)
    plan = optimize(make(Writes), call, budget_bytes=budget_bytes, time_limit_s=1)
    plain, planned = make(Writes), plan.apply(make(Writes))
    for model in (plain, planned):
        x = sample(rows=1024)
        model(x, x).backward()
    for one, other in zip(plain.parameters(), planned.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("held", [[], [1], [131072, 0]])
def test_a_file_with_other_counts_is_refused(held: list[int], tmp_path: Path) -> None:
    """The call has one tensor of 32,768 bytes."""
    data = plan_to_dict(plan_of(make(), LARGE[:256]))
    assert data["call"]["argument_bytes"] == [131072]
    data["call"]["argument_bytes"] = held
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match="argument_bytes"):
        Plan.load(tmp_path / "plan.json")


def test_a_copy_of_another_shape_is_planned_beside_the_larger_tensor() -> None:
    """What the sample was a slice of is still there when the loop passes copies."""
    plan = optimize(make(), LARGE[:256], budget="75%", loss_fn=square, shapes="sample")
    planned, copied = plan.apply(make()), LARGE[:128].clone()
    found = measure(planned, copied, loss_fn=square, repeats=0)
    assert found.peak_bytes + LARGE.nbytes <= plan.budget_bytes
    (adapted,) = applied_plan(planned).other_plans
    assert adapted.predicted_peak_bytes == found.peak_bytes + LARGE.nbytes


def test_a_slice_of_another_shape_counts_the_larger_tensor_once() -> None:
    """It is the memory of the call itself."""
    plan = optimize(make(), LARGE[:256], budget="75%", loss_fn=square, shapes="sample")
    planned = plan.apply(make())
    found = measure(planned, LARGE[8:256], loss_fn=square, repeats=0)
    (adapted,) = applied_plan(planned).other_plans
    assert adapted.predicted_peak_bytes == found.peak_bytes
