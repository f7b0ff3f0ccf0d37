"""What a step would take at many shapes, against the same step planned and measured."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks.testing.zoo import (
    ZOO,
    Case,
    cases,
)
from planner import InfeasibleBudgetError, estimate, measure, optimize
from tests.planner.sizing.resized import real_call
from tests.planner.small import Net, make, sample, square


def slow(*names: str) -> list:
    """Cases that run with the slow tests."""
    chosen = (ZOO[name]("tiny") for name in names)
    return [
        pytest.param(case, id=case.name, marks=(*case.marks, pytest.mark.slow)) for case in chosen
    ]


def llama(**options):
    """A narrow LLaMA on meta: parameters without memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{**shape, **options})).train()
    return model, text(2, 16)


def text(batch: int, length: int):
    """Tokens and labels on meta."""
    tokens = torch.zeros(batch, length, dtype=torch.long, device="meta")
    return {"input_ids": tokens, "labels": torch.zeros_like(tokens)}


# -- against the planner and against real steps ---------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        *cases("tiny", "mlp_frozen"),
        *slow("gpt2", "bert", "vit", "convnext", "unet", "mlp_bf16"),
    ],
)
def test_the_peak_is_the_one_that_optimize_knows(case: Case):
    """At two batch sizes that the sample does not have, to the byte, scratch included."""
    model = case.make()
    with case.context():
        found = estimate(
            model,
            case.sample(0),
            batch_sizes=(3, 6),
            loss_fn=case.loss_fn,
            optimizer="adamw",
            measure_scratch=True,
        )
        for row in found.rows:
            call, loss_fn = real_call(case, model, row.batch)
            plan = optimize(model, call, budget_gb=100, loss_fn=loss_fn, optimizer="adamw")
            assert row.peak_bytes == plan.baseline_peak_bytes
            assert row.step_us == plan.baseline_step_us


@pytest.mark.parametrize(
    "case",
    [*cases("tiny", "gpt2"), *slow("bert", "t5", "vit", "transformer_encoder", "unet", "resnet50")],
)
def test_the_peak_is_the_measured_one(case: Case):
    """Within one per cent of the allocator's own record, at two batch sizes."""
    model = case.make()
    with case.context():
        found = estimate(
            model,
            case.sample(0),
            batch_sizes=(2, 8),
            loss_fn=case.loss_fn,
            optimizer="adamw",
            measure_scratch=True,
        )
        for row in found.rows:
            call, loss_fn = real_call(case, model, row.batch)
            real = measure(model, call, loss_fn=loss_fn, optimizer="adamw", repeats=0)
            assert row.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)


@pytest.mark.slow
def test_a_model_on_meta_is_estimated_as_one_on_the_cpu():
    """The same figures, and the sequence length is followed as optimize sees it."""
    model, given = llama()
    found = estimate(model, given, batch_sizes=(1, 4), sequence_lengths=(8, 24), optimizer="adamw")
    assert [(row.batch, row.sequence) for row in found.rows] == [(1, 8), (4, 8), (1, 24), (4, 24)]
    for row in found.rows:
        plan = optimize(model, text(row.batch, row.sequence), budget_gb=1, optimizer="adamw")
        assert row.peak_bytes == plan.baseline_peak_bytes
        assert row.tokens_per_s == pytest.approx(
            row.batch * row.sequence * 1e6 / plan.baseline_step_us
        )
    on_cpu = estimate(model.to_empty(device="cpu"), given, batch_sizes=(4,), optimizer="adamw")
    assert (
        on_cpu.rows[0].memory
        == estimate(llama()[0], given, batch_sizes=(4,), optimizer="adamw").rows[0].memory
    )


