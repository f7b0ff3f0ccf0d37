"""Loops that let go of outputs, accumulate gradients, or have other tensors in memory."""

from __future__ import annotations

import copy
import json
import re
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.testing.zoo import ZOO
from graph_capture.captured_step import CapturedStep
from graph_capture.cost_graph import CostGraph
from graph_capture.folding import leaving
from planner import (
    InfeasibleBudgetError,
    Plan,
    PlanError,
    compare,
    estimate,
    max_batch,
    measure,
    optimize,
)
from planner.base.resident import resident_tensors, storage_bytes
from planner.measuring.measure import record_peak
from planner.planning.late_reads import late_read, solve_in_time
from planner.saving.serialize import plan_from_dict, plan_to_dict
from solvers.replay import replay
from solvers.result import Ending, SolveResult, SolveStatus
from solvers.schedule import Schedule
from solvers.scopes import BoundScope
from tests.planner.small import make, plan_for, sample, square

CPU = torch.device("cpu")


def _halfway(model: nn.Module, inputs: Any, **words: Any) -> Plan:
    """A plan in the middle between the step without one and the least budget."""
    with pytest.raises(InfeasibleBudgetError) as found:
        optimize(model, inputs, budget_bytes=1, **words)
    least = found.value.min_budget_bytes
    unplanned = optimize(model, inputs, budget_gb=1, **words).baseline_peak_bytes
    return optimize(model, inputs, budget_bytes=(least + unplanned) // 2, time_limit_s=1, **words)


class LanguageModel(nn.Module):
    """Small, with a vocabulary that outweighs it."""

    def __init__(self, vocab: int = 1000, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Linear(4 * width, width),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def _tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 1000, (4, 24), generator=torch.Generator().manual_seed(seed))


def next_token(targets: Tensor) -> Any:
    """The loss of a loop that has the targets."""

    def loss_fn(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].reshape(-1, 1000), targets[:, 1:].reshape(-1))

    return loss_fn


SCALAR_BYTES = 4
"""The loss' gradient of one, made when the outputs are gone; a plan counts both together."""


# -- outputs -------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", ["held", "released"])
def test_the_peak_of_a_loop_with_its_own_loss_is_exact(outputs: str) -> None:
    """Released logits leave before the gradient of the loss is there, to the byte."""
    model, words = make(LanguageModel), {"loss_fn": next_token(_tokens()), "outputs": outputs}
    found = _halfway(model, _tokens(), optimizer="adamw", **words).validate(
        model, _tokens(), repeats=0
    )
    assert found.peak.predicted == found.peak.measured
    assert found.bits == "equal"
    assert found.unplanned_peak is not None
    assert found.unplanned_peak.predicted == found.unplanned_peak.measured


def test_released_logits_lower_peak_and_least_budget() -> None:
    """By a whole set of logits where the loss is what holds most."""
    model, loss_fn = make(LanguageModel), next_token(_tokens())
    least, peaks = {}, {}
    for outputs in ("held", "released"):
        with pytest.raises(InfeasibleBudgetError) as found:
            optimize(model, _tokens(), budget_bytes=1, loss_fn=loss_fn, outputs=outputs)
        least[outputs] = found.value.min_budget_bytes
        peaks[outputs] = optimize(
            model, _tokens(), budget_gb=1, loss_fn=loss_fn, outputs=outputs
        ).baseline_peak_bytes
    logits_bytes = 4 * 24 * 1000 * 4
    assert peaks["held"] - peaks["released"] > 0.9 * logits_bytes
    assert least["held"] - least["released"] > 0.9 * logits_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "gpt2_logits"])
def test_gpt2_in_a_loop_that_releases_is_exact(name: str) -> None:
    """The model's own loss beside its logits, and the loop's, from logits alone."""
    case = ZOO[name]("tiny")
    model, inputs = case.make(), {**case.sample(0), "use_cache": False}
    plan = _halfway(model, inputs, loss_fn=case.loss_fn, optimizer="adamw", outputs="released")
    found = plan.validate(model, inputs, repeats=0)
    assert 0 <= found.peak.predicted - found.peak.measured <= SCALAR_BYTES
    assert found.bits == "equal"


class WithLoss:
    """What Transformers returns, in short."""

    def __init__(self, loss: Tensor, logits: Tensor) -> None:
        self.loss, self.logits = loss, logits


