"""Plans whose first runs leave eager's order: the same bits, within the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.testing.bitwise import assert_same_training
from benchmarks.testing.zoo import (
    ZOO,
    Case,
)
from graph_capture.calls.call_spec import bind_call, split_sample
from graph_capture.captured_step import CapturedStep
from planner import InfeasibleBudgetError, Plan, measure, optimize
from planner.planning.make_plan import replan
from planner.running.planned_step import PlannedStep
from planner.running.rewrite import rewrite
from solvers.any_order.permutation import first_runs, permuted, unpermuted
from solvers.any_order.reorder import reorder_runs
from solvers.least_memory import least_memory
from solvers.schedule import Schedule
from tests.capturing import capture_step
from tests.solvers.test_permutation import random_order


def capture_case(case: Case, model: torch.nn.Module) -> CapturedStep:
    arguments = bind_call(model.forward, *split_sample(case.sample(0)))
    with case.context():
        return capture_step(model, arguments, loss=case.loss_fn)


def assert_same_bits(case: Case, schedule_of: Callable[[CapturedStep], Schedule]) -> None:
    """Train by the schedule that ``schedule_of`` gives for the captured step."""

    def apply(model: torch.nn.Module) -> torch.nn.Module:
        captured = capture_case(case, model)
        step = PlannedStep(model, captured, rewrite(captured, schedule_of(captured)))
        forward = model.forward
        model.forward = lambda *args, **kwargs: step(bind_call(forward, args, kwargs))
        return model

    assert_same_training(
        case.build, apply, case.sample, loss_fn=case.loss_fn, steps=2, context=case.context
    )


SLOW = ("bert", "t5", "resnet50", "lstm", "mixture_of_experts")
"""Dropout, two inputs, batch norm, recurrence, routing."""


def some(*fast: str):
    """The named models by default, :data:`SLOW` slow."""
    names = [*fast, *(name for name in SLOW if name not in fast)]
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=() if n in fast else (pytest.mark.slow,)) for n in names]
    )


@some("unet")
def test_any_allowed_order_has_the_same_bits(name):
    """First runs in a random order that respects the predecessors train like eager."""
    assert_same_bits(
        ZOO[name]("tiny"), lambda captured: Schedule(random_order(captured.graph, seed=1))
    )


@some("transformer_encoder")
def test_a_random_order_with_recomputation_has_the_same_bits(name):
    """Solved for the least memory in a random base order, it trains like eager."""

    def schedule_of(captured: CapturedStep) -> Schedule:
        order = random_order(captured.graph, seed=5)
        graph = permuted(captured.graph, order)
        found = least_memory(graph, time_limit_s=1).schedule
        assert found.recomputed() or name in ("lstm", "many_outputs", "mlp_bf16")
        return unpermuted(found, order)

    assert_same_bits(ZOO[name]("tiny"), schedule_of)


def reordered_plan(case: Case, model: torch.nn.Module, share: float) -> Plan:
    """A plan at a share of the activations, or the least that fits, with its runs moved."""
    options: dict[str, Any] = {"loss_fn": case.loss_fn, "time_limit_s": 1.0}
    with case.context():
        keep = optimize(model, case.sample(0), budget_gb=1000, **options)
        resident = keep.graph.resident_bytes
        budget_bytes = int(resident + share * (keep.predicted_peak_bytes - resident))
        try:
            plan = optimize(model, case.sample(0), budget_bytes=budget_bytes, **options)
        except InfeasibleBudgetError as error:
            least = error.min_budget_bytes
            plan = optimize(model, case.sample(0), budget_bytes=least, **options)
    moved = reorder_runs(plan.graph, plan.schedule, budget_bytes=plan.budget_bytes)
    return replace(plan, schedule=moved)


@some("transformer_encoder")
def test_a_reordered_plan_is_exact_and_within_its_budget(name, tmp_path):
    """Saved and loaded, it trains bit by bit like eager and peaks where replay says."""
    case = ZOO[name]("tiny")
    plan = reordered_plan(case, case.make(), 0.6)
    if name in ("convnext", "transformer_encoder"):
        assert plan.schedule.recomputed()
        assert list(first_runs(plan.schedule)) != sorted(first_runs(plan.schedule))
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    planned = assert_same_training(
        case.build, loaded.apply, case.sample, loss_fn=case.loss_fn, context=case.context
    )
    with case.context():
        peak = measure(planned, case.sample(1), loss_fn=case.loss_fn, repeats=0).peak_bytes
    assert peak <= plan.budget_bytes
    assert peak == pytest.approx(plan.predicted_peak_bytes, rel=0.01)


def two_plans(case: Case, share: float, time_limit_s: float) -> tuple[Plan, Plan]:
    """Plans at a share of the baseline's peak, in eager's order and in any."""
    model, sample = case.make(), case.sample(0)
    options: dict[str, Any] = {"loss_fn": case.loss_fn, "time_limit_s": time_limit_s}
    with case.context():
        baseline = optimize(model, sample, budget_gb=1000, **options).baseline_peak_bytes
        options["budget_bytes"] = int(share * baseline)
        return optimize(model, sample, **options), optimize(model, sample, reorder=True, **options)


def assert_trains_within_its_budget(case: Case, plan: Plan) -> None:
    planned = assert_same_training(case.build, plan.apply, case.sample, loss_fn=case.loss_fn)
    measured = measure(planned, case.sample(1), loss_fn=case.loss_fn, repeats=0)
    assert measured.peak_bytes <= plan.budget_bytes
    assert measured.peak_bytes == pytest.approx(plan.predicted_peak_bytes, rel=0.01)


@pytest.mark.parametrize(
    ("size", "share", "time_limit_s"),
    [
        pytest.param("tiny", 0.6, 5.0, marks=pytest.mark.slow),
        pytest.param("small", 0.4, 30.0, marks=pytest.mark.slow),
    ],
)
def test_optimize_may_reorder(size, share, time_limit_s, tmp_path):
    """With reorder=True a convnet costs less, trains with eager's bits and fits; so from a file."""
    case = ZOO["convnext"](size)
    eager, plan = two_plans(case, share, time_limit_s)
    assert plan.reorder
    assert not eager.reorder
    assert list(first_runs(eager.schedule)) == sorted(first_runs(eager.schedule))
    assert list(first_runs(plan.schedule)) != sorted(first_runs(plan.schedule))
    assert plan.overhead <= eager.overhead
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert_trains_within_its_budget(case, loaded)