def test_categories_add_up_to_the_peak():
    """Parameters and optimizer state are those of the model, everything else is at the peak."""
    model = make()
    row = estimate(model, sample(), batch_sizes=(64,), loss_fn=square, optimizer="adam").row(64)
    assert sum(row.memory.by_category.values()) == row.peak_bytes
    weights = sum(4 * p.numel() for p in model.parameters())
    assert row.memory.by_category["parameter"] == weights
    steps = 4 * len(list(model.parameters()))
    assert row.memory.by_category["optimizer_state"] == 2 * weights + steps


# -- another device ---------------------------------------------------------------------


def test_a_device_that_is_not_here():
    """Its memory is the budget, its sheet the cost model; the model stays where it is."""
    model, given = llama()
    options = {"batch_sizes": (512,), "sequence_lengths": (128,)}
    found = estimate(model, given, device="a100", autocast=torch.bfloat16, **options)
    assert found.device_type == "cuda"
    assert found.autocast == "bfloat16"
    assert "A100" in found.device
    assert found.rows[0].fits
    assert found.headroom_bytes > 0
    assert 35 * 10**9 < found.budget_bytes <= 80 * 2**30
    on_cpu = estimate(model, given, **options)
    assert found.rows[0].step_us < on_cpu.rows[0].step_us


# -- nothing runs -------------------------------------------------------------------------


def test_nothing_is_allocated():
    """A batch of a billion rows, each of 128 bytes, beside a model on the CPU."""
    found = estimate(make(), sample(), batch_sizes=(10**9,), loss_fn=square)
    assert found.rows[0].peak_bytes > 128 * 10**9


def test_the_model_is_left_alone():
    """Values, running statistics, gradients and the random generator stay."""
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    estimate(model, sample(), batch_sizes=(8,), loss_fn=square, optimizer="adamw")
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


# -- shapes that fail -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_sequence_that_the_model_cannot_take(name):
    """Its row says why in a line, and the other rows go on."""
    case = ZOO[name]("tiny")
    found = estimate(case.make(), case.sample(0), batch_sizes=(2,), sequence_lengths=(64, 16))
    failed, fine = found.rows
    assert "64" in failed.error or "table of 32 rows" in failed.error
    assert "\n" not in failed.error
    assert failed.peak_bytes is failed.fits is failed.tokens_per_s is None
    assert fine.error is None
    assert fine.peak_bytes > 0
    assert failed.error in str(found)


def test_a_loss_with_targets_that_cannot_follow():
    """The row says what is the matter with it."""
    held = {"labels": torch.zeros(4, 4)}
    found = estimate(
        make(),
        sample(rows=4),
        batch_sizes=(4, 6),
        loss_fn=lambda y: nn.functional.mse_loss(y, held["labels"].view(4, 4)),
    )
    assert found.row(6).error is None or "targets" in found.row(6).error


# -- with a budget --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged():
    """Rows that fit, fit with a plan, and do not fit."""
    return estimate(
        make(),
        sample(),
        batch_sizes=(64, 160, 4000),
        loss_fn=square,
        budget="220kB",
        measure_scratch=True,
    )


def test_a_step_that_fits(judged):
    """Its peak is within the budget, and no plan is looked for."""
    row = judged.row(64)
    assert row.fits is True
    assert row.peak_bytes <= 220_000
    assert row.planned is row.least_budget_bytes is None


def test_a_step_that_fits_with_a_plan(judged):
    """The peak of the plan is within the budget, and optimize does no worse."""
    row = judged.row(160)
    assert row.fits is False
    assert row.peak_bytes > 220_000 >= row.planned.peak_bytes
    plan = optimize(make(), sample(rows=160), budget_bytes=220_000, loss_fn=square)
    assert plan.overhead <= row.planned.overhead + 1e-9
    assert row.planned.gap >= plan.gap - 1e-9
    assert "fits with a plan at +" in str(judged)


