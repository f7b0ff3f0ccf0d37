"""What each rank of a mesh holds and sends, against one process and figures by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planner import CaptureError, estimate, estimate_mesh, optimize
from planner.mesh.communication import all_reduced, gathered
from planner.mesh.pipeline import stage_of, stage_sample

from .tiny_llama import IN_LAYERS, ROWS, TOKENS, VOCABULARY, WIDTH, tiny_llama, tokens

transformers = pytest.importorskip("transformers")

HIDDEN_BYTES = 4 * ROWS * TOKENS * WIDTH


class Pair(nn.Module):
    """Two layers of a column-parallel and a row-parallel matrix."""

    def __init__(self, width: int = 8, inner: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, inner), "down": nn.Linear(inner, width)})
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["down"](layer["up"](x).relu())  # type: ignore[index]
        return x


PAIR_PLAN = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}


def meta(device: str = "meta", layers: int = 4) -> tuple[nn.Module, dict[str, Any]]:
    return tiny_llama(device, layers), tokens(device)


def test_one_rank_is_one_process() -> None:
    """A mesh of one rank: peak, categories and time of ``estimate``."""
    model, sample = meta()
    found = estimate_mesh(model, sample, mesh={}, optimizer="adamw", device="h100").stages[0]
    (row,) = estimate(model, sample, batch_sizes=(ROWS,), optimizer="adamw", device="h100").rows
    assert found.unplanned == row.memory
    assert row.step_us == pytest.approx(found.microbatch_us + found.optimizer_us)
    assert found.traffic == ()


def test_divided_matrices_by_hand() -> None:
    """Width 8, inner 32, two ranks: 8·16 + 16 and 16·8 + 8 numbers a layer; sums of 5 rows."""
    sample = {"x": torch.zeros(5, 8)}
    found = estimate_mesh(
        Pair(), sample, mesh={"tp": 2}, tp_plan=PAIR_PLAN, loss_fn=torch.sum
    ).stages[0]
    assert found.unplanned.by_category["parameter"] == 4 * 2 * (8 * 16 + 16 + 16 * 8 + 8)
    sums = {each.what: (each.count, each.sent_bytes) for each in found.traffic}
    message = 4 * 5 * 8
    assert sums["sums of the forward pass"] == (2, 2 * all_reduced(message, 2))
    # The first layer's input is the batch, which has no gradient to be summed.
    assert sums["sums of the backward pass"] == (1, all_reduced(message, 2))
    assert found.unplanned.by_category["collective"] == message


def test_a_llama_is_divided_by_its_own_plan() -> None:
    """A layer sums twice a pass; the embedding once, forward; the head gathers logits."""
    model, sample = meta()
    found = estimate_mesh(model, sample, mesh={"tp": 2}, device="h100").stages[0]
    forward, backward = found.traffic
    logits = 4 * ROWS * TOKENS * VOCABULARY
    assert forward.count == 4 * 2 + 1 + 1
    assert forward.sent_bytes == 9 * all_reduced(HIDDEN_BYTES, 2) + gathered(logits, 2)
    assert backward.count == 4 * 2 + 1
    assert backward.sent_bytes == 9 * all_reduced(HIDDEN_BYTES, 2)
    assert forward.exposed_us == forward.time_us


@pytest.mark.slow
def test_a_plan_repeats_sums_with_their_products() -> None:
    """At the least memory attention's output is made again, and its sum with it."""
    model, sample = (
        tiny_llama("meta"),
        {name: torch.zeros(64, 64, dtype=torch.long, device="meta") for name in tokens()},
    )
    options: dict[str, Any] = {
        "mesh": {"tp": 2},
        "tp_plan": IN_LAYERS,
        "headroom": 0,
        "time_limit_s": 2.0,
    }
    free = estimate_mesh(model, sample, **options).stages[0].unplanned.total_bytes
    stage = estimate_mesh(model, sample, budget=f"{int(0.45 * free)}B", **options).stages[0]
    assert stage.plan is not None
    assert stage.memory is not None
    assert stage.memory.total_bytes == stage.plan.predicted_peak_bytes <= 0.45 * free
    weights = {
        k
        for k, s in enumerate(stage.plan.graph.storages)
        if s.name.endswith(("o_proj_weight", "down_proj_weight"))
    }
    again = sum(
        times
        for v, times in stage.plan.schedule.recomputed().items()
        if stage.plan.graph.operators[v].phase == "forward"
        and weights & set(stage.plan.graph.operators[v].inputs)
    )
    assert again > 0
    (repeated,) = (each for each in stage.traffic if "repeats" in each.what)
    assert repeated.count == again


