"""The largest batch in a budget, against planning every batch."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.testing.zoo import ZOO
from graph_capture.costs.devices import DEVICES
from graph_capture.errors import CaptureError
from planner import InfeasibleBudgetError, MaxBatch, Plan, PlanError, max_batch, measure, optimize
from tests.planner.small import Heads, make, sample, square

BUDGET_BYTES = 60_000


def both(output: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """A scalar loss of two heads."""
    return output[0].square().mean() + output[1].square().mean()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A model that takes every batch size."""
    return make(Heads)


@pytest.fixture(scope="module")
def found(model: nn.Module) -> MaxBatch:
    """Its largest batches in 60 kB."""
    return max_batch(model, sample(rows=3), budget_bytes=BUDGET_BYTES, loss_fn=both)


def unplanned_peak(model: nn.Module, rows: int) -> int:
    """Peak of the unplanned step."""
    return optimize(model, sample(rows=rows), budget_gb=1, loss_fn=both).baseline_peak_bytes


def fits(model: nn.Module, rows: int, budget_bytes: int = BUDGET_BYTES) -> bool:
    """Whether optimize finds a plan."""
    try:
        optimize(
            model,
            sample(rows=rows),
            budget_bytes=budget_bytes,
            loss_fn=both,
            time_limit_s=1,
            gap=10,
        )
    except InfeasibleBudgetError:
        return False
    return True


def test_the_next_batch_does_not_fit(found, model):
    """Neither without a plan nor with one; the answers themselves do."""
    without = found.batch_without_plan
    assert unplanned_peak(model, without) <= BUDGET_BYTES < unplanned_peak(model, without + 1)
    assert fits(model, found.batch)
    assert not fits(model, found.batch + 1)
    assert found.batch > without


@pytest.mark.slow
@pytest.mark.parametrize("budget_bytes", [45_000, 60_000])
def test_against_planning_many_batches(model, budget_bytes):
    """The batches that optimize finds a plan for are those up to the answer."""
    found = max_batch(model, sample(rows=3), budget_bytes=budget_bytes, loss_fn=both)
    tried = [*range(1, found.batch - 3, 7), *range(max(1, found.batch - 3), found.batch + 6)]
    assert [rows for rows in tried if fits(model, rows, budget_bytes)] == [
        rows for rows in tried if rows <= found.batch
    ]


def test_few_captures(found):
    """Some six sizes, not every one; each is captured once."""
    assert found.num_captures <= 8
    assert len(set(found.captured_batches)) == found.num_captures
    assert {found.batch, found.batch + 1} <= set(found.captured_batches)


def test_the_plan_is_for_the_largest_batch(found, model):
    """It is applied as it is, and a real step stays within the budget."""
    assert isinstance(found.plan, Plan)
    assert found.plan.predicted_peak_bytes <= BUDGET_BYTES
    planned = found.plan.apply(make(Heads))
    measured = measure(planned, sample(rows=found.batch), loss_fn=both, repeats=0)
    assert measured.peak_bytes <= BUDGET_BYTES


def test_what_it_says(found):
    """Throughput of both, what is known of the next batch, and all of it as JSON."""
    assert found.next_least_bytes > BUDGET_BYTES
    assert found.samples_per_s == pytest.approx(found.batch * 1e6 / found.plan.predicted_step_us)
    read = json.loads(json.dumps(found.to_dict()))
    assert (read["batch"], read["overhead"]) == (found.batch, found.plan.overhead)
    text = str(found)
    assert f"without a plan  batch {found.batch_without_plan}" in text
    assert f"with a plan     batch {found.batch}" in text
    assert f"batch {found.batch + 1} is " in text


@pytest.mark.slow
def test_the_answer_does_not_hang_on_the_sample(found, model):
    """A sample that is too large itself leads to the same batches."""
    other = max_batch(model, sample(rows=500), budget_bytes=BUDGET_BYTES, loss_fn=both)
    assert (other.batch_without_plan, other.batch) == (found.batch_without_plan, found.batch)


def test_the_largest_that_is_to_be_tried(model):
    """The search ends there, and says so."""
    found = max_batch(model, sample(), budget_bytes=BUDGET_BYTES, loss_fn=both, largest=20)
    assert found.batch_without_plan == found.batch == 20
    assert found.next_least_bytes is None
    assert not found.plan.schedule.recomputed()
    assert "the largest that was to be tried" in str(found)


def test_not_even_one(model):
    """The error names the least budget, which works for a batch of one."""
    with pytest.raises(
        InfeasibleBudgetError, match="Not even a batch of 1 fits in 10 kB"
    ) as caught:
        max_batch(model, sample(), budget_bytes=10_000, loss_fn=both)
    least = caught.value.min_budget_bytes
    assert max_batch(model, sample(), budget_bytes=least, loss_fn=both).batch == 1
    with pytest.raises(InfeasibleBudgetError):
        max_batch(model, sample(), budget_bytes=caught.value.lower_bound_bytes - 1, loss_fn=both)