class OwnLoss(LanguageModel):
    """Computes its loss itself."""

    def forward(self, tokens: Tensor, labels: Tensor) -> WithLoss:
        logits = super().forward(tokens)
        return WithLoss(next_token(labels)(logits), logits)


def test_logits_beside_the_models_own_loss_are_released() -> None:
    """They are freed with the output, and the step's peak is as predicted."""
    model, inputs = make(OwnLoss), {"tokens": _tokens(), "labels": _tokens()}
    plan = _halfway(model, inputs, outputs="released")
    found = plan.validate(model, inputs, repeats=0)
    assert 0 <= found.peak.predicted - found.peak.measured <= SCALAR_BYTES
    assert found.bits == "equal"
    plan.apply(model)
    output = model(**inputs)
    logits, loss = weakref.ref(output.logits.untyped_storage()), output.loss
    del output
    assert logits() is None
    loss.backward()


def test_a_released_output_that_the_plan_saves_is_counted() -> None:
    """What backward reads of an output stays by the plan, and is no surprise."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(32, 256), nn.Linear(256, 32)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            gate = torch.sigmoid(self.inner(x))
            return self.head(gate), gate

    model = make(Gate)
    plan = optimize(
        model, sample(), budget_gb=1, loss_fn=lambda y: square(y[0]), outputs="released"
    )
    found = plan.validate(model, sample(), repeats=0)
    assert found.peak.predicted == found.peak.measured


# -- gradients -----------------------------------------------------------------------


def test_a_step_of_accumulation_peaks_as_predicted() -> None:
    """Earlier gradients are there before it; new ones lie beside them when backward ends."""
    model, tokens, loss_fn = make(LanguageModel), _tokens(), next_token(_tokens())
    words = {"loss_fn": loss_fn, "optimizer": "adamw", "outputs": "released"}
    plan = _halfway(model, tokens, grads="accumulated", **words)
    found = measure(plan.apply(model), tokens, loss_fn=loss_fn, optimizer="adamw", repeats=0)
    assert found.peak_bytes == plan.predicted_peak_bytes
    bare = optimize(model, tokens, budget_gb=1, **words).graph.resident_bytes
    gradient_bytes = sum(p.numel() * 4 for p in model.parameters())
    assert found.resident_bytes == bare + gradient_bytes


def test_a_whole_cycle_of_micro_batches_peaks_as_predicted() -> None:
    """The record of four backward passes and a step is the plan's peak, to the byte."""
    model, tokens = make(LanguageModel), _tokens()
    loss_fn = next_token(_tokens())
    plan = _halfway(model, tokens, loss_fn=loss_fn, optimizer="adamw", grads="accumulated")
    optimizer = torch.optim.AdamW(model.parameters())
    plan.apply(model)

    def cycle() -> Any:
        optimizer.zero_grad()
        output = loss = None
        for _ in range(4):
            del output, loss
            output = model(tokens)
            loss = loss_fn(output)
            loss.backward()
        optimizer.step()
        return output, loss

    cycle()
    optimizer.zero_grad()
    held = resident_tensors(model, tokens, loss_fn=loss_fn, optimizer=optimizer)
    resident_bytes = storage_bytes(held, CPU)
    extra_bytes, _ = record_peak(cycle, CPU, held)
    assert resident_bytes + extra_bytes == plan.predicted_peak_bytes


@pytest.fixture
def many_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """New gradients leave as soon as one can."""
    monkeypatch.setattr(leaving, "SMALLEST_BYTES", 1)
    monkeypatch.setattr(leaving, "MANY_GROUPS", 10**6)


@pytest.mark.usefixtures("many_groups")
def test_new_gradients_that_leave_in_groups_lower_the_peak_exactly() -> None:
    """A group of new gradients lies beside the earlier ones, by the record and the replay."""
    model, tokens, loss_fn = make(LanguageModel), _tokens(), next_token(_tokens())
    words = {"loss_fn": loss_fn, "outputs": "released", "grads": "accumulated"}
    plan = _halfway(model, tokens, **words)
    found = plan.validate(model, tokens, repeats=0)
    assert found.peak.predicted == found.peak.measured
    assert found.bits == "equal"
    adds = [op for op in plan.graph.operators if op.target == leaving.ACCUMULATE]
    assert len(adds) > 8
    plan.apply(model)
    loss_fn(model(tokens)).backward()
    assert len(model.forward._main.prepared[0].step._backward.segments) == len(adds)