@pytest.mark.slow
def test_the_least_budget_is_that_of_every_order():
    """What reorder=True names is no higher than what eager's order needs, and it works."""
    case = ZOO["convnext"]("tiny")
    least = {}
    for reorder in (False, True):
        with pytest.raises(InfeasibleBudgetError) as caught:
            optimize(
                case.make(), case.sample(0), budget_bytes=1, loss_fn=case.loss_fn, reorder=reorder
            )
        least[reorder] = caught.value.min_budget_bytes
        assert caught.value.lower_bound_bytes <= least[reorder]
    assert least[True] <= least[False]
    plan = optimize(
        case.make(),
        case.sample(0),
        budget_bytes=least[True],
        loss_fn=case.loss_fn,
        time_limit_s=1,
        reorder=True,
    )
    assert plan.predicted_peak_bytes <= least[True]


class Summed(torch.nn.Linear):
    """A scalar output, so that a plan file is all that planning again needs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).sum()


def test_another_shape_is_planned_with_the_same_flag(tmp_path):
    """By a plan of this process and by one from a file."""
    model = Summed(4, 4)
    for reorder in (False, True):
        plan = optimize(model, torch.zeros(8, 4), budget_gb=1, reorder=reorder)
        plan.save(tmp_path / "plan.json")
        for made in (plan, Plan.load(tmp_path / "plan.json")):
            again, _ = replan(made, made._live, model, {"x": torch.zeros(5, 4)}, model.forward)
            assert again.reorder is reorder


def test_reorder_is_a_flag():
    """Anything but True and False is refused by name."""
    with pytest.raises(ValueError, match="reorder must be True or False, got 'yes'"):
        optimize(Summed(4, 4), torch.zeros(8, 4), budget_gb=1, reorder="yes")
