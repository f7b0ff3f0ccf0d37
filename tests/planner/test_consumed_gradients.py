"""Optimizers that step in hooks: each gradient is gone when its parameter has been updated."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graph_capture.folding import leaving
from graph_capture.folding.leaving import CONSUME
from planner import InfeasibleBudgetError, Plan, PlanError, PlanWarning, measure, optimize
from planner.base.resident import resident_tensors, storage_bytes
from planner.measuring.measure import record_peak
from planner.saving.serialize import plan_from_dict, plan_to_dict
from tests.planner.small import make, square

CPU = torch.device("cpu")


class Wide(nn.Module):
    """Its weights outweigh what it computes."""

    WIDTHS = ((64, 96), (96, 128), (128, 64), (64, 256), (256, 8))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*widths) for widths in self.WIDTHS)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def _batch(seed: int = 0, rows: int = 4) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))


def _leave_in(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set how many groups the gradients leave in, at most."""
    monkeypatch.setattr(leaving, "SMALLEST_BYTES", 1)
    monkeypatch.setattr(leaving, "MANY_GROUPS", groups)


@pytest.fixture
def four_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients leave in about four groups."""
    _leave_in(4, monkeypatch)


def _plan(optimizer: str | None, **options: Any) -> Plan:
    """For a loop that consumes, and lets go of its outputs."""
    words = {"loss_fn": square, "optimizer": optimizer, "outputs": "released"} | options
    return optimize(make(Wide), _batch(), budget_gb=1, grads="consumed", **words)


LOSS_GRADIENT_BYTES = 4
"""Made when the outputs are gone; a plan counts both together."""


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("optimizer", "groups"),
    [
        ("adamw", 4),
        *(
            pytest.param(optimizer, groups, marks=SLOW)
            for optimizer in (None, "sgd", "sgd_momentum", "adamw", "adafactor", "nadam")
            for groups in (1, 10**6)
        ),
    ],
)
def test_the_peak_is_exact_with_an_optimizer_in_hooks(
    optimizer: str | None, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planned and eager: the gradients of a group, and what their optimizer takes beside them."""
    _leave_in(groups, monkeypatch)
    found = _plan(optimizer).validate(make(Wide), _batch(), repeats=0)
    assert found.bits == "equal"
    assert 0 <= found.peak.predicted - found.peak.measured <= LOSS_GRADIENT_BYTES
    assert found.unplanned_peak is not None
    too_high = found.unplanned_peak.predicted - found.unplanned_peak.measured
    assert 0 <= too_high <= LOSS_GRADIENT_BYTES