def test_buckets_are_those_of_the_wrapper() -> None:
    """One stage: DistributedDataParallel's own count; its gradients are summed once."""
    model, sample = meta()
    options: dict[str, Any] = {"optimizer": "adamw", "device": "h100"}
    found = estimate_mesh(model, sample, mesh={"dp": 4}, **options).stages[0]
    alone = optimize(model, sample, budget_gb=70, distributed="ddp", outputs="held", **options)
    assert found.unplanned.total_bytes == alone.baseline_peak_bytes
    (sums,) = found.traffic
    parameters = sum(4 * p.numel() for p in model.parameters())
    assert sums.sent_bytes == all_reduced(parameters, 4)


def test_shards_are_those_of_fully_shard() -> None:
    """The baseline of a plan in blocks under ``fsdp2:ranks=4``, and three collectives."""
    model, sample = meta()
    options: dict[str, Any] = {"optimizer": "adamw", "device": "h100", "granularity": "blocks"}
    found = estimate_mesh(model, sample, mesh={"dp": 4}, data_parallel="fsdp2", **options).stages[0]
    alone = optimize(
        model, sample, budget_gb=70, distributed="fsdp2:ranks=4", time_limit_s=0.1, **options
    )
    assert found.unplanned.total_bytes == alone.baseline_peak_bytes
    parameters = sum(4 * p.numel() for p in model.parameters())
    assert [each.sent_bytes for each in found.traffic] == [gathered(parameters, 4)] * 3


def test_stages_together_are_the_model() -> None:
    """Four stages of a real LLaMA, one after another: the model's loss, to the last bit."""
    model, sample = tiny_llama(), tokens()
    hidden = None
    names: list[str] = []
    for stage in range(4):
        own = stage_of(model, stage, 4)
        given = stage_sample(sample, hidden, stage, 4)
        output = own.module(**given)
        hidden = None if stage == 3 else output.last_hidden_state
        names += [
            f"{own.prefix}{name}".replace("layers.0", f"layers.{stage}")
            for name, _ in own.module.named_parameters()
        ]
    assert torch.equal(output.loss, model(**sample).loss)
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_more_stages_than_layers_are_refused() -> None:
    """Four layers cannot make five stages."""
    with pytest.raises(ValueError, match="4 layers cannot make 5 stages"):
        estimate_mesh(*meta(), mesh={"pp": 5}, num_microbatches=5)


def test_stages_hold_their_micro_batches() -> None:
    """Two stages, 1F1B: two calls alive on the first, what is received and sent on both."""
    model, sample = meta()
    found = estimate_mesh(
        model,
        sample,
        mesh={"dp": 2, "pp": 2},
        num_microbatches=4,
        optimizer="adamw",
        device="h100",
    )
    first, last = found.stages
    assert (first.in_flight, last.in_flight) == (2, 1)
    assert (first.layers, last.layers) == ((0, 2), (2, 4))
    assert first.unplanned.by_category["waiting"] > 0
    assert "waiting" not in last.unplanned.by_category
    assert last.unplanned.by_category["received"] == 3 * HIDDEN_BYTES
    for stage in found.stages:
        assert stage.unplanned.by_category["bucket"] > 0
        (message,) = (each for each in stage.traffic if each.axis == "pp")
        assert message.sent_bytes == 4 * HIDDEN_BYTES
        assert message.time_us is not None
        assert message.exposed_us == pytest.approx(message.time_us / 4)
    slowest = max(stage.microbatch_us for stage in found.stages)
    assert found.step_us is not None
    assert found.step_us > 5 * slowest
    assert found.bubble == pytest.approx(1 / 5, rel=0.2)
    assert json.loads(json.dumps(found.to_dict()))["stages"][1]["in_flight"] == 1
    assert "layers 2 to 3, 1 in flight" in str(found)


def test_without_a_bandwidth_there_are_volumes_only() -> None:
    """On the CPU no link is known; the text says what to give."""
    model, sample = meta(layers=1)
    found = estimate_mesh(model, sample, mesh={"tp": 2}, budget="1GB")
    assert found.step_us is None
    assert {each.time_us for each in found.stages[0].traffic} == {None}
    assert "give bandwidth_gb_per_s=" in str(found)


