"""Lightning's Trainer under ``RematCallback``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from planner import CaptureError, PlanError
from planner.base.forward_slot import stand_in_of
from tests.planner.integrations.loops import (
    Texts,
    Trained,
    assert_same,
    language_model,
    padded,
    trained,
)

if TYPE_CHECKING:  # it takes seconds to import
    from planner.integrations.lightning import RematCallback

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning",
        "ignore:.*does not have many workers.*",
        "ignore:.*smaller than the logging interval.*",
        "ignore:Be aware that when using `ckpt_path`.*",
        "ignore:.*isinstance.treespec, LeafSpec.*",
        "ignore:.*[Cc]heckpoint directory .* exists and is not empty.*",
        "ignore:.*solved anew:planner.PlanWarning",
    ),
]


def remat(**options: Any) -> RematCallback:
    """The callback, at three quarters of the memory unless another budget is given."""
    pytest.importorskip("pytorch_lightning")
    from planner.integrations.lightning import RematCallback

    return RematCallback(**{"budget": "75%", "time_limit_s": 1, **options})


def language_module(*, calls_itself: bool = False, returns: tuple[str, ...] = ()) -> Any:
    """A LightningModule around the small language model."""
    pl = pytest.importorskip("pytorch_lightning")

    class Language(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = language_model()
            self.seen: list[float] = []

        def forward(self, batch: dict[str, Tensor]) -> Any:
            return self.model(**batch, use_cache=False)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            labels = batch.pop("labels")
            out = self(batch) if calls_itself else self.model(**batch, use_cache=False)
            loss = nn.functional.cross_entropy(
                out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
            )
            self.log("loss", loss)
            self.seen.append(loss.item())
            return {"loss": loss, **{name: out[name] for name in returns}} if returns else loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    return Language()


def run(
    folder: Path,
    module: Any,
    *callbacks: Any,
    texts: Texts | None = None,
    resume: str | None = None,
    **options: Any,
) -> Trained:
    """Train for twenty steps."""
    pl = pytest.importorskip("pytorch_lightning")
    loader = DataLoader(Texts(64) if texts is None else texts, batch_size=8, collate_fn=padded)
    defaults = {
        "max_steps": 20,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
    }
    trainer = pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})

    def train() -> list[Any]:
        pl.seed_everything(0, verbose=False)
        trainer.fit(module, loader, ckpt_path=resume)
        return module.seen

    return trained(module, train)


LOOPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"precision": "bf16-mixed"},
    "accumulation": {"accumulate_grad_batches": 4},
    "padding": {"texts": Texts(60, many_lengths=True)},
    "clipping": {  # and training_step calls the LightningModule itself
        "gradient_clip_val": 0.5
    },
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_trainer_by_a_plan_is_a_trainer_without(name: str, tmp_path: Path) -> None:
    """Same losses, same weights, within the budget, every step by the plan."""
    options, calls_itself = LOOPS[name], name == "clipping"
    eager = run(tmp_path, language_module(calls_itself=calls_itself), **options)
    module, callback = language_module(calls_itself=calls_itself), remat()
    planned = run(tmp_path, module, callback, **options)
    assert_same(eager, planned)
    assert callback.plan.schedule.recomputed()
    assert planned.peak_bytes <= callback.plan.budget_bytes
    assert (callback.applied.planned_steps, callback.applied.unplanned_steps) == (
        len(planned.losses),
        0,
    )
    assert stand_in_of(module) is stand_in_of(module.model) is None


def test_a_training_is_saved_and_resumed(tmp_path: Path) -> None:
    """Resumed in the middle by a plan, it ends where one without a plan ends."""
    pl = pytest.importorskip("pytorch_lightning")
    results, texts = [], Texts(80)  # ten batches: the middle is the end of an epoch
    for name, callbacks in (("eager", [[], []]), ("planned", [[remat()], [remat()]])):
        folder = tmp_path / name
        saving = pl.callbacks.ModelCheckpoint(folder, save_last=True)
        first = run(
            folder,
            language_module(),
            saving,
            *callbacks[0],
            texts=texts,
            max_steps=10,
            enable_checkpointing=True,
        )
        resume = str(folder / "last.ckpt")
        last = run(folder, language_module(), *callbacks[1], texts=texts, resume=resume)
        results.append((first, last))
    for eager, planned in zip(*results, strict=True):
        assert_same(eager, planned)


@pytest.mark.parametrize("signature", ["batch, i", "*arguments", "batch"])
def test_the_index_of_a_batch_may_have_any_name(signature: str, tmp_path: Path) -> None:
    """A training_step is called while planning with the arguments that Lightning passes it."""
    pl = pytest.importorskip("pytorch_lightning")

    class Linear(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
            self.seen: list[float] = []

        def step(self, batch: Tensor, *others: int) -> Tensor:
            assert len(others) == (signature != "batch")
            loss = self.layers(batch).tanh().square().mean() * sum([1, *others])
            self.seen.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Indexed(Linear):
        def training_step(self, batch: Tensor, i: int) -> Tensor:
            return self.step(batch, i)

    class Variadic(Linear):
        def training_step(self, *arguments: Any) -> Tensor:
            return self.step(*arguments)

    class Alone(Linear):
        def training_step(self, batch: Tensor) -> Tensor:
            return self.step(batch)

    module = {"batch, i": Indexed, "*arguments": Variadic, "batch": Alone}[signature]

    def train(*callbacks: Any) -> list[float]:
        made = module()
        trainer = pl.Trainer(
            max_steps=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(tmp_path),
            callbacks=[*callbacks],
        )
        trainer.fit(made, DataLoader(torch.linspace(0, 1, 48 * 64).view(48, 64), batch_size=16))
        return [*made.seen, *(p.sum().item() for p in made.parameters())]

    callback = remat(budget="2MB")
    assert train(callback) == train()
    assert (callback.applied.planned_steps, callback.applied.unplanned_steps) == (3, 0)


def test_averaged_weights_get_their_statistics(tmp_path: Path) -> None:
    """The epoch without backward, which Lightning appends for batch norm, runs without the plan."""
    pl = pytest.importorskip("pytorch_lightning")

    class Normalized(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layers = [[nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.1)] for _ in range(4)]
            self.layers = nn.Sequential(*(part for layer in layers for part in layer))

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.layers(batch).tanh().square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def train(*callbacks: Any) -> dict[str, Tensor]:
        module = Normalized()
        averaging = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(tmp_path),
            callbacks=[averaging, *callbacks],
        )
        pl.seed_everything(0, verbose=False)
        trainer.fit(
            module, DataLoader(torch.linspace(-1, 1, 192 * 16).view(192, 16), batch_size=64)
        )
        assert stand_in_of(module.layers) is None
        return module.state_dict() | {"generator": torch.get_rng_state()}

    callback = remat(budget="90%")
    eager, planned = train(), train(callback)
    assert all(torch.equal(eager[name], planned[name]) for name in eager)
    assert (callback.applied.planned_steps, callback.applied.unplanned_steps) == (6, 0)


def test_what_a_training_step_does_beside_the_loss_happens_once(tmp_path: Path) -> None:
    """Mixing batches, counting and averaging, before the model is called and after it."""
    pl = pytest.importorskip("pytorch_lightning")

    class Mixing(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
            self.teacher = [copy.deepcopy(self.layers).requires_grad_(False)]
            self.register_buffer("steps", torch.zeros(()))

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            share = np.random.beta(0.4, 0.4)
            batch = share * batch + (1 - share) * batch[torch.randperm(len(batch))]
            with torch.no_grad():
                for mine, yours in zip(
                    self.teacher[0].parameters(), self.layers.parameters(), strict=True
                ):
                    mine.lerp_(yours, 0.5)
            output = self.layers(batch)
            self.steps += 1
            return (output - self.teacher[0](batch.flip(0))).square().mean() * self.steps

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def train(*callbacks: Any) -> dict[str, Tensor]:
        module = Mixing()
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(tmp_path),
            callbacks=[*callbacks],
        )
        pl.seed_everything(0, verbose=False)
        trainer.fit(
            module, DataLoader(torch.linspace(-1, 1, 192 * 32).view(192, 32), batch_size=64)
        )
        teacher = {f"teacher {k}": v for k, v in module.teacher[0].state_dict().items()}
        return {**module.state_dict(), **teacher, "generator": torch.get_rng_state()}

    eager, planned = train(), train(remat(budget="2MB"))
    assert all(torch.equal(eager[name], planned[name]) for name in eager)


def test_what_the_callback_refuses(tmp_path: Path) -> None:
    """Outputs that are returned beside the loss, and a step that calls a part first."""
    with pytest.raises(CaptureError, match=r"returns 'logits' beside the loss"):
        run(tmp_path, language_module(returns=("logits",)), remat(), max_steps=1)
    held = remat(outputs="held")
    run(tmp_path, language_module(returns=("logits",)), held, max_steps=1)
    assert held.applied.planned_steps == 1
    module = language_module()
    module.other = nn.Linear(2, 2)
    with pytest.raises(PlanError, match=r"first calls a GPT2LMHeadModel, which does not have all"):
        run(tmp_path, module, remat(), max_steps=1)
    named = remat(module="model")
    run(tmp_path, module, named, max_steps=1)
    assert named.applied.planned_steps == 1
