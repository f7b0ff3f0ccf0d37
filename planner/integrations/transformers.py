"""Plan the steps of Transformers' ``Trainer``, and of one's own loop with its models.

``RematCallback`` works with subclasses of ``Trainer``, too, those of TRL for one.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from graph_capture.calls.call_spec import tensors_of
from graph_capture.loop.data_parallel import DataParallel

from ..base.budget import read_budget
from ..base.forward_slot import stand_in_of
from ..errors import InfeasibleBudgetError, PlanError
from ..plan import Plan
from ..plan_record import OnShapeChange
from ..running.attach import AppliedPlan, applied_plan
from ..watch import Watched, check_options, watch
from .largest_batch import is_larger, largest_batch
from .loop_loss import LoopLoss

logger = logging.get_logger("transformers.remat_planner")

# Scalars that the trainer keeps beside a step: the running loss, norms of gradients.
_LOOP_BYTES = 4096
_BYTES_PER_PARAMETER = 64

# What a training has put into a model, and its callback: one that is interrupted leaves both.
_LEFT: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Any], weakref.ref[Any]]]
_LEFT = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """What one call of a trainer's ``compute_loss`` is given, labels included."""

    model: nn.Module
    inputs: Mapping[str, Any]
    others: Mapping[str, Any]
    compute_loss: Callable[..., torch.Tensor]

    def loss(self) -> torch.Tensor:
        """Compute the loss as the trainer does, which may change the batch."""
        return self.compute_loss(self.model, dict(self.inputs), **self.others)