@pytest.mark.slow
def test_only_with_a_plan():
    """Where not even one row fits without a plan, the report says so."""
    model, given = make(lambda: nn.Sequential(*[nn.Tanh() for _ in range(30)])), sample(rows=1)
    given.requires_grad_()
    found = max_batch(model, given, budget_bytes=2_500, loss_fn=square, time_limit_s=4)
    assert found.batch_without_plan == 0
    assert found.samples_per_s_without_plan is None
    assert found.batch >= 1
    assert "none, not even a batch of 1" in str(found)


def test_headroom_is_left_alone(found, model):
    """A tenth less of the budget is a smaller batch, the one of nine tenths."""
    options = {"loss_fn": both, "budget_bytes": BUDGET_BYTES}
    roomy = max_batch(model, sample(rows=3), headroom="10%", **options)
    assert roomy.headroom_bytes == BUDGET_BYTES // 10
    assert roomy.batch_without_plan < found.batch_without_plan
    assert roomy.plan.predicted_peak_bytes <= BUDGET_BYTES * 9 // 10


def test_own_rules_count(model):
    """What must not be recomputed leaves room for fewer rows."""
    options = {"loss_fn": both, "budget_bytes": BUDGET_BYTES}
    found = max_batch(model, sample(rows=3), never_recompute=["trunk"], **options)
    assert found.plan.never_recompute == ("trunk",)
    assert not any(
        found.plan.graph.operators[v].module_path.startswith("trunk")
        for v in found.plan.schedule.recomputed()
    )


# -- from a plan ----------------------------------------------------------------------------


@pytest.mark.slow
def test_from_a_plan(found, model, tmp_path):
    """A plan's own budget and loss give the same; from a file the loss is asked for."""
    plan = optimize(model, sample(rows=10), budget_bytes=BUDGET_BYTES, loss_fn=both)
    again = plan.max_batch(model, sample(rows=10))
    assert (again.batch_without_plan, again.batch) == (found.batch_without_plan, found.batch)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r"max_batch\(\.\.\., loss_fn=\.\.\.\)"):
        loaded.max_batch(model, sample(rows=10))
    from_file = loaded.max_batch(model, sample(rows=10), loss_fn=both)
    assert (from_file.batch_without_plan, from_file.batch) == (
        found.batch_without_plan,
        found.batch,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp_bf16", "convnext"])
def test_real_models(name):
    """Batches are searched under the case's autocast and with targets in the loss's closure."""
    case = ZOO[name]("tiny")
    model = case.make()
    plan_bytes = 4 * optimize_peak(case, model)
    found = max_batch(
        model,
        case.sample(0),
        budget_bytes=plan_bytes,
        loss_fn=case.loss_fn,
        autocast=case.autocast,
        time_limit_s=20,
    )
    assert 4 <= found.batch_without_plan < found.batch
    assert found.plan.predicted_peak_bytes <= plan_bytes < found.next_least_bytes


def optimize_peak(case, model) -> int:
    """Peak of the unplanned step of a case."""
    with case.context():
        plan = optimize(model, case.sample(0), budget_gb=10, loss_fn=case.loss_fn)
    return plan.baseline_peak_bytes


def test_a_budget_as_a_share_is_one_of_the_samples_own_peak(model):
    """All of it: the sample's batch is the largest that fits without a plan."""
    found = max_batch(model, sample(rows=24), budget="100%", loss_fn=both)
    assert found.budget_bytes == unplanned_peak(model, 24)
    assert found.batch_without_plan == 24
    assert found.plan.budget_share is None
    assert "(100% of the sample's peak without a plan)" in str(found)


# -- errors ---------------------------------------------------------------------------------


def test_a_batch_that_the_model_refuses():
    """Batch norm needs two rows; the error says at which batch it stopped."""
    with pytest.raises(CaptureError, match="more than 1 value per channel") as caught:
        max_batch(make(), sample(), budget_bytes=10_000, loss_fn=square)
    assert "at batch 1" in caught.value.__notes__


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "memory of .* is not known: give budget, budget_gb"),
        ({"budget_gb": 1, "budget_bytes": 1}, "give the budget once"),
        ({"budget_gb": "many"}, "not an amount of memory"),
        ({"budget_gb": 1, "largest": 0}, "largest must be a whole number"),
        ({"budget_gb": 1, "time_limit_s": -1}, "time_limit_s must be"),
        ({"budget_gb": 1, "batch_dim": 7}, "dimension 7 for the batch"),
        ({"budget_gb": 1, "never_recompute": "trunk"}, "takes a sequence of patterns"),
    ],
)
def test_arguments_that_make_no_sense(model, options, named):
    """Each is refused with what it was and what to do."""
    with pytest.raises(ValueError, match=named):
        max_batch(model, sample(), loss_fn=both, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_loaded_plan_for_a_card_is_not_answered_for_the_cpu(tmp_path):
    """A file does not hold a device of one's own, so the question is refused."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    mine = replace(DEVICES["h100"], title="a card of one's own")
    plan = optimize(model, torch.ones(4, 8), budget_gb=1, loss_fn=torch.sum, device=mine)
    plan.save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="device="):
        Plan.load(tmp_path / "plan.json").max_batch(model, torch.ones(4, 8), loss_fn=torch.sum)
