"""Predictions beside real steps, and that a validation leaves nothing behind."""

from __future__ import annotations

import copy
import json
import re
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.testing.bitwise import assert_same_tensors
from benchmarks.testing.zoo import (
    ZOO,
    cases,
)
from planner import (
    CallMismatchError,
    Plan,
    PlanError,
    PlanMismatchError,
    Validation,
    measure,
    optimize,
)
from planner.base.training_step import (
    build_optimizer,
    train_step,
)
from planner.measuring.validation import Figure
from planner.measuring.validation_report import predicted_parts
from planner.running.attach import applied_plan
from planner.running.planned_forward import PlannedForward
from tests.planner.small import Heads, make, plan_for, sample, square


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A model that validations leave as it is."""
    return make()


@pytest.fixture(scope="module")
def plan(model) -> Plan:
    """A plan that recomputes, with AdamW and a loss_fn."""
    return plan_for(model, sample(), loss_fn=square, optimizer="adamw")


@pytest.fixture(scope="module")
def validation(plan, model) -> Validation:
    """What it took."""
    return plan.validate(model, sample(), repeats=4, seed=3)


def test_the_peak_is_what_measure_measures(plan, validation):
    """The same step, recorded by the same means, with and without the plan."""
    planned, plain = (
        measure(model, sample(), loss_fn=square, optimizer="adamw", repeats=0)
        for model in (plan.apply(make()), make())
    )
    assert validation.peak.measured == planned.peak_bytes
    assert validation.unplanned_peak is not None
    assert validation.unplanned_peak.measured == plain.peak_bytes
    assert validation.peak.predicted == plan.predicted_peak_bytes
    assert validation.unplanned_peak.predicted == plan.baseline_peak_bytes


def test_the_peak_is_the_sum_of_its_parts(plan, validation):
    """Resident categories and the rest add up, predicted as measured."""
    assert sum(f.measured for f in validation.at_peak) == validation.peak.measured
    assert sum(f.predicted for f in validation.at_peak) == plan.predicted_peak_bytes
    how = {f.name: f.how for f in validation.at_peak}
    assert how == {
        "parameter": "observed",
        "buffer": "observed",
        "input": "observed",
        "optimizer_state": "observed",
        "rest": "derived",
    }
    rest = validation.at_peak[-1].predicted
    assert sum(validation.predicted_rest.values()) == rest


def test_observed_categories_by_hand(validation):
    """Parameters, buffers, input and AdamW's state have the bytes of their tensors."""
    model = make()
    measured = {f.name: f.measured for f in validation.at_peak}
    parameters = sum(p.nbytes for p in model.parameters())
    assert measured["parameter"] == parameters
    assert measured["buffer"] == sum(b.nbytes for b in model.buffers())
    assert measured["input"] == sample().nbytes
    assert measured["optimizer_state"] == 2 * parameters + 4 * len(list(model.parameters()))
    in_step = {f.name: f.measured for f in validation.in_step}
    assert in_step == {"gradients": parameters, "outputs": sample().shape[0] * 4 * 4}


@pytest.mark.parametrize(
    "case", cases("tiny", "gpt2", "unet", "lstm", "many_outputs", "mlp_frozen", "mlp_bf16")
)
def test_categories_of_the_zoo_are_predicted_to_the_byte(case):
    """What can be observed is what the cost graph counts, for each kind of model."""
    with case.context():
        model = case.make()
        plan = optimize(model, case.sample(0), loss_fn=case.loss_fn, budget_gb=1)
        found = plan.validate(model, case.sample(0), repeats=0, unplanned=False)
    for figure in (*found.at_peak[:-1], *found.in_step):
        assert figure.measured == figure.predicted, figure.name
    assert found.peak.error == pytest.approx(0, abs=0.01)


def test_the_bits_are_equal(validation):
    """The plan gives the unplanned step's bits, and the table says so."""
    assert validation.bits == "equal"
    assert validation.first_difference is None
    assert "equal the unplanned step's" in str(validation)


def test_other_bits_are_told(plan, model, monkeypatch):
    """A planned step that computes something else is found out, with the first difference."""
    run = PlannedForward._call

    def scaled(self: Any, args: tuple, kwargs: dict) -> Any:
        return run(self, args, kwargs) * 2

    monkeypatch.setattr(PlannedForward, "_call", scaled)
    found = plan.validate(model, sample(), repeats=0)
    assert (found.bits, found.first_difference) == ("different", "the loss")
    assert str(found).startswith("OTHER BITS: with the plan the loss differs")


