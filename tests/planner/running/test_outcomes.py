"""Planned steps whose way through the model hangs on values."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.testing.bitwise import assert_same_training
from planner import Plan, optimize
from planner.errors import OutcomeChangedError, PlanError, PlanMismatchError
from planner.saving.serialize import (
    plan_from_dict,
    plan_to_dict,
)
from tests.planner.small import square

WIDTH = 16


class Asking(nn.Module):
    """Draws, counts and normalizes, then goes on as it is given."""

    def __init__(self, ask: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(0.3)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.ask = ask

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        h = self.dropout(self.norm(self.first(x).relu()))
        return self.last(self.ask(h, ids))


def asserting(h: Tensor, ids: Tensor) -> Tensor:
    if ids.max() >= 10:
        raise ValueError("ids out of range")
    return h


def picking(h: Tensor, ids: Tensor) -> Tensor:
    return h[ids != 0]


def finite(h: Tensor, ids: Tensor) -> Tensor:
    return h if torch.isfinite(h).all() else torch.nan_to_num(h) * 2


def splitting(h: Tensor, ids: Tensor) -> Tensor:
    parts = h.split([*ids.sort(descending=True)[0].tolist()[:2], h.shape[0] - 9])
    return torch.cat([part.cumsum(0) for part in parts])


def drawn(h: Tensor, ids: Tensor) -> Tensor:
    return h.cos() if torch.rand(()) < 0.5 else h


def sample(
    seed: int, ids: tuple[int, ...] = (0, 1, 2, 0, 5, 4, 0, 3, 1, 2)
) -> tuple[Tensor, Tensor]:
    x = torch.randn(len(ids), WIDTH, generator=torch.Generator().manual_seed(seed))
    return x, torch.tensor(ids)


def model_of(ask: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return Asking(ask).train()


def plan_of(model: nn.Module, **options: Any) -> Plan:
    return optimize(model, sample(0), budget_bytes=10**8, loss_fn=square, time_limit_s=1, **options)


def as_file(plan: Plan) -> dict[str, Any]:
    return json.loads(json.dumps(plan_to_dict(plan)))


def state_of(model: nn.Module) -> list[Tensor]:
    return [torch.get_rng_state(), *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("ask", [asserting, picking, finite, splitting])
def test_new_data_with_the_same_outcome_trains_to_the_same_bits(ask: Any) -> None:
    """While the outcome stays, steps on new data are planned ones, with eager's bits."""
    plan = plan_of(model_of(ask))
    assert plan.outcomes
    assert_same_training(
        lambda: Asking(ask).train(), plan.apply, lambda seed: sample(seed), loss_fn=square
    )


def test_a_draw_takes_both_ways_under_replan() -> None:
    """A step that skips at random is planned for each way that comes up."""
    plan = plan_of(model_of(drawn))
    assert_same_training(
        lambda: Asking(drawn).train(),
        lambda model: plan.apply(model, on_shape_change="replan"),
        lambda seed: sample(seed),
        loss_fn=square,
        steps=8,
    )


def test_a_changed_outcome_names_the_line_and_both_values() -> None:
    """The error says where the value was asked for, what was planned and what it is."""
    model = model_of(asserting)
    plan_of(model).apply(model)
    with pytest.raises(OutcomeChangedError, match=r"test_outcomes\.py:\d+.* was False .* is True"):
        model(*sample(1, (11,) * 10))


class SetsUp(nn.Module):
    """Begins its average with the first batch."""

    mean: Tensor
    ready: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("ready", torch.tensor(0))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        found = x.mean(0)
        if self.ready.item() == 0:
            self.mean.copy_(found)
            self.ready.fill_(1)
        else:
            self.mean.lerp_(found, 0.1)
        return self.layer(x - self.mean)


def test_what_a_first_step_sets_up_is_named_with_the_way_out() -> None:
    """A plan of the first step is refused; one of a model that has run once holds."""
    model = SetsUp().train()
    with pytest.raises(PlanError, match=r"test_outcomes.*'ready'.* run the model once before plan"):
        plan_of(model).apply(model)
    model(*sample(0))
    plan_of(model).apply(model)
    model(*sample(1))


class Starts(SetsUp):
    """Puts another buffer in the place of the one that it looks at."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.mean.abs().max() < 1e-5:
            self.mean = self.mean + x.mean(0)
        else:
            self.mean = self.mean * 0.9 + x.mean(0) * 0.1
        return self.layer(x - self.mean)


def test_a_buffer_that_is_replaced_is_looked_at_anew() -> None:
    """Quantization's first range, say; of a model that has run once the plan holds."""
    model = Starts().train()
    with pytest.raises(PlanError, match=r"'mean'.* run the model once before planning"):
        plan_of(model).apply(model)
    model(*sample(0))
    plan = plan_of(model)
    assert plan.outcomes
    plan.apply(model)
    model(*sample(1))