@pytest.mark.slow
def test_a_step_that_does_not_fit(judged):
    """The least budget that it names works, and less than the bound does not."""
    row = judged.row(4000)
    assert row.fits is False
    assert row.planned is None
    plan = optimize(make(), sample(rows=4000), budget_bytes=row.least_budget_bytes, loss_fn=square)
    assert plan.predicted_peak_bytes <= row.least_budget_bytes
    with pytest.raises(InfeasibleBudgetError):
        optimize(make(), sample(rows=4000), budget_bytes=row.lower_bound_bytes - 1, loss_fn=square)
    assert "does not fit: a plan needs" in str(judged)


def test_headroom_lowers_the_limit():
    """A step that just fits does not with headroom, and the least budget has room for it."""
    peak = estimate(make(), sample(), batch_sizes=(64,), loss_fn=square).row(64).peak_bytes
    options = {"batch_sizes": (64,), "loss_fn": square}
    tight = estimate(make(), sample(), budget=f"{peak}B", **options)
    assert tight.row(64).fits
    roomy = estimate(make(), sample(), budget=f"{peak}B", headroom="10%", **options)
    assert not roomy.row(64).fits
    assert roomy.headroom_bytes == int(0.1 * peak)


# -- the result -------------------------------------------------------------------------


def test_figures_as_json(judged):
    """Every figure of a row is in the dictionary, which JSON takes."""
    read = json.loads(json.dumps(judged.to_dict()))
    assert read["budget_bytes"] == 220_000
    assert [row["batch"] for row in read["rows"]] == [64, 160, 4000]
    assert read["rows"][1]["planned"]["peak_bytes"] <= 220_000
    assert read["rows"][0]["memory"]["by_category"]["parameter"] > 0


def test_the_table_has_a_line_for_each_row(judged):
    """With figures in units that people read."""
    lines = str(judged).splitlines()
    assert sum(line.lstrip().startswith(("64 ", "160 ", "4000 ")) for line in lines) == 3
    assert "budget 220 kB" in lines[1]


def test_a_row_by_its_shape(judged):
    """Rows are found by batch and sequence."""
    assert judged.row(160).batch == 160
    with pytest.raises(KeyError, match="no row for batch 5"):
        judged.row(5)


def test_a_sample_of_the_users_own():
    """make_sample decides, and is asked for each shape."""
    asked = []

    def make_sample(batch, sequence):
        asked.append((batch, sequence))
        return torch.empty(2 * batch, 32, device="meta")

    found = estimate(
        make(), sample(), batch_sizes=(32, 64), loss_fn=square, make_sample=make_sample
    )
    assert asked == [(32, None), (64, None)]
    doubled = estimate(make(), sample(), batch_sizes=(64, 128), loss_fn=square)
    assert [r.peak_bytes for r in found.rows] == [r.peak_bytes for r in doubled.rows]


def test_progress_in_lines():
    """A function hears what is being done."""
    heard: list[str] = []
    estimate(make(), sample(), batch_sizes=(8,), loss_fn=square, progress=heard.append)
    assert heard[0] == "batch 8: capturing"


@pytest.mark.parametrize(
    ("options", "kind", "named"),
    [
        ({"batch_sizes": ()}, ValueError, "batch_sizes takes whole numbers from 1 on, got 'none'"),
        ({"batch_sizes": (0,)}, ValueError, "got 0"),
        ({"batch_sizes": "12"}, ValueError, "sequence of whole numbers, got '12'"),
        ({"sequence_lengths": (1.5,)}, ValueError, "sequence_lengths.*got 1.5"),
        ({"device": "abacus"}, ValueError, "unknown device 'abacus'; known are"),
        ({"budget": "many"}, ValueError, "not an amount of memory"),
        ({"budget": "60%"}, ValueError, "another budget in each row"),
        ({"optimizer": "magic"}, ValueError, "unknown optimizer"),
        ({"cost_model": "guess"}, ValueError, "cost_model is"),
        ({"batch_dim": 5}, ValueError, "dimension 5 for the batch"),
        ({"make_sample": 3}, ValueError, "make_sample must be a function"),
        ({"progress": 3}, ValueError, "progress must be"),
    ],
)
def test_arguments_that_make_no_sense(options, kind, named):
    """Each is refused with what it was and what it should be."""
    with pytest.raises(kind, match=named):
        estimate(make(Net), sample(), loss_fn=square, **{"batch_sizes": (8,), **options})