def test_a_step_that_does_not_repeat_itself_is_no_fault_of_the_plan(plan, model, monkeypatch):
    """Where two unplanned steps differ the table says that bits cannot be compared."""
    from planner.measuring import bit_comparison

    steps = []

    def unstable(*args: Any, **kwargs: Any) -> Any:
        output, loss = train_step(*args, **kwargs)
        steps.append(loss)
        return output, loss + len(steps)

    monkeypatch.setattr(bit_comparison, "train_step", unstable)
    found = plan.validate(model, sample(), repeats=0)
    assert (found.bits, found.first_difference) == ("not repeatable", "the loss")
    assert "differs between two unplanned steps" in str(found)


def test_times_are_of_pairs(validation, plan):
    """Medians of both steps, the median of their ratios between its quartiles."""
    assert validation.num_pairs == 4
    assert validation.step is not None
    assert validation.unplanned_step is not None
    assert validation.step.measured > 0
    assert validation.step.predicted == plan.predicted_step_us
    assert validation.unplanned_step.predicted == plan.baseline_step_us
    assert validation.overhead is not None
    assert validation.overhead_quartiles is not None
    low, high = validation.overhead_quartiles
    assert low <= validation.overhead <= high
    assert validation.predicted_overhead == plan.overhead


@pytest.mark.parametrize("applied", ["not", "this plan", "another plan"])
def test_everything_is_as_before(plan, applied):
    """Parameters, buffers, gradients, optimizer state, generators and the applied plan."""
    model = make()
    optimizer = build_optimizer("adamw", model.parameters())
    train_step(model, sample(), square)
    optimizer.step()
    if applied == "this plan":
        plan.apply(model)
    elif applied == "another plan":
        optimize(model, sample(), loss_fn=square, budget_gb=1).apply(model)
    before_plan, before_forward = applied_plan(model), model.__dict__.get("forward")

    def everything() -> dict[str, Any]:
        seen = {name: t.clone() for name, t in model.state_dict().items()}
        seen |= {f"gradient {n}": copy.deepcopy(p.grad) for n, p in model.named_parameters()}
        for i, state in optimizer.state_dict()["state"].items():
            seen |= {f"state {i} {k}": copy.deepcopy(v) for k, v in state.items()}
        seen["generator"] = torch.get_rng_state()
        return seen

    before = everything()
    plan.validate(model, sample(), optimizer=optimizer, repeats=1)
    assert_same_tensors(before, everything(), "after validating")
    assert applied_plan(model) == before_plan
    assert model.__dict__.get("forward") is before_forward


def test_an_error_leaves_no_plan_behind(plan):
    """A call that is not the planned one is refused with the guard's words; nothing is applied."""
    model = make()
    with pytest.raises(CallMismatchError, match="this call is not the planned one"):
        plan.validate(model, sample(rows=8))
    assert applied_plan(model) is None
    assert "forward" not in model.__dict__
    with pytest.raises(PlanMismatchError, match="made for another model"):
        plan.validate(make(Heads), sample())


def test_eval_mode_is_refused(plan):
    """There the model's own forward would run, which no plan is about."""
    with pytest.raises(ValueError, match=r"eval mode.*model\.train\(\)"):
        plan.validate(make().eval(), sample())


@pytest.mark.parametrize("repeats", [-1, 1.5, True])
def test_repeats_are_counted(plan, model, repeats):
    """A whole number from 0 on."""
    with pytest.raises(ValueError, match="repeats must be a whole number"):
        plan.validate(model, sample(), repeats=repeats)


def test_without_repeats_there_are_no_times(plan, model):
    """Peak and bits are there all the same."""
    found = plan.validate(model, sample(), repeats=0)
    assert found.step is found.unplanned_step is found.overhead is None
    assert found.bits == "equal"
    assert "overhead" not in str(found)


def test_without_the_unplanned_step(plan, model):
    """Only the plan runs; what needs the other step is missing and the reason is given."""
    found = plan.validate(model, sample(), repeats=2, unplanned=False)
    assert found.unplanned_peak is found.unplanned_step is found.overhead is None
    assert found.step is not None
    assert found.bits == "not compared"
    assert "unplanned not run: unplanned=False" in str(found)