class RematCallback(TrainerCallback):
    """Plans the training step of a ``Trainer`` within a budget, and trains by the plan.

    ``Trainer(..., callbacks=[RematCallback(budget_gb=40)])`` is all. The first training
    call is planned before it runs: with what the trainer really passes, under its mixed
    precision, with its own optimizer, and with the loss that its ``compute_loss`` makes of
    the output. Batches of other shapes are planned for as they come. When training ends, the
    model has its own forward again, and one line says how many steps went by the plan.

    Parameters
    ----------
    budget, budget_gb, budget_bytes
        One of them, as for :func:`planner.optimize`: the peak of a whole step.
    on_shape_change
        See :func:`planner.watch`.
    **options
        Other arguments of :func:`planner.optimize`. ``optimizer=`` and ``loss_fn=`` are the
        trainer's own unless they are given here.

    Attributes
    ----------
    plan
        The plan of the first training call; ``None`` before it.
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
        budget: str | None = None,
        budget_gb: float | str | None = None,
        budget_bytes: int | None = None,
        on_shape_change: OnShapeChange = "adapt",
        **options: Any,
    ) -> None:
        check_options(options)
        read_budget(budget, budget_gb, budget_bytes)  # refuses an invalid one before training
        self._options = {
            **options,
            "budget": budget,
            "budget_gb": budget_gb,
            "budget_bytes": budget_bytes,
        }
        self._on_shape_change = on_shape_change
        self._trainer: Any = None
        self._model: nn.Module | None = None
        self._loader: Any = None
        self._watched: Watched | None = None
        self._checkpointed: tuple[nn.Module, ...] = ()
        self._loss: LoopLoss
        self.plan: Plan | None = None
        self.applied: AppliedPlan | None = None

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module | None = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Note the trainer; its first training call is planned."""
        self._end()
        trainer = _trainer_around(self)
        assert model is not None
        _end_interrupted(model)
        self._checkpointed = _take_over(model, self._on_shape_change)
        if args.torch_compile:
            logger.warning(
                "torch_compile=True compiles nothing of a planned step, which runs as one call by "
                "its plan; leave it off, or leave RematCallback out"
            )
        self._trainer, self._model, self._loader = trainer, model, train_dataloader
        self.plan = self.applied = None
        self._loss = LoopLoss(model, trainer)
        own_loss = vars(trainer).get("compute_loss")
        computing = _Computing(self, trainer.compute_loss, own_loss)
        vars(trainer)["compute_loss"] = computing  # as planner.watch replaces a forward

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say how the training went, and give the model its own forward back."""
        model = self._model
        if model is None:
            return
        self.applied = applied_plan(model)
        self._end()
        name = type(model).__name__
        if self.applied is None:
            logger.warning(f"remat-planner: no training step of this {name} was planned")
        elif self.applied.unplanned_steps:
            logger.warning(f"remat-planner: {name}: {self.applied}")
        else:
            logger.info(f"remat-planner: {name}: {self.applied}")

    def _before(self, batch: _Batch, around: nn.Module) -> None:
        """Plan where a step is the first of a training; ``around`` is what the trainer calls."""
        if self._watched is not None or self._model is None or not self._model.training:
            return
        policy = self._on_shape_change
        options = {
            "loss_fn": self._loss,
            "optimizer": self._trainer.optimizer,
            "outputs": "released",
            "grads": "none"
            if self._trainer.args.gradient_accumulation_steps == 1
            else "accumulated",
            "resident_bytes": self._held_bytes(batch.inputs),
            **_wrapper_in(around),
            **self._options,
        }
        largest = None if policy in ("error", "unplanned") else self._largest(batch)
        self._watched = watch(self._model, on_shape_change=policy, **options)
        if largest is None:
            return
        try:
            with self._loss.of(largest.loss):
                self._watched.plan_for(*self._loss.call())
        except InfeasibleBudgetError as error:
            logger.warning(f"the largest batch of the data set has no plan: {error}")

    def _largest(self, batch: _Batch) -> _Batch | None:
        trainer = self._trainer
        found = largest_batch(self._loader, trainer.args.train_batch_size)
        if found is None:
            return None
        taken = {k: v for k, v in found.items() if k in batch.inputs}
        inputs = send_to_device(taken, trainer.args.device)
        return replace(batch, inputs=inputs) if is_larger(inputs, batch.inputs) else None

    def _held_bytes(self, inputs: Any) -> int:
        """What the trainer holds during a step that the step does not know of."""
        model, trainer = self._model, self._trainer
        assert model is not None
        batch_bytes = sum({t.data_ptr(): t.nbytes for t in tensors_of(dict(inputs))}.values())
        num_batches = trainer.args.gradient_accumulation_steps - 1
        parameters = list(model.parameters())
        if parameters[0].device.type == "cpu":
            num_batches += 1  # accelerate's loaders fetch one ahead
        return num_batches * batch_bytes + _LOOP_BYTES + len(parameters) * _BYTES_PER_PARAMETER

    def _end(self) -> None:
        """Take everything back that was put into the trainer and its model."""
        if self._trainer is not None:
            computing = vars(self._trainer).pop("compute_loss")
            if computing.replaced is not None:
                self._trainer.compute_loss = computing.replaced
        if self._model is not None and self._watched is not None:
            self._watched.stop()
            if applied_plan(self._model) is not None:
                Plan.remove(self._model)
        _checkpoint(self._checkpointed, True)
        self._checkpointed = ()
        self._trainer = self._model = self._watched = self._loader = None


class _Computing:
    """Stands in for a trainer's ``compute_loss``, to know of each batch before it is changed."""

    def __init__(
        self, callback: RematCallback, own: Callable[..., Any], replaced: Callable[..., Any] | None
    ) -> None:
        self.replaced = replaced  # in the trainer's own attributes
        self._callback, self._own = callback, own

    def __call__(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        callback = self._callback
        given = {**dict(zip(("return_outputs", "num_items_in_batch"), args)), **kwargs}
        planned = callback._model
        assert planned is not None
        batch = _Batch(
            model=planned,
            inputs=dict(inputs),
            others={k: v for k, v in given.items() if k != "return_outputs"},
            compute_loss=self._own,
        )
        with callback._loss.of(batch.loss):
            callback._before(batch, model)
            found = self._own(model, inputs, *args, **kwargs)
        if callback.plan is None and callback._watched is not None:
            callback.plan = callback._watched.plan
            stand_in = stand_in_of(callback._watched.model)
            if stand_in is not None:
                _LEFT[callback._watched.model] = weakref.ref(stand_in), weakref.ref(callback)
        return found


def _wrapper_in(called: nn.Module) -> dict[str, DataParallel]:
    """The word for a ``DistributedDataParallel`` in what a trainer calls, compiled or not.

    The largest batch is planned for before the wrapper's forward runs.
    """
    found = (DataParallel.found_on(module) for module in called.modules())
    return next(({"distributed": word} for word in found if word is not None), {})


def _end_interrupted(model: nn.Module) -> None:
    """Take the plan of a training that an error has ended; other plans stay."""
    stand_in, callback = _LEFT.pop(model, (None, None))
    if stand_in is None or callback is None or stand_in() is not stand_in_of(model):
        return
    before = callback()
    if before is not None and before._model is model:
        before._end()
    elif applied_plan(model) is not None:
        Plan.remove(model)


def enable_remat(
    model: nn.Module,
    *,
    budget: str | None = None,
    budget_gb: float | str | None = None,
    budget_bytes: int | None = None,
    on_shape_change: OnShapeChange = "adapt",
    **options: Any,
) -> Watched:
    """Plan a model of Transformers in one's own loop, instead of checkpointing its layers.

    Like :func:`planner.watch`, of which it takes the arguments. Beside that it switches
    off what a plan replaces or would have to hold, as ``Trainer`` does: the model's own
    checkpointing, with a note, and ``config.use_cache``, whose keys and values nobody reads
    in training.

    Returns
    -------
    Watched
    """
    watched = watch(
        model,
        budget=budget,
        budget_gb=budget_gb,
        budget_bytes=budget_bytes,
        on_shape_change=on_shape_change,
        **options,
    )
    _take_over(model, on_shape_change)
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    return watched


def _take_over(model: nn.Module, on_shape_change: OnShapeChange) -> tuple[nn.Module, ...]:
    """Switch a checkpointing of the model's own off, with a note; returns its modules.

    A planned step looks through it anyway. But trainers switch it off and on around other
    calls (TRL for its reference model), with other hooks each time, which would be another
    model to a plan. It stays on where calls may run without a plan.
    """
    modules = tuple(m for m in model.modules() if getattr(m, "gradient_checkpointing", False))
    if not modules:
        return ()
    logger.warning_once(
        f"the own gradient checkpointing of this {type(model).__name__} is taken over: in planned "
        "steps the plan decides what is recomputed"
    )
    if on_shape_change == "unplanned":
        return ()
    _checkpoint(modules, False)
    return modules


def _checkpoint(modules: Iterable[nn.Module], active: bool) -> None:
    for module in modules:
        module.gradient_checkpointing = active  # type: ignore[assignment]


def _trainer_around(callback: TrainerCallback) -> Trainer:
    """The trainer that calls a callback, which Transformers does not hand to it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back
    raise PlanError(
        "RematCallback works in the callbacks of a transformers.Trainer; for a loop of your own "
        "there is planner.integrations.transformers.enable_remat"
    )