def test_eval_mode_is_refused():
    """As optimize does."""
    with pytest.raises(ValueError, match="eval mode"):
        estimate(make().eval(), sample())


def test_a_dimension_that_is_no_sequence_is_told():
    """Where no shape can be captured, the table says what was taken for the sequence, no more."""
    found = estimate(make(), sample(), batch_sizes=(8,), sequence_lengths=(7,), loss_fn=square)
    assert found.row(8, 7).error
    text = str(found)
    assert "Dimension 1 of the inputs was taken for the sequence" in text
    assert "times by" not in text


def test_a_librarys_workspace_is_no_buffer():
    """cuBLAS's workspace has a column of its own beside the model's buffers."""
    found = estimate(make(), sample(), batch_sizes=(8,), device="h100", loss_fn=square)
    memory = found.rows[0].memory
    assert memory.by_category["library_workspace"] > 0
    assert memory.by_category["buffer"] < 10_000
    assert sum(memory.by_category.values()) == memory.total_bytes
    assert "library workspace" in str(found)


# -- what is asked of values that no resized call has -------------------------------------


class Masked(nn.Module):
    """Does more where some of the mask is false, and where a compiler looks on."""

    def __init__(self, asks: str = "all", width: int = 32) -> None:
        super().__init__()
        self.asks = asks
        self.light = nn.Linear(width, width)
        self.heavy = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.asks == "count":  # a number of rows, which another batch has more of
            return self.light(x[: int(mask.sum())])
        if self.asks == "compiler" and torch.compiler.is_compiling():
            return self.heavy(self.light(x)) * mask
        return self.light(x) if mask.all() else self.heavy(self.light(x)) * mask


def masked_sample(rows: int, *, padded: bool) -> dict[str, torch.Tensor]:
    """Rows and a mask, of which the first may be false."""
    mask = torch.ones(rows, 1, dtype=torch.bool)
    mask[0] = not padded
    return {"x": torch.zeros(rows, 32), "mask": mask}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("asks", ["all", "compiler"])
def test_other_shapes_answer_as_the_sample_does(asks, padded):
    """Yes or no of the sample is taken for every batch: the step is the one that is planned."""
    found = estimate(
        model := make(lambda: Masked(asks)),
        masked_sample(4, padded=padded),
        batch_sizes=(4, 16),
        loss_fn=square,
        measure_scratch=True,
    )
    for row in found.rows:
        call = masked_sample(row.batch, padded=padded)
        plan = optimize(model, call, budget_gb=1, loss_fn=square)
        assert (row.peak_bytes, row.step_us) == (plan.baseline_peak_bytes, plan.baseline_step_us)


def test_counts_of_the_sample_are_not_taken_for_others():
    """How many rows a mask keeps is another number at another batch size: the row says so."""
    model = make(lambda: Masked("count"))
    row = estimate(model, masked_sample(4, padded=False), batch_sizes=(16,), loss_fn=square).row(16)
    assert row.step_us is None
    assert "_local_scalar_dense" in row.error


def test_without_values_the_compilers_path_is_followed():
    """A sample on meta answers nothing, and is estimated like one that needs more."""

    def peak_bytes(padded: bool, device: str) -> int | None:
        given = {n: t.to(device) for n, t in masked_sample(4, padded=padded).items()}
        model = make(lambda: Masked("compiler")).to(device)
        return estimate(model, given, batch_sizes=(16,), loss_fn=square).row(16).peak_bytes

    unknown = peak_bytes(False, "meta")
    assert unknown == peak_bytes(True, "cpu")
    assert unknown > peak_bytes(False, "cpu")