def test_an_unplanned_step_that_does_not_fit(plan, monkeypatch):
    """It is reported, and the planned step's figures are there."""
    from planner.measuring import validate

    record, recorded = validate._record, []

    def once(*args: Any, **kwargs: Any) -> Any:
        if recorded:
            raise torch.OutOfMemoryError("no memory today")
        recorded.append(None)
        return record(*args, **kwargs)

    monkeypatch.setattr(validate, "_record", once)
    model = make()
    found = plan.validate(model, sample(), repeats=2)
    assert found.unplanned_peak is None
    assert found.step is not None
    assert found.peak.measured > 0
    assert "unplanned ran out of memory, which the planned step did not" in str(found)
    assert all(p.grad is None for p in model.parameters())


def test_a_planned_step_that_does_not_fit_raises(plan, model, monkeypatch):
    """Its own out-of-memory error comes out."""
    from planner.measuring import validate

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("no memory today")

    monkeypatch.setattr(validate, "_record", fail)
    with pytest.raises(torch.OutOfMemoryError, match="no memory today"):
        plan.validate(model, sample())


def test_a_planned_step_that_does_not_fit_is_not_told_of_the_unplanned_one(plan, monkeypatch):
    """Out of memory while the bits are compared: the planned half's error comes out."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("no memory for the plan")

    monkeypatch.setattr(PlannedForward, "__call__", fail)
    with pytest.raises(torch.OutOfMemoryError, match="no memory for the plan"):
        plan.validate(make(), sample(), repeats=0)


def test_an_unplanned_step_that_does_not_fit_is_not_compared(plan):
    """Out of memory in the unplanned half: no bits, no unplanned peak, the plan's own figures."""
    from planner.measuring import validate

    def only_planned(model: nn.Module, *args: Any, **how: Any) -> Any:
        if applied_plan(model) is None:
            raise torch.OutOfMemoryError("no memory today")
        return step_results(model, *args, **how)

    step_results = validate.step_results
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validate, "step_results", only_planned)
        found = plan.validate(make(), sample(), repeats=0)
    assert found.bits == "not compared"
    assert found.unplanned_note == "ran out of memory, which the planned step did not"


def test_over_budget_comes_first(validation):
    """A measured peak above the budget is the first line, with both to the byte."""
    over = replace(validation, budget_bytes=int(validation.peak.measured) - 1000)
    assert not over.within_budget
    first = str(over).splitlines()[0]
    assert first.startswith("OVER BUDGET: the measured peak is 1 kB above")
    assert f"({int(over.peak.measured)} bytes of {over.budget_bytes})" in first
    assert "EXCEEDED" in str(over)
    assert "BUDGET:" not in str(validation)


def test_reserved_over_budget_is_told(validation):
    """On CUDA the allocator may hold more than the budget although the peak is below it."""
    cuda = replace(validation, reserved_bytes=validation.budget_bytes + 2000)
    assert str(cuda).startswith("RESERVED OVER BUDGET: the allocator held 2 kB more")
    assert "reserved by the allocator" in str(cuda)
    assert validation.reserved_bytes is None
    assert "reserved" not in str(validation)


@pytest.mark.parametrize(
    ("predicted", "measured", "error"), [(110, 100, 0.1), (90, 100, -0.1), (0, 0, 0.0)]
)
def test_the_error_is_the_predictions(predicted, measured, error):
    """Positive when too much is predicted."""
    assert Figure(name="x", predicted=predicted, measured=measured).error == pytest.approx(error)


def test_the_table_reads(validation):
    """Each row has both figures; no line is endless."""
    lines = str(validation).splitlines()
    assert max(map(len, lines)) <= 130
    (peak,) = [line for line in lines if "peak of the planned step" in line]
    assert re.search(r"\d kB +\d+ kB +(exact|[+-][\d.]+%)$", peak)
    assert any("rest (derived)" in line for line in lines)
    assert any("parameter (observed)" in line for line in lines)


def test_a_validation_is_plain_data(validation):
    """to_dict survives JSON, with the errors."""
    data = json.loads(json.dumps(validation.to_dict()))
    assert data["peak"]["error"] == validation.peak.error
    assert data["at_peak"][0]["how"] == "observed"
    assert data["within_budget"] is True
    assert data["budget_bytes"] == validation.budget_bytes