@pytest.mark.usefixtures("many_groups")
def test_an_order_that_reads_a_parameter_too_late_is_found() -> None:
    """A gradient waits for whoever reads its parameter, which a replay does not know."""
    plan = optimize(
        make(LanguageModel),
        _tokens(),
        budget_gb=1,
        loss_fn=next_token(_tokens()),
        grads="accumulated",
    )
    graph, order = plan.graph, plan.schedule.order
    captured = plan._live.captured
    assert late_read(captured, plan.schedule) is None
    head = next(v for v, op in enumerate(graph.operators) if op.module_path == "head")
    late = Schedule((*order, head))
    replay(graph, late)
    text = f"{graph.operators[head].name!r} reads 'parameter_head_weight'"
    assert str(late_read(captured, late)) == text

    def solved(step: CapturedStep) -> SolveResult:
        if step.graph.operators[head].pinned is None:
            return solved_by(step.graph, late)
        return solved_by(step.graph, plan.schedule)

    result, left = solve_in_time(captured, solved)
    assert left is None
    assert result.schedule == plan.schedule
    assert result.lower_bound_ns == solved_by(graph, late).lower_bound_ns
    _, left = solve_in_time(captured, lambda _: solved_by(graph, late))
    assert str(left) == text


def solved_by(graph: CostGraph, schedule: Schedule) -> SolveResult:
    """A solver's answer with this schedule, and the least that any takes."""
    outcome = replay(graph, schedule)
    return SolveResult(
        status=SolveStatus.FEASIBLE,
        ending=Ending.TIME_LIMIT,
        schedule=schedule,
        cost_ns=outcome.cost_ns,
        lower_bound_ns=graph.base_cost_ns,
        bound_scope=BoundScope.BASE_ORDER,
        global_bound_ns=graph.base_cost_ns,
        staged_infeasible=False,
        peak_bytes=outcome.peak_bytes,
        solver="test",
        solve_s=0.0,
    )


def test_released_outputs_may_be_among_what_is_always_recomputed() -> None:
    """The loop has the first one; a backward pass that reads it reads what it had."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(32, 256), nn.Linear(256, 32)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            gate = torch.sigmoid(self.inner(x))
            return self.head(torch.tanh(gate)), gate

    plan = optimize(
        make(Gate),
        sample(),
        budget_gb=1,
        loss_fn=lambda y: square(y[0]),
        outputs="released",
        always_recompute=["aten.sigmoid", "aten.tanh"],
    )
    found = plan.validate(make(Gate), sample(), repeats=0)
    assert found.peak.predicted == found.peak.measured
    assert found.bits == "equal"


def test_accumulation_that_is_not_planned_says_the_word() -> None:
    """The warning names the argument that counts the gradients."""
    model = plan_for(make(), sample(), loss_fn=square).apply(make())
    square(model(sample())).backward()
    with pytest.warns(UserWarning, match="plan with grads='accumulated', which counts them"):
        square(model(sample())).backward()


def test_planned_accumulation_has_eagers_bits_and_no_warning() -> None:
    """Four micro-batches and a step, with dropout and batch norm; the plan counts them."""
    plan = plan_for(make(), sample(), loss_fn=square, grads="accumulated")
    trained = []
    for model in (make(), plan.apply(make())):
        optimizer = torch.optim.AdamW(model.parameters())
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for i in range(4):
                square(model(sample(i))).backward()
        optimizer.step()
        trained.append(model)
    plain, planned = trained
    for a, b in zip(plain.parameters(), planned.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)


# -- residents -----------------------------------------------------------------------


def test_an_averaged_copy_beside_the_model_is_counted() -> None:
    """The model's tensors, the copy's and what the step takes are the predicted peak."""
    model = make(LanguageModel)
    average = copy.deepcopy(model)
    copy_bytes = storage_bytes(average.parameters(), CPU)
    tokens, loss_fn = _tokens(), next_token(_tokens())
    plan = _halfway(model, tokens, loss_fn=loss_fn, resident_bytes=copy_bytes)
    bare = measure(plan.apply(model), tokens, loss_fn=loss_fn, repeats=0, resident_bytes=0)
    assert bare.peak_bytes + copy_bytes == plan.predicted_peak_bytes <= plan.budget_bytes
    found = plan.validate(model, tokens, repeats=0)
    assert found.peak.predicted == found.peak.measured
    assert re.search(rf"resident +{copy_bytes / 1e3:.3g} kB", str(plan))


# -- the words -----------------------------------------------------------------------

WORDS: dict[str, Any] = {
    "outputs": "released",
    "grads": "accumulated",
    "resident_bytes": "100kB",
}


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan with all three words."""
    return optimize(make(), sample(), budget_gb=1, loss_fn=square, **WORDS)


