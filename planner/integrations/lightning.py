"""Plan the training step of a Lightning ``Trainer``, of ``lightning`` or ``pytorch_lightning``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graph_capture.calls.call_spec import tensors_of
from graph_capture.errors import NotFittingError
from graph_capture.private_torch.trees import tree_map

from ..base.budget import read_budget
from ..errors import PlanError
from ..plan import Plan
from ..plan_record import OnShapeChange
from ..running.attach import AppliedPlan, applied_plan
from ..watch import Watched, check_options, watch
from .loop_loss import LoopLoss, first_called


def _library() -> Any:
    """The package that the program uses: the one that is imported, or else installed."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        if name in sys.modules:
            return sys.modules[name]
    try:
        return importlib.import_module("pytorch_lightning")
    except ModuleNotFoundError:
        return importlib.import_module("lightning.pytorch")


if TYPE_CHECKING:
    from pytorch_lightning import Callback
    from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
    from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature as _takes
else:
    _lightning = _library()
    Callback = _lightning.Callback
    rank_zero_info = _lightning.utilities.rank_zero_info
    rank_zero_warn = _lightning.utilities.rank_zero_warn
    _takes = _lightning.utilities.signature_utils.is_param_in_hook_signature

# Scalars that the trainer keeps beside a step: losses, logged values, norms of gradients.
_LOOP_BYTES = 4096
_BYTES_PER_PARAMETER = 64

_SILENT = ("log", "log_dict")