@pytest.mark.slow
def test_a_stage_that_cannot_fit_says_what_would() -> None:
    """A megabyte is less than the parameters: no plan, the least budget, no step time."""
    model, sample = meta(layers=1)
    found = estimate_mesh(model, sample, mesh={}, budget="100kB", bandwidth_gb_per_s={"tp": 1})
    (stage,) = found.stages
    assert (found.fits, stage.memory, stage.overhead, found.step_us) == (False, None, None, None)
    assert stage.least_budget_bytes is not None
    assert "no plan is known to fit; the least known to work is" in str(found)


def test_a_model_that_insists_on_its_sizes_is_named() -> None:
    """OPT's attention counts heads by an attribute, and would take two tokens for one."""
    config = transformers.OPTConfig(
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=50,
        use_cache=False,
    )
    with torch.device("meta"):
        model = transformers.OPTForCausalLM(config).train()
    plan = {f"model.decoder.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"}
    plan["model.decoder.layers.*.self_attn.out_proj"] = "rowwise"
    with pytest.raises(ValueError, match="neither all nor one part of the work of"):
        estimate_mesh(model, tokens("meta"), mesh={"tp": 2}, tp_plan=plan)


def test_a_model_that_cannot_run_on_parts_says_so() -> None:
    """A row-parallel matrix that gets all features: the captured error has a note."""
    with pytest.raises(CaptureError) as failed:
        estimate_mesh(
            Pair(),
            {"x": torch.zeros(5, 8)},
            mesh={"tp": 2},
            tp_plan={"layers.*.down": "rowwise"},
            loss_fn=torch.sum,
        )
    (note,) = failed.value.__notes__
    assert "2 modules have the shapes of one of 2 tensor-parallel ranks" in note


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mesh": {"tp": 3}, "tp_plan": PAIR_PLAN}, "'layers.0.up' has 32 features, which 3"),
        ({"mesh": {"tp": 2}}, "Pair does not say how its matrices are divided"),
        ({"mesh": {"tp": 2}, "tp_plan": {"layers.*.in": "colwise"}}, "Pair has none such"),
        (
            {"mesh": {"tp": 2}, "tp_plan": {"layers.*.up": "packed_colwise"}},
            "divided as 'packed_colwise', which is not estimated",
        ),
        (
            {"mesh": {"tp": 2}, "tp_plan": {"layers.*": "colwise"}},
            "needs an nn.Linear, and it is a ModuleDict",
        ),
        ({"mesh": {"pp": 2}, "num_microbatches": 2}, "Pair does not say which of its modules"),
        ({"mesh": {"pp": 2}}, "num_microbatches= is needed"),
        ({"mesh": {}, "num_microbatches": 0}, "num_microbatches takes whole numbers from 1"),
        ({"mesh": {"dp": 2}, "data_parallel": "fsdp2"}, "for pp=1, by granularity='blocks'"),
        ({"mesh": {}, "schedule": "zero_bubble"}, "schedule is one of"),
        ({"mesh": {"dp": 2}, "data_parallel": "zero"}, "data_parallel is one of"),
        (
            {"mesh": {"pp": 2}, "num_microbatches": 2, "granularity": "blocks"},
            "granularity='blocks' counts one call at a time",
        ),
        ({"mesh": {}, "budget": "60%"}, "is a share of no one peak"),
    ],
)
def test_what_is_not_estimated_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    """Each says what to give instead."""
    with pytest.raises(ValueError, match=words):
        estimate_mesh(Pair(), {"x": torch.zeros(5, 8)}, loss_fn=torch.sum, **options)


def test_fused_projections_of_another_kind_are_refused() -> None:
    """GPT-2's matrices are Conv1D, transposed and fused."""
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20)
        )
    with pytest.raises(ValueError, match=r"needs an nn\.Linear, and it is a Conv1D"):
        estimate_mesh(
            model, tokens("meta"), mesh={"tp": 2}, tp_plan={"transformer.h.*.mlp.c_fc": "colwise"}
        )


def test_the_model_is_left_as_it_is() -> None:
    """Its parameters, their memory and its class; a real model is estimated on stand-ins."""
    model, sample = tiny_llama(), tokens()
    before = {name: (p.data_ptr(), p.shape) for name, p in model.named_parameters()}
    estimate_mesh(model, sample, mesh={"tp": 2, "pp": 2}, num_microbatches=2, device="h100")
    assert {name: (p.data_ptr(), p.shape) for name, p in model.named_parameters()} == before
    assert not any(module._forward_hooks for module in model.modules())