def test_a_way_that_chance_decides_is_refused_before_any_step() -> None:
    """The error says how often draws go otherwise, of a plan from a file as well."""
    model = model_of(drawn)
    plan = plan_of(model)
    for one in (plan, Plan.of(plan_from_dict(as_file(plan)))):
        with pytest.raises(PlanError, match=r"test_outcomes.* random numbers .* 1\d\d of 256"):
            one.apply(model)


def test_draws_that_never_decide_otherwise_are_no_chance() -> None:
    """That numbers drawn from 0 to 1 lie there is checked in each step, and planned."""

    def bounded(h: Tensor, ids: Tensor) -> Tensor:
        noise = torch.rand(WIDTH)
        if noise.max() > 1:
            raise ValueError("no such number")
        return h * noise

    plan = plan_of(model_of(bounded))
    assert plan.outcomes
    assert_same_training(
        lambda: Asking(bounded).train(), plan.apply, lambda seed: sample(seed), loss_fn=square
    )


class DropsLayers(nn.Module):
    """Leaves layers out at random."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not torch.rand([]) < 0.3:
                x = layer(x)
        return x


def test_layers_that_are_dropped_can_be_planned_by_themselves() -> None:
    """As the error advises: the model leaves planned layers out as its own."""
    x = sample(0)[0]

    def planned_by_layer(model: nn.Module) -> nn.Module:
        for layer in model.get_submodule("layers").children():
            optimize(layer, x.requires_grad_(), budget_bytes=10**8, time_limit_s=1).apply(layer)
        return model

    model = DropsLayers().train()
    whole = optimize(model, x, budget_bytes=10**8, loss_fn=square, time_limit_s=1)
    with pytest.raises(PlanError, match="plan each such layer by itself"):
        whole.apply(model)
    assert_same_training(
        lambda: DropsLayers().train(),
        planned_by_layer,
        lambda seed: sample(seed)[0].requires_grad_(),
        loss_fn=square,
        steps=4,
    )


def test_a_failed_check_puts_generator_and_buffers_back() -> None:
    """Numbers drawn and statistics updated before a check that fails are as before the step."""
    model = model_of(asserting)
    plan_of(model).apply(model)
    before = state_of(model)
    with pytest.raises(OutcomeChangedError):
        model(*sample(1, (11,) * 10))
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(model), strict=True))


@pytest.mark.filterwarnings("ignore:a training step of a planned:planner.errors.PlanWarning")
@pytest.mark.parametrize("policy", ["replan", "unplanned"])
def test_other_sizes_are_eagers_under_a_policy(policy: Any) -> None:
    """A mask with more elements is replanned, or run by the model's own forward."""
    plan = plan_of(model_of(picking))
    ids = [(0, 1, 2, 0, 5, 4, 0, 3, 1, 2), (1,) * 10, (0,) * 9 + (1,), (1,) * 10]
    assert_same_training(
        lambda: Asking(picking).train(),
        lambda model: plan.apply(model, on_shape_change=policy),
        lambda seed: sample(seed, ids[seed % 4]),
        loss_fn=square,
        steps=4,
    )


@pytest.mark.filterwarnings("ignore:a training step of a planned:planner.errors.PlanWarning")
@pytest.mark.parametrize("policy", ["replan", "unplanned"])
def test_an_assertion_raises_its_own_error_under_a_policy(policy: Any) -> None:
    """A failing assertion is eager's where the call is not the planned one anyway."""
    model = model_of(asserting)
    plan_of(model).apply(model, on_shape_change=policy)
    with pytest.raises(ValueError, match="ids out of range"):
        model(*sample(1, (11,) * 10))


def test_a_plan_from_a_file_goes_the_planned_way(tmp_path: Path) -> None:
    """The outcomes are in the file, so that the step is captured again without a sample."""
    plan = plan_of(model_of(picking))
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.outcomes == plan.outcomes
    assert_same_training(
        lambda: Asking(picking).train(), loaded.apply, lambda seed: sample(seed), loss_fn=square
    )


def test_a_file_without_outcomes_still_loads() -> None:
    """An older file does not say what was asked for; a model that asks is then refused."""
    model = model_of(picking)
    data = as_file(plan_of(model))
    del data["outcomes"]
    plan = Plan.of(plan_from_dict(data))
    with pytest.raises(PlanMismatchError, match="value"):
        plan.apply(copy.deepcopy(model))