def test_the_words_are_in_the_plan_and_its_file(plan: Plan, tmp_path: Path) -> None:
    """A loaded plan prints, applies and validates by them."""
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.holds == plan.holds
    for text in map(str, (plan, loaded)):
        assert "outputs until the loss is there; gradients of earlier backward passes" in text
        assert "100 kB of the caller's own" in text
    found = loaded.validate(make(), sample(), loss_fn=square, repeats=0)
    assert found.peak.predicted == found.peak.measured
    assert found.bits == "equal"


def test_a_file_of_a_loop_that_holds_nothing_else_is_as_before() -> None:
    """There is no word in it that earlier versions do not know."""
    written = plan_to_dict(optimize(make(), sample(), budget_gb=1, loss_fn=square))
    assert "loop_holds" not in written


@pytest.mark.parametrize(
    ("word", "value", "named"),
    [
        ("outputs", "held", "is let go of, and outputs are held"),
        ("grads", "none", "gradients are added to earlier ones, which nobody holds"),
        ("resident_bytes", 1, "loop_holds.resident_bytes: the file says 1"),
        ("outputs", "lost", r"\$.loop_holds.outputs"),
    ],
)
def test_a_file_whose_words_do_not_fit_its_graph_is_refused(
    plan: Plan, word: str, value: Any, named: str
) -> None:
    """The message names the word."""
    written = json.loads(json.dumps(plan_to_dict(plan)))
    written["loop_holds"][word] = value
    with pytest.raises(PlanError, match=named):
        plan_from_dict(written)


def test_accumulation_that_no_operator_does_is_refused() -> None:
    """A file's words about gradients fit its graph in the other direction, too."""
    written = plan_to_dict(optimize(make(), sample(), budget_gb=1, loss_fn=square))
    written["loop_holds"] = {"outputs": "held", "grads": "accumulated", "resident_bytes": 0}
    with pytest.raises(PlanError, match="accumulated, and no operator adds them"):
        plan_from_dict(json.loads(json.dumps(written)))


def test_a_plan_for_another_shape_has_the_same_words(plan: Plan) -> None:
    """``"replan"`` and ``max_batch`` ask for what was asked."""
    model = plan.apply(make(), on_shape_change="replan")
    square(model(sample(rows=128))).backward()
    (other,) = model.forward._others
    assert other.plan.holds == plan.holds
    Plan.remove(model)
    found = plan.max_batch(model, sample(), loss_fn=square, largest=300)
    assert found.plan.holds == plan.holds


def test_the_words_count_in_every_question() -> None:
    """Estimate, max_batch and compare see the step that optimize sees."""
    planned = optimize(make(), sample(), budget_gb=1, loss_fn=square, **WORDS)
    row = estimate(
        make(), sample(), batch_sizes=(256,), loss_fn=square, measure_scratch=True, **WORDS
    ).rows[0]
    assert row.memory.total_bytes == planned.baseline_peak_bytes
    assert row.memory.by_category["resident"] == 100_000
    largest = max_batch(make(), sample(), budget_gb=1, loss_fn=square, largest=256, **WORDS)
    assert largest.unplanned_peak_bytes == planned.baseline_peak_bytes
    compared = compare(
        make(), sample(), budgets=[], strategies=["none"], loss_fn=square, repeats=0, **WORDS
    )
    assert compared.baseline_peak_bytes == planned.baseline_peak_bytes
    (kept,) = compared.rows
    assert kept.measured.peak_bytes == kept.predicted_peak_bytes
    assert kept.measured.bits == "equal"
