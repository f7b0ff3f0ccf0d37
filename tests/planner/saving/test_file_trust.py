"""Of a plan file nothing is believed but the order of runs."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graph_capture.cost_graph import CostGraph
from planner import Plan, PlanError, PlanMismatchError, optimize
from planner.running.attach import applied_plan
from planner.saving.serialize import (
    plan_from_dict,
    plan_to_dict,
)
from solvers.schedule import Schedule


class _TwoDrops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.drop(self.a(x)) + self.drop(self.b(x))).square().mean()


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu()).square().mean()


class _Stateless(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * x.cos()).mean()


def _through_file(plan: Plan, folder: Path) -> Plan:
    plan.save(folder / "plan.json")
    return Plan.load(folder / "plan.json")


def test_a_file_cannot_exchange_draws(tmp_path: Path) -> None:
    """A graph that says that draws need no order is not the one that is run."""
    plan = optimize(_TwoDrops(), torch.randn(4, 8), budget_gb=1)
    free = tuple(replace(op, ordered=False) for op in plan.graph.operators)
    drawn = [
        i for i, op in enumerate(free) if op.name.startswith("bernoulli") or "state" in op.name
    ]
    half = len(drawn) // 2
    layers = [i for i, op in enumerate(free) if op.target.startswith("aten.addmm")][:2]
    moved = [*layers, *drawn[half:], *drawn[:half]]
    order = (*moved, *(v for v in plan.schedule.order if v not in moved))
    crafted = replace(plan, graph=CostGraph(free, plan.graph.storages), schedule=Schedule(order))
    loaded = _through_file(crafted, tmp_path)
    assert loaded.fingerprint == plan.fingerprint
    with pytest.raises(PlanMismatchError, match="must come after it"):
        loaded.apply(_TwoDrops())


def test_a_file_cannot_hide_scratch(tmp_path: Path) -> None:
    """What kernels take is measured again, and the peak compared with the budget."""
    plan = optimize(_Convolutions(), torch.randn(2, 3, 16, 16), budget_gb=1)
    assert any(op.workspace_bytes for op in plan.graph.operators)
    without = tuple(replace(op, workspace_bytes=0) for op in plan.graph.operators)
    crafted = replace(plan, graph=CostGraph(without, plan.graph.storages))
    crafted = replace(crafted, budget_bytes=crafted.predicted_peak_bytes)
    with pytest.raises(PlanMismatchError, match=r"peaks at \d+ bytes, above its budget of \d+"):
        _through_file(crafted, tmp_path).apply(_Convolutions())


def test_an_applied_plan_has_the_figures_found_here(tmp_path: Path) -> None:
    """Where the budget is large enough, the plan says what the step takes here."""
    plan = optimize(_Convolutions(), torch.randn(2, 3, 16, 16), budget_gb=1)
    without = tuple(
        replace(op, workspace_bytes=0, name=f"n{i}") for i, op in enumerate(plan.graph.operators)
    )
    crafted = _through_file(replace(plan, graph=CostGraph(without, plan.graph.storages)), tmp_path)
    applied = applied_plan(crafted.apply(_Convolutions()))
    assert applied is not None
    assert applied.plan.graph == plan.graph


def test_a_plan_that_is_right_is_applied_as_it_is(tmp_path: Path) -> None:
    """Figures found here are those of the file: nothing changes."""
    plan = _through_file(
        optimize(_Convolutions(), torch.randn(2, 3, 16, 16), budget_gb=1), tmp_path
    )
    applied = applied_plan(plan.apply(_Convolutions()))
    assert applied is not None
    assert applied.plan is plan


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    """A plan as a file holds it."""
    plan = optimize(
        _Convolutions(), torch.randn(2, 3, 8, 8), budget_gb=1, loss_fn=lambda out: out * 2.0
    )
    return json.loads(json.dumps(plan_to_dict(plan)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
@pytest.mark.parametrize("place", ["argument", "tangent"])
@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_a_tensor_on_a_device_that_is_not_there_is_no_abort(
    written: dict[str, Any], place: str, device: str
) -> None:
    """PyTorch would end the process when it is asked for one."""
    data = copy.deepcopy(written)
    spec = data["call"]["arguments"]["dict"]["x"]["tensor"]
    if place == "tangent":
        spec = data["loss"]["tangents"][0]
    spec["device"] = device
    with pytest.raises(PlanMismatchError, match="this process sees 0 CUDA devices"):
        Plan.of(plan_from_dict(data)).apply(_Convolutions())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_plan_for_a_card_is_no_abort_on_a_module_without_state(tmp_path: Path) -> None:
    """Nothing of the module says where it lies; the plan does."""
    plan = optimize(_Stateless(), torch.randn(4, 4, requires_grad=True), budget_gb=1, device="h100")
    for made in (plan, _through_file(plan, tmp_path)):
        with pytest.raises(PlanMismatchError, match="CUDA devices"):
            made.apply(_Stateless())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"device": "cpu\n"}, "device"),
        ({"device": "cuda:300"}, "device"),
        ({"shape": [1] * 70, "stride": [1] * 70}, "at most 64 dimensions"),
        ({"shape": [2**40, 2**40, 1, 1]}, "no memory holds"),
        ({"shape": [0, 2**50, 2**50, 1]}, "no memory holds"),
        ({"stride": [2**52, 2**52, 2**52, 2**52]}, "no memory holds|above the budget"),
        ({"shape": [2**30, 3, 8, 8]}, "above the budget"),
        ({"shape": [1, 2]}, "do not fit"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(
    written: dict[str, Any], change: dict[str, Any], named: str
) -> None:
    """While the file is read, before anything is made of it."""
    data = copy.deepcopy(written)
    data["call"]["arguments"]["dict"]["x"]["tensor"].update(change)
    with pytest.raises(PlanError, match=named):
        plan_from_dict(data)


def test_a_call_that_the_module_cannot_get_is_refused(written: dict[str, Any]) -> None:
    """An argument that forward does not have, a module that is not there."""
    data = copy.deepcopy(written)
    data["call"]["arguments"]["dict"]["y"] = {"value": 1}
    with pytest.raises(PlanMismatchError, match="forward has no argument 'y'"):
        Plan.of(plan_from_dict(data)).apply(_Convolutions())
    data = copy.deepcopy(written)
    data["call"]["evaluating"] = ["c"]
    with pytest.raises(PlanMismatchError, match="module 'c'"):
        Plan.of(plan_from_dict(data)).apply(_Convolutions())


def test_what_is_saved_can_be_loaded(tmp_path: Path) -> None:
    """Budgets and times above what a double holds exactly; what is larger is refused at once."""
    x = torch.randn(2, 3, 8, 8)
    for options in (
        {"budget_bytes": 2**60},
        {"budget_gb": 1, "cost_model": lambda call: 1e13},
    ):
        plan = optimize(_Convolutions(), x, **options)
        assert _through_file(plan, tmp_path) == plan
    for options in (
        {"budget_bytes": 2**80},
        {"budget_bytes": 10**400},
        {"budget_gb": 1e300},
        {"budget_gb": 1, "cost_model": lambda call: 1e306},
        {"budget_gb": 1, "cost_model": lambda call: 10**400},
        {"budget_gb": 1, "cost_model": lambda call: float("inf")},
    ):
        with pytest.raises(ValueError, match=r"budget|cost_model"):
            optimize(_Convolutions(), x, **options)


def test_what_cannot_be_loaded_is_not_saved(tmp_path: Path) -> None:
    """A plan that somebody changed by hand."""
    plan = optimize(_Convolutions(), torch.randn(2, 3, 8, 8), budget_gb=1)
    for wrong in (replace(plan, budget_bytes=2**63), replace(plan, solve_s=float("inf"))):
        with pytest.raises(PlanError, match="cannot be written"):
            wrong.save(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def test_control_characters_of_a_file_are_shown(written: dict[str, Any]) -> None:
    """A terminal would obey them."""
    data = copy.deepcopy(written)
    data["solver"]["name"] = "\x1b]0;title\x07\x1b[2J"
    data["costs"]["device"] = "x\r\x1b[31m\n\u202e"
    data["operators"][0]["module_path"] = "\x1b[2J"
    text = str(Plan.of(plan_from_dict(data)))
    assert all(line.isprintable() for line in text.split("\n"))
    assert r"\x1b[2J" in text
    data["call"]["state"]["\x1b[2J"] = data["call"]["state"]["a.weight"]
    with pytest.raises(PlanMismatchError) as caught:
        Plan.of(plan_from_dict(data)).apply(_Convolutions())
    assert str(caught.value).isprintable()