class RematCallback(Callback):
    """Plans the module that ``training_step`` calls, within a budget, and trains by the plan.

    ``Trainer(callbacks=[RematCallback(budget_gb=40)])`` is all. The first training step is
    planned before it runs: with the arguments that ``training_step`` really passes, under the
    trainer's precision, with its optimizer, and with the loss that ``training_step`` makes of
    the output. When training ends, the module has its own forward again, and one line says
    how many steps went by the plan.

    Parameters
    ----------
    module
        Path of the module to plan, such as ``"model"``; ``""`` for the ``LightningModule``
        itself. ``None`` for the one that ``training_step`` calls first.
    budget, budget_gb, budget_bytes
        One of them, as for :func:`planner.optimize`: the peak of a whole step.
    on_shape_change
        See :func:`planner.watch`.
    **options
        Other arguments of :func:`planner.optimize`. ``optimizer=`` and ``loss_fn=`` are the
        trainer's own unless they are given here. Pass ``outputs="held"`` where
        ``training_step`` returns tensors beside the loss.

    Attributes
    ----------
    plan
        The plan of the first training step; ``None`` before it.
    applied
        How the last training went, once it has ended: what
        :func:`planner.applied_plan` returned.

    Raises
    ------
    TypeError, ValueError
        When an option is none of ``optimize``, or there is no budget.
    """

    def __init__(
        self,
        *,
        module: str | None = None,
        budget: str | None = None,
        budget_gb: float | str | None = None,
        budget_bytes: int | None = None,
        on_shape_change: OnShapeChange = "adapt",
        **options: Any,
    ) -> None:
        check_options(options)
        read_budget(budget, budget_gb, budget_bytes)  # refuses an invalid one before training
        self._module = module
        self._options = {
            **options,
            "budget": budget,
            "budget_gb": budget_gb,
            "budget_bytes": budget_bytes,
        }
        self._on_shape_change = on_shape_change
        self._watched: Watched | None = None
        self._loss: LoopLoss | None = None
        self._returns: tuple[str, ...] = ()
        self.plan: Plan | None = None
        self.applied: AppliedPlan | None = None

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the batch of a step; the first one is planned."""
        if getattr(trainer.fit_loop, "_skip_backward", False):
            # The last epoch of StochasticWeightAveraging: no training, but one pass of forward
            # that collects batch normalization's statistics.
            self.on_train_end(trainer, pl_module)
            return
        if not pl_module.automatic_optimization:
            raise PlanError(
                "this LightningModule optimizes by hand, so its training_step is more than a "
                "loss: call planner.watch(module, budget_gb=…, loss_fn=…) for the module that it "
                "calls"
            )
        takes = partial(_takes, pl_module.training_step)
        if takes("dataloader_iter", explicit=True):
            raise PlanError(
                "training_step of this LightningModule fetches its batches itself "
                "(dataloader_iter), so a step cannot be looked at before it runs: let it take "
                "the batch, or call planner.watch(module, budget_gb=…, loss_fn=…) for the module "
                "that it calls"
            )
        # By Lightning's own rule: the index may have any name.
        others = [batch_idx] if takes("batch_idx", min_args=2) else []
        as_given = _copied(batch)  # training_step may take labels out of it

        def compute() -> torch.Tensor:
            return self._loss_in(pl_module.training_step(_copied(as_given), *others))

        if self._watched is None:
            self._begin(trainer, pl_module, batch, compute)
        assert self._loss is not None
        self._loss.set(compute)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Let go of the batch."""
        if self._loss is not None:
            self._loss.set(None)
        if self._watched is not None and self.plan is None:
            self.plan = self._watched.plan

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say how the training went, and give the module its own forward back."""
        if self._watched is None:
            return
        model = self._watched.model
        self.applied = applied_plan(model)
        self._end()
        name = type(model).__name__
        if self.applied is None:
            rank_zero_warn(f"remat-planner: no training step of this {name} was planned")
        elif self.applied.unplanned_steps:
            rank_zero_warn(f"remat-planner: {name}: {self.applied}")
        else:
            rank_zero_info(f"remat-planner: {name}: {self.applied}")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the module its own forward back."""
        self._end()

    def _begin(self, trainer: Any, pl_module: Any, batch: Any, compute: Any) -> None:
        self.plan = self.applied = None
        model = _called(pl_module, compute) if self._module is None else None
        if model is None:
            model = pl_module.get_submodule(self._module or "")
        self._loss = LoopLoss(model, pl_module, _SILENT)
        self._watched = watch(
            model,
            on_shape_change=self._on_shape_change,
            **{
                "loss_fn": self._loss,
                "optimizer": trainer.optimizers[0] if trainer.optimizers else None,
                "outputs": "released",
                "grads": "accumulated",  # zero_grad comes after the forward pass
                "resident_bytes": _held_bytes(pl_module, batch),
                **self._options,
            },
        )

    def _loss_in(self, output: Any) -> torch.Tensor:
        """The loss in what ``training_step`` returns."""
        if not isinstance(output, Mapping):
            return output
        others = [k for k, v in output.items() if k != "loss" and tensors_of([v])]
        if others and self._options.get("outputs") != "held":
            raise NotFittingError(
                f"training_step returns {others[0]!r} beside the loss, which is then in memory "
                'during the backward pass: pass RematCallback(..., outputs="held"), or return '
                "the loss alone"
            )
        return output["loss"]

    def _end(self) -> None:
        if self._watched is not None:
            model = self._watched.stop()
            if applied_plan(model) is not None:
                Plan.remove(model)
        self._watched = self._loss = None


def _called(pl_module: Any, compute: Any) -> nn.Module:
    """The module that a training step calls first: the LightningModule or one of its children.

    Raises
    ------
    PlanError
        When it calls none, or one that does not have all trainable parameters.
    """
    called = first_called(pl_module, compute, _SILENT)
    if called is None:
        raise PlanError(
            f"training_step of this {type(pl_module).__name__} calls neither itself nor one of its "
            'children: name the module to plan, RematCallback(module="…")'
        )
    trained = {id(p) for p in pl_module.parameters() if p.requires_grad}
    if not trained <= {id(p) for p in called.parameters()}:
        raise PlanError(
            f"training_step of this {type(pl_module).__name__} first calls a "
            f"{type(called).__name__}, which does not have all trainable parameters: name the "
            'module to plan, RematCallback(module="…"), or let training_step call self(...)'
        )
    return called


def _copied(batch: Any) -> Any:
    """The same tensors in containers of their own."""
    return tree_map(lambda leaf: leaf, batch)


def _held_bytes(pl_module: nn.Module, batch: Any) -> int:
    """What the trainer holds during a step that the step does not know of."""
    fetched_ahead = sum({t.data_ptr(): t.nbytes for t in tensors_of(batch)}.values())
    num_parameters = sum(1 for _ in pl_module.parameters())
    return fetched_ahead + _LOOP_BYTES + num_parameters * _BYTES_PER_PARAMETER
