"""Planned steps of a comparison are judged like a peer's: two steps, outputs included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graph_capture.calls.call_spec import bind_call, split_sample
from planner import Plan, optimize
from planner.base.step_spec import StepSpec
from planner.base.training_step import train_step
from planner.comparing.execution import training_run
from planner.comparing.execution.runner import (
    Execution,
    Runner,
)
from planner.comparison_record import MeasuredStep
from planner.running.planned_forward import PlannedForward
from tests.planner.small import make, plan_for, sample, square


class Run:
    """A model, its plan and their runner."""

    def __init__(self, repeats: int = 0) -> None:
        self.model = make()
        self.plan: Plan = plan_for(self.model, sample(), loss_fn=square)
        spec = StepSpec(model=self.model, sample_input=sample(), loss_fn=square, optimizer="adamw")
        execution = Execution(spec=spec, repeats=repeats, seed=0)
        arguments = bind_call(self.model.forward, *split_sample(sample()))
        self.runner = Runner(execution, arguments, None, self.plan._live)

    def planned(self) -> MeasuredStep:
        return self.runner.planned(self.plan)


def changed(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, Any], Any]) -> None:
    """Planned forward passes return something else, by their number."""
    run = PlannedForward._call
    calls: list[int] = []

    def call(self: Any, args: tuple, kwargs: dict) -> Any:
        calls.append(1)
        return change(len(calls), run(self, args, kwargs))

    monkeypatch.setattr(PlannedForward, "_call", call)


def unstable(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Every step's loss and gradients are off, each time by more."""
    steps: list[int] = []

    def step(model: nn.Module, *args: Any) -> Any:
        output, loss = train_step(model, *args)
        steps.append(1)
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.grad *= 1 + share * len(steps)
        assert loss is not None
        return output, loss * (1 + share * len(steps))

    monkeypatch.setattr(training_run, "train_step", step)


def test_a_plan_has_eager_s_bits() -> None:
    """Two steps with dropout and batch norm are equal, and leave the model as it was."""
    run = Run()
    values = {n: t.clone() for n, t in run.model.state_dict().items()}
    assert run.runner.eager().bits == "equal"
    found = run.planned()
    assert (found.bits, found.difference) == ("equal", "")
    assert all(torch.equal(values[n], t) for n, t in run.model.state_dict().items())


def test_without_eager_nothing_is_compared() -> None:
    """Where eager could not run a plan's steps have no verdict."""
    assert Run().planned().bits == "not compared"


def test_a_mistake_in_the_second_step_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that is right once, as one that replays its masks, is not equal."""
    run = Run()
    run.runner.eager()
    changed(monkeypatch, lambda i, output: output if i == 1 else output * 1.5)
    found = run.planned()
    assert found.bits == "WRONG"
    assert "in step 2 of seed 0" in found.difference


def test_rounding_is_different(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan promises bits: where eager repeats its own, rounding is told."""
    run = Run()
    run.runner.eager()
    changed(monkeypatch, lambda i, output: output * (1 + 1e-6))
    found = run.planned()
    assert found.bits == "different"
    assert "has other bits, in step 1 of seed 0" in found.difference


class Two(nn.Module):
    """Returns what the loss reads and something beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.linear(x)
        return h, h.detach().sin()


def test_outputs_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that no loss reads counts, too."""
    model = make(Two)

    def loss(output: tuple[Tensor, Tensor]) -> Tensor:
        return square(output[0])

    plan = optimize(model, sample(), loss_fn=loss, budget_gb=1)
    spec = StepSpec(model=model, sample_input=sample(), loss_fn=loss)
    arguments = bind_call(model.forward, *split_sample(sample()))
    runner = Runner(Execution(spec=spec, repeats=0, seed=0), arguments, None, plan._live)
    runner.eager()
    assert runner.planned(plan).bits == "equal"
    changed(monkeypatch, lambda i, output: (output[0], output[1] * 2))
    found = runner.planned(plan)
    assert found.bits == "WRONG"
    assert found.difference == "output '1' is off by 1 of its norm, in step 1 of seed 0"


def test_a_large_error_is_wrong_where_eager_does_not_repeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rounding that eager has itself excuses rounding only."""
    run = Run()
    unstable(monkeypatch, 1e-6)
    assert run.runner.eager().bits == "not repeatable"
    assert run.planned().bits == "not repeatable"
    changed(monkeypatch, lambda i, output: output * 1.5)
    found = run.planned()
    assert found.bits == "WRONG"
    assert "is off by" in found.difference or "the loss is" in found.difference


def test_an_eager_step_of_its_own_draws_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two eager steps are no nearer than that, no plan is wrong."""
    run = Run()
    unstable(monkeypatch, 0.1)
    assert run.runner.eager().bits == "not repeatable"
    changed(monkeypatch, lambda i, output: output * 1.5)
    assert run.planned().bits == "not repeatable"


def test_steps_of_a_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two for the bits, two for the peak, a round of warm-up and the pairs; eager's are kept."""
    run = Run(repeats=4)
    run.runner.eager()
    steps: list[bool] = []

    def own(*args: Any, **kwargs: Any) -> Any:
        steps.append(False)
        return type(run.model).forward(run.model, *args, **kwargs)

    run.runner.own = own
    changed(monkeypatch, lambda i, output: steps.append(True) or output)
    found = run.planned()
    assert found.bits == "equal"
    assert found.num_pairs == 4
    assert steps.count(True) == 2 + 2 + 2 + 4
    assert steps.count(False) == 2 + 4


def test_two_plans_run_in_turn() -> None:
    """Each as often as asked for and twice to warm up; what they trained is given back."""
    run = Run(repeats=4)
    values = {n: t.clone() for n, t in run.model.state_dict().items()}
    roomy = plan_for(run.model, sample(), loss_fn=square, share=0.9)
    found = run.runner.in_turn(run.plan, roomy)
    assert len(found.ratios) == 4
    assert min(*found.first_us, *found.second_us) > 0
    assert all(torch.equal(values[n], t) for n, t in run.model.state_dict().items())
    assert all(p.grad is None for p in run.model.parameters())