def test_outcomes_of_another_model_are_a_mismatch() -> None:
    """A model that asks something else than the planned one is another model."""
    model = model_of(picking)
    data = as_file(plan_of(model))
    data["outcomes"] = [{"number": True}]
    with pytest.raises(PlanMismatchError, match="does not return what question"):
        Plan.of(plan_from_dict(data)).apply(copy.deepcopy(model))


def test_outcomes_of_a_file_are_checked() -> None:
    """What is no outcome is refused when the file is read."""
    data = as_file(plan_of(model_of(picking)))
    data["outcomes"] = [{"number": "many"}]
    with pytest.raises(PlanError, match="outcomes"):
        plan_from_dict(data)


def test_a_step_that_asks_nothing_copies_nothing() -> None:
    """Without checks nothing is kept in case one fails."""
    plan = plan_of(model_of(lambda h, ids: h))
    assert plan.outcomes == ()
    assert not any("in case a check fails" in s.name for s in plan.graph.storages)


def test_copies_in_case_a_check_fails_are_counted() -> None:
    """The statistics that are copied before a step are in the graph, to the byte."""
    plan = plan_of(model_of(asserting))
    (copies,) = (s for s in plan.graph.storages if "in case a check fails" in s.name)
    assert copies.size_bytes == 2 * 4 * WIDTH + 8


class Packed(nn.Module):
    """A recurrent layer over sequences of several lengths."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 4)
        self.layer = kind(4, 8, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.first(x), lengths, batch_first=True, enforce_sorted=False
        )
        return nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0]


def sequences(seed: int, lengths: tuple[int, ...] = (3, 6, 1, 3)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(lengths), 6, WIDTH, generator=generator), torch.tensor(lengths)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_packed_sequences_train_to_the_same_bits(kind: type[nn.RNNBase]) -> None:
    """Lengths of sequences are part of what is planned for, and replanned when they change."""

    def make() -> nn.Module:
        return Packed(kind).train()

    plan = optimize(make(), sequences(0), budget_bytes=10**8, loss_fn=square, time_limit_s=1)
    lengths = [(3, 6, 1, 3), (3, 6, 1, 3), (2, 2, 6, 5)]
    assert_same_training(
        make,
        lambda model: plan.apply(model, on_shape_change="replan"),
        lambda seed: sequences(seed, lengths[seed % 3]),
        loss_fn=square,
    )


CTC = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "conv_dim": (16, 16),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 8),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 32,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "feat_extract_norm": "layer",
    "ctc_zero_infinity": True,
}


@pytest.mark.slow
def test_a_ctc_model_trains_to_the_same_bits() -> None:
    """Its check of labels, their mask and their lengths hold for other labels, too."""
    transformers = pytest.importorskip("transformers")

    def make() -> nn.Module:
        return transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**CTC)).train()

    def speech(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            "input_values": torch.randn(2, 512, generator=generator),
            "labels": torch.randint(1, 31, (2, 4), generator=generator),
        }

    plan = optimize(make(), speech(0), budget_bytes=10**9, time_limit_s=1)
    assert not plan.branch_free
    assert_same_training(make, plan.apply, speech, loss_fn=lambda output: output.loss)


@pytest.mark.slow
def test_an_image_text_model_trains_to_the_same_bits() -> None:
    """The number of image tokens is checked in each step, as eager checks it."""
    transformers = pytest.importorskip("transformers")
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    text = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=100,
        pad_token_id=0,
    )

    def make() -> nn.Module:
        config = transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=99, vision_feature_layer=-1
        )
        return transformers.LlavaForConditionalGeneration(config).train()

    def pairs(seed: int, num_images: int = 4) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 98, (2, 12), generator=generator)
        ids[:, 1 : 1 + num_images] = 99
        pixels = torch.randn(2, 3, 16, 16, generator=generator)
        return {"input_ids": ids, "pixel_values": pixels, "labels": ids.clone()}

    plan = optimize(make(), pairs(0), budget_bytes=10**9, time_limit_s=1)
    assert not plan.branch_free
    assert_same_training(make, plan.apply, pairs, loss_fn=lambda output: output.loss)
    model = plan.apply(make())
    with pytest.raises(OutcomeChangedError, match="modeling_llava"):
        model(**pairs(1, num_images=3))


@pytest.mark.slow
def test_a_mixture_of_experts_takes_eagers_path() -> None:
    """Grouped products on the CPU are eager's, so that the plan is none for compilers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=99,
    )

    def make() -> nn.Module:
        return transformers.MixtralForCausalLM(config).train()

    def tokens(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 98, (2, 12), generator=generator)
        return {"input_ids": ids, "labels": ids}

    plan = optimize(make(), tokens(0), budget_bytes=10**9, time_limit_s=1)
    assert not plan.branch_free
    assert_same_training(make, plan.apply, tokens, loss_fn=lambda output: output.loss)
