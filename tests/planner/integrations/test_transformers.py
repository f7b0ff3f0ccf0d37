"""Transformers' Trainer under ``RematCallback``, and its models in a loop of one's own."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from planner import PlanError, applied_plan
from planner.base.forward_slot import stand_in_of
from tests.planner.integrations.loops import (
    Texts,
    Trained,
    assert_same,
    language_model,
    padded,
    trained,
)

# Trainer takes seconds to import, which tests that do not run need not wait for.
if TYPE_CHECKING:
    from transformers import Trainer

    from planner.integrations.transformers import RematCallback

pytestmark = pytest.mark.filterwarnings(
    # Of Transformers and accelerate, on a machine without an accelerator.
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore:.*pin_memory.*:UserWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)


def summed(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A loss of the user's own."""
    logits = outputs.logits[:, :-1].float().flatten(0, 1)
    loss = nn.functional.cross_entropy(
        logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    return loss / num_items_in_batch


def remat(**options: Any) -> RematCallback:
    """The callback, at three quarters of the memory unless another budget is given."""
    pytest.importorskip("accelerate")
    from planner.integrations.transformers import RematCallback

    if not any("budget" in name for name in options):
        options["budget"] = "75%"
    return RematCallback(**{"time_limit_s": 1, **options})


def trainer(folder: Path, model: nn.Module, *callbacks: RematCallback, **options: Any) -> Trainer:
    """A Trainer of twenty steps; options of its arguments, and of itself."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    own = {"train_dataset": Texts(), "data_collator": None}
    own = {name: options.pop(name, value) for name, value in own.items()}
    own |= {n: options.pop(n) for n in ("compute_loss_func", "eval_dataset") if n in options}
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": STEPS,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**{**defaults, **options})
    return Trainer(model=model, args=arguments, callbacks=list(callbacks), **own)


def run(trainer: Trainer, *, resume: str | None = None, others: tuple = ()) -> Trained:
    """Train, with the losses that were logged."""

    def train() -> list[Any]:
        trainer.train(resume_from_checkpoint=resume)
        return [
            {k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k}
            for entry in trainer.state.log_history
            if "train_loss" not in entry
        ]

    return trained(trainer.model, train, others)


STEPS = 20

LOOPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 4, "train_dataset": Texts(160)},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "compute_loss_func": {"compute_loss_func": summed},
    "own checkpointing": {"activation_checkpointing": True},  # TRL: gradient_checkpointing
    "evaluation": {
        "eval_dataset": Texts(8, seed=7),
        "eval_strategy": "steps",
        "eval_steps": 8,
    },
    "padding": {"train_dataset": Texts(60, many_lengths=True), "data_collator": padded},
    "by length": {
        "train_dataset": Texts(60, many_lengths=True),
        "data_collator": padded,
        "train_sampling_strategy": "group_by_length",
    },
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "eager"},
}


@pytest.mark.filterwarnings("ignore:.*solved anew:planner.PlanWarning")  # at other lengths
@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_a_trainer_by_a_plan_is_a_trainer_without(name: str, tmp_path: Path) -> None:
    """Same losses, same weights, within the budget, every step by the plan."""
    options = LOOPS[name]
    eager = run(trainer(tmp_path, language_model(), **options))
    model, callback = language_model(), remat()
    planned = run(trainer(tmp_path, model, callback, **options))
    assert_same(eager, planned)
    assert callback.plan.schedule.recomputed()
    assert planned.peak_bytes <= callback.plan.budget_bytes
    steps = STEPS * options.get("gradient_accumulation_steps", 1)
    assert (callback.applied.planned_steps, callback.applied.unplanned_steps) == (steps, 0)
    assert stand_in_of(model) is None
    assert "compute_loss" not in vars(model)


@pytest.mark.slow
def test_a_training_is_saved_and_resumed(tmp_path: Path) -> None:
    """Resumed in the middle by a plan, it ends where one without a plan ends."""
    eager = run(trainer(tmp_path / "eager", language_model()))
    saving = {"save_strategy": "steps", "save_steps": STEPS // 2}
    for resume in (None, str(tmp_path / "planned" / f"checkpoint-{STEPS // 2}")):
        callback = remat()
        last = trainer(tmp_path / "planned", language_model(), callback, **saving)
        assert_same(eager, run(last, resume=resume))
        assert callback.applied.planned_steps == (STEPS if resume is None else STEPS // 2)


@pytest.mark.slow
def test_a_callback_may_be_used_again(tmp_path: Path) -> None:
    """A second training is planned anew."""
    model, callback = language_model(), remat()
    for _ in range(2):
        run(trainer(tmp_path, model, callback, max_steps=2))
        assert callback.applied.planned_steps == 2


@pytest.mark.slow
@pytest.mark.parametrize("collected", [False, True])
def test_a_training_that_was_interrupted_is_begun_again(collected: bool, tmp_path: Path) -> None:
    """Its plan is in the model still, whose next training makes its own."""
    pytest.importorskip("accelerate")
    from transformers import TrainerCallback

    class Interrupts(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    model = language_model()
    first = trainer(tmp_path, model, remat(), Interrupts(), max_steps=2)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert applied_plan(model) is not None
    if collected:
        del first
        gc.collect()
    callback = remat()
    run(trainer(tmp_path, model, callback, max_steps=2))
    assert (callback.applied.planned_steps, callback.applied.unplanned_steps) == (2, 0)
    assert stand_in_of(model) is None


@pytest.mark.slow
def test_a_data_set_that_knows_its_lengths(tmp_path: Path) -> None:
    """The plan is made for its longest rows, and shorter batches take its schedule over."""
    datasets = pytest.importorskip("datasets")
    rows = [{k: v.tolist() for k, v in row.items()} for row in Texts(60, many_lengths=True).rows]
    texts = datasets.Dataset.from_list(rows)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = padded([{k: torch.tensor(v) for k, v in row.items()} for row in rows])
        drawn = random.random() + np.random.rand() + torch.rand(()).item()  # as masking does
        batch["input_ids"][:, 0] = int(drawn * 30) + 1
        return batch

    options = {"train_dataset": texts, "data_collator": collate, "max_steps": 3}
    eager = run(trainer(tmp_path, language_model(), **options))
    callback = remat()
    planned = run(trainer(tmp_path, language_model(), callback, **options))
    assert_same(eager, planned)
    assert planned.peak_bytes <= callback.plan.budget_bytes
    longest = max(len(row["input_ids"]) for row in rows)
    assert callback.plan.guard.arguments["input_ids"].shape == (8, longest)


@pytest.mark.slow
def test_what_a_loss_logs_is_logged_once(tmp_path: Path) -> None:
    """Planning calls the trainer's own loss, which leaves no trace of that."""
    pytest.importorskip("accelerate")
    from transformers import Trainer

    class Counting(Trainer):
        seen = 0

        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen += inputs["input_ids"].numel()
            self.counts = [*getattr(self, "counts", ()), self.seen]
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            self.log({"own": loss.item()})
            return loss

    def counted(*callbacks: RematCallback) -> tuple[Any, Trained]:
        made = trainer(tmp_path, language_model(), *callbacks, max_steps=2)
        made.__class__ = Counting  # whose own arguments are those of Trainer
        return made, run(made)

    (one, eager), (two, planned) = counted(), counted(remat())
    assert_same(eager, planned)
    assert (one.seen, one.counts) == (two.seen, two.counts)
    assert sum("own" in entry for entry in planned.losses) == 2


def test_an_own_loop() -> None:
    """Planned by its first call; the model's own checkpointing and its cache are switched off."""
    pytest.importorskip("accelerate")
    from planner.integrations.transformers import enable_remat

    losses = {}
    for planned in (False, True):
        model = language_model(layers=1, width=16)
        model.gradient_checkpointing_enable()
        if planned:
            enable_remat(model, budget="80%", gap=0.05)
            assert not model.is_gradient_checkpointing
            assert not model.config.use_cache
        torch.manual_seed(2)
        ids = Texts(4).rows[0]["input_ids"][None]
        losses[planned] = [model(input_ids=ids, labels=ids).loss.item() for _ in range(2)]
    assert losses[True] == losses[False]
    assert applied_plan(model).planned_steps == 2


def test_what_the_callback_refuses() -> None:
    """An unknown option, no budget, and a loop that is not a Trainer's."""
    with pytest.raises(TypeError, match="'batch' is none of them"):
        remat(budget_gb=1, batch=3)
    with pytest.raises(ValueError, match="give the budget once"):
        remat(budget=None)
    with pytest.raises(PlanError, match=r"in the callbacks of a transformers\.Trainer"):
        remat().on_train_begin(None, None, None, model=language_model())
