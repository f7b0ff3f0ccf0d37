"""TRL's trainers and PEFT's adapters under Transformers' ``RematCallback``."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import planner
from planner import applied_plan
from planner.base.forward_slot import stand_in_of
from tests.planner.integrations.loops import (
    LENGTH,
    VOCABULARY,
    Texts,
    Trained,
    assert_same,
    language_model,
    trained,
)
from tests.planner.integrations.test_transformers import remat, run, trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::FutureWarning",
        "ignore::DeprecationWarning",
        "ignore:.*pin_memory.*:UserWarning",
        "ignore:.*solved anew:planner.PlanWarning",
    ),
]

WORDS = [f"w{i}" for i in range(VOCABULARY - 3)]


def tokenizer() -> Any:
    """One token for each word."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    words = special | {word: i + len(special) for i, word in enumerate(WORDS)}
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    found.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def data(*columns: str) -> Any:
    """Rows of random words."""
    datasets = pytest.importorskip("datasets")
    draws = random.Random(0)

    def words() -> str:
        return " " + " ".join(draws.choices(WORDS, k=draws.randint(5, LENGTH // 2 - 2)))

    return datasets.Dataset.from_list([{c: words() for c in columns} for _ in range(48)])


def lora() -> Any:
    """Adapters of rank 4 on the attention's projections."""
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(
        r=4, target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )


OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "max_steps": 20,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "max_length": LENGTH,
    "pad_to_multiple_of": 8,
    "bf16": False,
}


SAVING = {"save_strategy": "steps", "save_steps": 10}


def sft(
    folder: Path, *callbacks: Any, resume: str | None = None, saves: bool = False, **options: Any
) -> Trained:
    """Supervised fine-tuning."""
    trl = pytest.importorskip("trl")
    arguments = trl.SFTConfig(str(folder), **OPTIONS | (SAVING if saves else {}))
    made = trl.SFTTrainer(
        language_model(),
        arguments,
        train_dataset=data("text"),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
        **options,
    )
    return run(made, resume=resume)


def dpo(
    folder: Path, *callbacks: Any, resume: str | None = None, saves: bool = False, **options: Any
) -> Trained:
    """Preferences, against a reference model or the model without its adapters."""
    trl = pytest.importorskip("trl")
    arguments = trl.DPOConfig(str(folder), **OPTIONS | (SAVING if saves else {}))
    reference = None if options else language_model(dropout=0.0)
    made = trl.DPOTrainer(
        language_model(dropout=0.0),
        reference,
        arguments,
        train_dataset=data("prompt", "chosen", "rejected"),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
        **options,
    )
    return run(made, resume=resume, others=() if reference is None else (reference,))


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("loop", [sft, dpo])
def test_a_trainer_of_trl_by_a_plan(loop: Any, adapters: bool, tmp_path: Path) -> None:
    """Same losses and metrics, same weights, within the budget, every step by the plan."""
    options = {"peft_config": lora()} if adapters else {}
    eager = loop(tmp_path, **options)
    callback = remat(budget="97%")  # the head works in chunks of a fixed size
    planned = loop(tmp_path, callback, **options)
    assert_same(eager, planned)
    assert planned.peak_bytes <= callback.plan.budget_bytes
    assert (callback.applied.planned_steps, callback.applied.unplanned_steps) == (20, 0)


@pytest.mark.parametrize("loop", [sft, dpo])
def test_a_training_is_saved_and_resumed(loop: Any, tmp_path: Path) -> None:
    """Resumed in the middle by a plan, it ends where one without a plan ends."""
    options = {"peft_config": lora(), "saves": True}
    whole = loop(tmp_path / "whole", **options)
    resume = str(tmp_path / "whole" / "checkpoint-10")
    # TRL begins to count tokens again, with a plan or without.
    eager = loop(tmp_path / "eager", resume=resume, **options)
    callback = remat(budget="97%")
    planned = loop(tmp_path / "planned", callback, resume=resume, **options)
    assert_same(eager, planned)
    for name, tensor in whole.state.items():
        assert torch.equal(tensor, planned.state[name]), name
    assert callback.applied.planned_steps == 10


def test_a_trainer_with_adapters(tmp_path: Path) -> None:
    """The frozen base's own layers are planned, too, with inputs that require no gradient."""
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        return peft.get_peft_model(language_model(), lora()).train()

    eager = run(trainer(tmp_path, adapted()))
    callback = remat(budget="70%")
    planned = run(trainer(tmp_path, adapted(), callback))
    assert_same(eager, planned)
    assert planned.peak_bytes <= callback.plan.budget_bytes
    assert callback.plan.schedule.recomputed()


@pytest.mark.parametrize("first", ["watch", "adapters"])
def test_a_base_model_is_watched_before_or_after_it_gets_adapters(first: str) -> None:
    """Either way its first call is planned with the adapters in it."""
    peft = pytest.importorskip("peft")

    def losses(planned: bool) -> tuple[list[float], Any]:
        base = language_model()
        if planned and first == "watch":
            planner.watch(base, budget="80%", gap=0.05)
        torch.manual_seed(0)
        model = peft.get_peft_model(base, lora()).train()
        if planned and first == "adapters":
            planner.watch(base, budget="80%", gap=0.05)
        row = {name: tensor[None] for name, tensor in Texts(1).rows[0].items()}

        def train() -> list[Any]:
            torch.manual_seed(1)
            found = []
            for _ in range(2):
                loss = model(**row, use_cache=False).loss
                loss.backward()
                found.append(loss.item())
                model.zero_grad()
            return found

        return trained(model, train), base

    (eager, _), (found, base) = losses(False), losses(True)
    assert_same(eager, found)
    assert applied_plan(base).planned_steps == 2
    assert stand_in_of(base) is not None