@pytest.mark.usefixtures("four_groups")
def test_measure_runs_such_a_loop_by_the_plans_word() -> None:
    """The peak is the predicted one, and neither parameters nor gradients are left behind."""
    model = make(Wide)
    plan = _plan("adamw")
    before = [p.detach().clone() for p in model.parameters()]
    found = measure(plan.apply(model), _batch(), loss_fn=square, optimizer="adamw", repeats=0)
    assert 0 <= plan.predicted_peak_bytes - found.peak_bytes <= LOSS_GRADIENT_BYTES
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def _in_hooks(model: nn.Module, kind: Callable[..., Any]) -> dict[Tensor, torch.optim.Optimizer]:
    """An optimizer for each parameter, as PyTorch's tutorial has it."""
    optimizers = {p: kind([p]) for p in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    return optimizers


@pytest.mark.usefixtures("four_groups")
def test_a_real_loop_peaks_as_predicted_and_trains_as_eager() -> None:
    """Three steps of a loop with its own hooks: the recorded peak, and bitwise equal weights."""
    trained = []
    plan = _plan("adamw")
    for planned in (False, True):
        model = make(Wide)
        optimizers = _in_hooks(model, torch.optim.AdamW)
        if planned:
            plan.apply(model)

        def step(batch: Tensor, model: nn.Module = model) -> Tensor:
            loss = square(model(batch))
            loss.backward()
            return loss

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for seed in range(3):
                step(_batch(seed))
            batch = _batch(3)
            held = resident_tensors(model, batch)
            for own in optimizers.values():
                held += [t for s in own.state.values() for t in s.values()]
            resident_bytes = storage_bytes(held, CPU)
            extra_bytes, _ = record_peak(lambda batch=batch: step(batch), CPU, held)
        if planned:
            too_high = plan.predicted_peak_bytes - (resident_bytes + extra_bytes)
            assert 0 <= too_high <= LOSS_GRADIENT_BYTES
        trained.append(list(model.parameters()))
    for a, b in zip(*trained, strict=True):
        assert torch.equal(a, b)


def test_consumed_gradients_lower_peak_and_least_budget() -> None:
    """By most of the gradients, and by an optimizer that has temporaries for all at once."""
    gradient_bytes = sum(p.numel() * 4 for p in make(Wide).parameters())
    least, peaks = {}, {}
    for grads in ("none", "consumed"):
        words: dict[str, Any] = {"loss_fn": square, "optimizer": "sgd", "grads": grads}
        with pytest.raises(InfeasibleBudgetError) as found:
            optimize(make(Wide), _batch(), budget_bytes=1, **words)
        least[grads] = found.value.min_budget_bytes
        peaks[grads] = optimize(make(Wide), _batch(), budget_gb=1, **words).baseline_peak_bytes
    assert peaks["none"] - peaks["consumed"] > 0.5 * gradient_bytes
    assert least["consumed"] <= least["none"]


def test_a_loop_that_does_not_consume_is_warned_of_once() -> None:
    """The message says how much is left, what that may lead to and what to do."""
    model = _plan("sgd").apply(make(Wide))
    with pytest.warns(PlanWarning, match="of gradients are there when the backward pass") as said:
        square(model(_batch())).backward()
    assert "register_post_accumulate_grad_hook" in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.zero_grad()
        square(model(_batch())).backward()
        square(model(_batch())).backward()


def test_trial_steps_wait_for_no_hook_of_the_loop() -> None:
    """While a loop's hooks are there, validating trains nothing, and they are there afterwards."""
    model = make(Wide)
    optimizers = _in_hooks(model, torch.optim.SGD)
    before = [p.detach().clone() for p in model.parameters()]
    _plan("sgd").validate(model, _batch(), repeats=0)
    assert all(torch.equal(a, b) for a, b in zip(before, optimizers, strict=True))
    square(model(_batch())).backward()
    assert not any(torch.equal(a, b) for a, b in zip(before, optimizers, strict=True))


def test_gradients_of_inputs_stay() -> None:
    """Only parameters have hooks; what the caller's tensor gets is held to the end."""
    x = _batch().requires_grad_()
    plan = optimize(make(Wide), x, budget_gb=1, loss_fn=square, optimizer="adam", grads="consumed")
    found = plan.validate(make(Wide), x, repeats=0)
    assert found.bits == "equal"
    assert found.peak.predicted >= found.peak.measured


def test_a_gradient_in_another_layout_is_copied_and_then_consumed() -> None:
    """Autograd copies what has not the parameter's strides."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(48, 64).t() * 0.1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.weight).sum(1) + (self.weight * 2).mean()

    plan = optimize(make(Turned), _batch(), budget_gb=1, loss_fn=square, grads="consumed")
    found = plan.validate(make(Turned), _batch(), repeats=0)
    assert found.bits == "equal"
    assert found.peak.predicted == found.peak.measured


# -- the word --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan with an optimizer in hooks."""
    return _plan("adamw")


def test_the_word_is_in_the_plan_and_its_file(plan: Plan, tmp_path: Path) -> None:
    """A loaded plan prints, applies and validates by it."""
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.holds == plan.holds
    for text in map(str, (plan, loaded)):
        assert "AdamW state and step" in text
        assert "each gradient until a hook has consumed it" in text
    found = loaded.validate(make(Wide), _batch(), loss_fn=square, repeats=0)
    assert found.peak.predicted == loaded.predicted_peak_bytes == plan.predicted_peak_bytes
    assert 0 <= found.peak.predicted - found.peak.measured <= LOSS_GRADIENT_BYTES


def test_a_loaded_plan_for_another_call_never_counts_too_little(plan: Plan, tmp_path: Path) -> None:
    """Its file has the optimizer's largest temporaries, which are assumed for each parameter."""
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    other = loaded.for_call(make(Wide), _batch(rows=8), loss_fn=square)
    found = other.validate(make(Wide), _batch(rows=8), loss_fn=square, repeats=0)
    assert found.peak.predicted >= found.peak.measured


@pytest.mark.parametrize(
    ("grads", "named"),
    [
        ("none", "gradients are consumed, which the loop does not do"),
        ("eaten", r"\$.loop_holds.grads"),
    ],
)
def test_a_file_whose_word_does_not_fit_its_graph_is_refused(
    plan: Plan, grads: str, named: str
) -> None:
    """The message names what does not fit."""
    written = json.loads(json.dumps(plan_to_dict(plan)))
    written["loop_holds"]["grads"] = grads
    if grads == "none":  # a file without an optimizer has no step at its end
        written["optimizer"] = None
        for storage in written["storages"]:
            storage["category"] = storage["category"].replace("optimizer_state", "buffer")
            storage["name"] = storage["name"].replace("optimizer state", "another")
    with pytest.raises(PlanError, match=named):
        plan_from_dict(written)


def test_the_step_in_hooks_has_the_optimizers_time(plan: Plan) -> None:
    """The operators that stand for the hooks cost what its calls cost, and there is no other."""
    hooks = [op for op in plan.graph.operators if op.target == CONSUME]
    assert sum(op.cost_ns for op in hooks) == plan.optimizer.step_ns > 0
    assert not [op for op in plan.graph.operators if op.phase == "optimizer"]
