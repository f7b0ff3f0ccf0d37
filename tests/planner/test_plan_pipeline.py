"""Layers divided among the stages of a pipeline, with a plan for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planner import InfeasibleBudgetError, Plan, Stage, optimize, plan_pipeline
from planner.pipeline import stage_times
from solvers.pipeline import simulate

WIDTH, ROWS = 16, 128


class Layers(nn.Module):
    """Residual layers that are alike."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def plan_within(budget_bytes: int, asked: list[Stage] | None = None) -> Callable[[Stage], Plan]:
    """What plans a stage within so many bytes, and notes what it was asked."""

    def plan_stage(stage: Stage) -> Plan:
        if asked is not None:
            asked.append(stage)
        return optimize(
            Layers(stage.end - stage.first),
            torch.zeros(ROWS, WIDTH, requires_grad=stage.index > 0),
            budget_bytes=budget_bytes,
            grads="accumulated",
            concurrent_calls=stage.calls_in_flight,
            time_limit_s=0.3,
            gap=0.05,
        )

    return plan_stage


@pytest.mark.slow
def test_the_first_stage_gets_fewer_layers_under_a_tight_budget() -> None:
    """Where the same number in each does not fit, another division does, within the budget."""
    budget_bytes = 115_000  # two layers of the first stage need 122,184
    asked: list[Stage] = []
    found = plan_pipeline(
        plan_within(budget_bytes, asked),
        num_layers=4,
        num_stages=2,
        num_microbatches=4,
        alike=True,
    )
    (first, second) = found.stages
    assert (first.stage.calls_in_flight, second.stage.calls_in_flight) == (2, 1)
    assert first.stage.end - first.stage.first < second.stage.end - second.stage.first
    assert found.even_us is None
    assert "the same number of layers in each: does not fit" in str(found)
    assert all(s.plan.predicted_peak_bytes <= budget_bytes for s in found.stages)
    assert found.lower_bound_us <= found.step_us
    times = [stage_times(s.plan) for s in found.stages]
    assert found.step_us == simulate(times, 4).step_ns / 1e3
    keys = [(s.index, s.end - s.first, s.calls_in_flight) for s in asked]
    assert len(set(keys)) == len(keys)  # alike stages are planned once


def test_without_pressure_the_layers_are_even_and_nothing_waits_for_memory() -> None:
    """Even and uniform settings then take the same as the division found."""
    found = plan_pipeline(
        plan_within(10**9),
        num_layers=4,
        num_stages=2,
        num_microbatches=2,
        schedule="gpipe",
        alike=True,
    )
    assert [s.stage.end - s.stage.first for s in found.stages] == [2, 2]
    assert found.step_us == found.even_us == found.uniform_us
    assert all(s.plan.overhead == 0 for s in found.stages)


def test_the_times_of_a_stage_are_its_whole_step() -> None:
    """Forward and backward together are what the plan predicts for one call."""
    plan = plan_within(10**9)(Stage(index=0, first=0, end=2, calls_in_flight=1))
    times = stage_times(plan)
    assert times.both_ns == pytest.approx(plan.predicted_step_us * 1e3, abs=1)
    assert times.forward_ns < times.backward_ns


def test_nothing_fits() -> None:
    """The error is the stage's own, with the least budget that would do."""
    with pytest.raises(InfeasibleBudgetError, match="least"):
        plan_pipeline(
            plan_within(20_000),
            num_layers=2,
            num_stages=2,
            num_microbatches=2,
            alike=True,
        )


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"num_stages": 3}, "need a layer each"),
        ({"num_stages": 0}, "one stage at least"),
        ({"num_microbatches": 0}, "one micro-batch at least"),
        ({"schedule": "1F1B"}, "schedule is one of"),
        ({"send_us": float("nan")}, "send_us is a number"),
        ({"send_us": -1.0}, "send_us is a number"),
    ],
)
def test_arguments_are_checked_before_anything_is_planned(
    words: dict[str, Any], match: str
) -> None:
    """The message names the argument."""

    def plan_stage(_: Stage) -> Plan:
        raise AssertionError("planned")

    given = {"num_layers": 2, "num_stages": 2, "num_microbatches": 2} | words
    with pytest.raises(ValueError, match=match):
        plan_pipeline(plan_stage, **given)