def test_a_librarys_workspace_is_no_buffer():
    """What cuBLAS keeps is predicted as part of the rest: a recorded step makes it itself."""
    plan = optimize(make(), sample(), budget_gb=1, loss_fn=square, device="a100")
    parts = predicted_parts(plan)
    assert sum(parts.values()) == plan.predicted_peak_bytes
    assert parts["library workspace"] > 0
    assert parts["buffer"] < parts["library workspace"]


# -- loss and optimizer ---------------------------------------------------------------


@pytest.mark.slow
def test_a_plan_from_a_file_needs_its_loss(plan, model, tmp_path):
    """The file cannot hold it; with it the validation is the same."""
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="a file cannot hold: give it"):
        loaded.validate(model, sample())
    found = loaded.validate(model, sample(), loss_fn=square, repeats=0)
    assert found.peak.measured == plan.validate(model, sample(), repeats=0).peak.measured


def test_a_loss_that_was_not_planned_is_refused():
    """The measured step would not be the predicted one."""
    plan = optimize(make(), sample(), budget_gb=1)
    with pytest.raises(PlanMismatchError, match="the plan differentiates outputs, not a loss_fn"):
        plan.validate(make(), sample(), loss_fn=square)


@pytest.mark.parametrize("optimizer", ["sgd", "sgd_momentum", "adamw"])
def test_the_optimizer_is_made_again_by_its_name(optimizer):
    """Its state counts as the plan said, SGD with momentum told from SGD without."""
    plan = optimize(make(), sample(), budget_gb=1, loss_fn=square, optimizer=optimizer)
    found = plan.validate(make(), sample(), repeats=0, unplanned=False)
    states = [f for f in found.at_peak if f.name == "optimizer_state"]
    assert sum(f.measured for f in states) == plan.optimizer.state_bytes
    assert (not states) == (optimizer == "sgd")


def test_an_optimizer_without_a_name_must_be_given():
    """Adam with amsgrad is none of the known ones; given, it counts."""
    model = make()
    amsgrad = torch.optim.Adam(model.parameters(), amsgrad=True)
    plan = optimize(model, sample(), budget_gb=1, loss_fn=square, optimizer=amsgrad)
    with pytest.raises(PlanError, match=r"Adam with \d+ bytes of state.*pass it as"):
        plan.validate(model, sample())
    found = plan.validate(model, sample(), optimizer=amsgrad, repeats=0, unplanned=False)
    assert found.peak.measured == pytest.approx(plan.predicted_peak_bytes, rel=0.01)
    assert not amsgrad.state


def test_another_optimizer_is_refused(plan, model):
    """Another kind, and any where none was counted."""
    with pytest.raises(PlanMismatchError, match=r"counts AdamW with .* given was SGD"):
        plan.validate(model, sample(), optimizer="sgd")
    without = optimize(make(), sample(), budget_gb=1, loss_fn=square)
    with pytest.raises(PlanMismatchError, match="counts no optimizer and AdamW was given"):
        without.validate(model, sample(), optimizer="adamw")


def test_a_forward_of_the_instance_stays(plan, capsys):
    """A forward that the user has set on the object is the unplanned step's."""
    model = make()
    own = type(model).forward

    def told(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        sys.stdout.write("own forward")
        return own(model, x, scale)

    model.__dict__["forward"] = told
    assert isinstance(model, nn.Module)
    plan.validate(model, sample(), repeats=0)
    assert "own forward" in capsys.readouterr().out
    assert model.__dict__["forward"] is told


@pytest.mark.parametrize("name", ["gpt2_bf16"])
def test_autocast_is_the_planned_one(name):
    """Under it the plan is validated; outside the guard says what differs."""
    case = ZOO[name]("tiny")
    with case.context():
        model = case.make()
        plan = optimize(model, case.sample(0), loss_fn=case.loss_fn, budget_gb=1)
        assert plan.validate(model, case.sample(0), repeats=0).bits == "equal"
    with pytest.raises(CallMismatchError, match="autocast is off, planned was bfloat16"):
        plan.validate(model, case.sample(0))


@pytest.mark.gpu
def test_a_validation_on_cuda():
    """Reserved memory is there, and resident categories are predicted to the block."""
    model, x = make().cuda(), sample().cuda()
    plan = optimize(model, x, loss_fn=square, budget_gb=1, optimizer="adamw")
    found = plan.validate(model, x, repeats=2)
    assert found.reserved_bytes is not None
    assert found.reserved_bytes >= found.peak.measured
    assert found.bits == "equal"
    assert {f.name for f in found.at_peak} >= {"parameter", "input", "optimizer_state", "rest"}
