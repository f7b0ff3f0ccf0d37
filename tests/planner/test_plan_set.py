"""Plans for several calls of one model, applied and saved together."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.testing.bitwise import assert_same_tensors
from planner import (
    CallMismatchError,
    InfeasibleBudgetError,
    Plan,
    PlanError,
    PlanMismatchError,
    PlanSet,
    applied_plan,
    optimize,
)
from planner.running import planned_forward
from tests.planner.small import Heads, make, plan_for, sample


class Labelled(nn.Module):
    """Returns a loss with labels, and logits without."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(24, 24), nn.GELU())))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.dropout(self.layers(x))
        return x if labels is None else (x - labels).square().mean()


@pytest.fixture(scope="module")
def plans() -> PlanSet:
    """With labels, without, and under autocast."""
    model = make(Labelled)
    call = {"x": sample(width=24), "labels": sample(1, width=24)}
    plan = plan_for(model, call)
    without = plan.for_call(model, (call["x"],))
    with torch.autocast("cpu", torch.bfloat16):
        lower = plan.for_call(model, call)
    return PlanSet((plan, without, lower))


def steps(model: nn.Module) -> list[Tensor]:
    """Three kinds of steps, twice in turn; the gradients after each."""
    found: list[Tensor] = []
    x, labels = sample(2, width=24), sample(3, width=24)
    for seed in range(2):
        torch.manual_seed(seed)
        model.zero_grad()
        model(x, labels=labels).backward()
        found += [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model(x).square().mean().backward()
        found += [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x=x, labels=labels)
        loss.backward()
        found += [p.grad.clone() for p in model.parameters()]
    return found


def same(one: list[Tensor], other: list[Tensor]) -> None:
    assert_same_tensors(dict(enumerate(one)), dict(enumerate(other)))


def test_each_call_runs_by_its_plan(plans: PlanSet) -> None:
    """Nothing is captured in the loop, and nothing else is let through."""
    model = plans.apply(make(Labelled))
    same(steps(make(Labelled)), steps(model))
    found = applied_plan(model)
    assert found is not None
    assert (found.planned_steps, found.captures) == (6, 0)
    with pytest.raises(CallMismatchError):
        model(sample(rows=3, width=24))
    Plan.remove(model)
    assert applied_plan(model) is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_all_plans(plans: PlanSet, copied: Callable[[nn.Module], nn.Module]) -> None:
    """Copies and pickles of a planned model run each call by its plan, too."""
    model = plans.apply(make(Labelled))
    same(steps(make(Labelled)), steps(copied(model)))


def test_plans_share_budget_and_rules(plans: PlanSet) -> None:
    """Each of them is made with the first one's budget."""
    assert len({p.budget_bytes for p in plans}) == 1
    assert all(p.predicted_peak_bytes <= p.budget_bytes for p in plans)
    assert [p.guard.autocast for p in plans] == [None, None, "bfloat16"]


def test_one_file_has_them_all(plans: PlanSet, tmp_path: Path) -> None:
    """Saved and loaded they train as before; a plan's own file is a set of one."""
    plans.save(tmp_path / "plans.json")
    loaded = PlanSet.load(tmp_path / "plans.json")
    assert [p.fingerprint for p in loaded] == [p.fingerprint for p in plans]
    same(steps(make(Labelled)), steps(loaded.apply(make(Labelled))))
    plans[0].save(tmp_path / "plan.json")
    assert len(PlanSet.load(tmp_path / "plan.json")) == 1
    with pytest.raises(PlanError, match=r"PlanSet\.load"):
        Plan.load(tmp_path / "plans.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plans": []}, "at least one"),
        ({"plans": {}}, "list of plans"),
        ({"plan_set_version": 2}, "plan_set_version"),
        ({"plan_set_version": True}, "plan_set_version"),
        ({"more": 1}, "plan_set_version"),
        ({"plans": [{"schema_version": 2}]}, r"plans\[0\]"),
    ],
)
def test_a_damaged_file_is_refused(
    plans: PlanSet, tmp_path: Path, change: dict, message: str
) -> None:
    """The error names the place."""
    path = tmp_path / "plans.json"
    plans.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(PlanError, match=message):
        PlanSet.load(path)


def test_plans_that_a_loop_made_are_kept_for_the_next(plans: PlanSet, tmp_path: Path) -> None:
    """What "adapt" made in one run is saved, and the next run captures nothing anew."""
    model = plans[0].apply(make(Labelled), on_shape_change="adapt")
    same(steps(make(Labelled)), steps(model))
    found = PlanSet.of(model)
    assert len(found) == 3
    found.save(tmp_path / "plans.json")
    again = PlanSet.load(tmp_path / "plans.json").apply(make(Labelled))
    same(steps(make(Labelled)), steps(again))
    applied = applied_plan(again)
    assert applied is not None
    assert applied.captures == 0


def test_nothing_is_applied_when_one_does_not_fit(plans: PlanSet) -> None:
    """A set with a plan for another model leaves the model, and its plan, as they were."""
    other = optimize(make(Heads), sample(), budget_gb=1)
    model = make(Labelled)
    with pytest.raises(PlanMismatchError):
        PlanSet((plans[0], other)).apply(model)
    assert applied_plan(model) is None
    plans[0].apply(model)
    with pytest.raises(PlanMismatchError):
        PlanSet((plans[1], other)).apply(model)
    applied = applied_plan(model)
    assert applied is not None
    assert applied.plan.fingerprint == plans[0].fingerprint


def test_a_call_that_does_not_fit_the_budget(plans: PlanSet) -> None:
    """A larger call ahead of time is refused with the least budget."""
    with pytest.raises(InfeasibleBudgetError, match="least budget"):
        plans[0].for_call(make(Labelled), sample(rows=20000, width=24))


def test_no_plans() -> None:
    """An empty set and a model without a plan are errors."""
    with pytest.raises(ValueError, match="at least one"):
        PlanSet(())
    with pytest.raises(PlanError, match="no plan is applied"):
        PlanSet.of(make(Labelled))


def test_no_plan_that_was_made_ahead_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that may not make plans keeps all it was given; plans it made go before them."""
    monkeypatch.setattr(planned_forward, "MAX_CALLS", 1)
    model = make()
    plan = optimize(model, sample(), budget="100%")
    ahead = [plan.for_call(model, sample(rows=rows)) for rows in (30, 40, 50)]
    PlanSet((plan, *ahead)).apply(model)
    for rows in (256, 30, 40, 50, 30):
        model(sample(rows=rows)).sum().backward()
    PlanSet((plan, *ahead)).apply(model, on_shape_change="adapt")
    for rows in (60, 70, 30, 40, 50):
        model(sample(rows=rows)).sum().backward()
    applied = applied_plan(model)
    assert applied is not None
    assert applied.captures == 2
    assert len(applied.other_plans) == len(ahead) + 1
