"""What a trainer makes of the model's output, as a ``loss_fn``.

A trainer takes labels out of the call and smooths them, hands the output to a function
of the user's, or computes a loss of its own. Instead of guessing, the trainer's own code
is called while planning, on stand-ins for tensors, with a model that answers with the
output in question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from graph_capture.private_torch.trees import tree_map
from graph_capture.reads.undone import undone
from graph_capture.values.loss_values import TrainersLoss

from ..base.forward_slot import forward_set, original_forward
from ..errors import PlanError

Compute = Callable[[], torch.Tensor]

_DATA = ("train_dataset", "eval_dataset")  # which may be lists of millions


class LoopLoss(TrainersLoss):
    """Computes the loss that a trainer computes, from the output of the model that it calls.

    Parameters
    ----------
    model
        The module that is planned.
    owner
        The object whose code computes the loss; what that leaves in its attributes is
        put back.
    silent
        Names of methods of ``owner`` that do nothing meanwhile, since they log.
    """

    def __init__(self, model: nn.Module, owner: Any, silent: tuple[str, ...] = ("log",)) -> None:
        self._model = model
        self._owner = owner
        self._silent = silent
        self._compute: Compute | None = None
        self._undoing = False

    @contextmanager
    def of(self, compute: Compute) -> Iterator[None]:
        """Let losses be those that ``compute`` computes, which calls the model."""
        before, self._compute = self._compute, compute
        try:
            yield
        finally:
            self._compute = before

    def set(self, compute: Compute | None) -> None:
        """Like :meth:`of`, for a loop that says where a step begins and ends."""
        self._compute = compute

    def __call__(self, output: Any) -> torch.Tensor:
        """Return the loss that the trainer differentiates.

        Raises
        ------
        PlanError
            When no step is being run.
        """
        return self._run(_Answer(output, original_forward(self._model)))

    @contextmanager
    def undoing(self) -> Iterator[None]:
        """What undoes all that calls within it do beside computing; a call does it by itself."""
        if self._undoing:
            yield
            return
        self._undoing = True
        try:
            with _as_before(self._owner, self._silent):
                yield
        finally:
            self._undoing = False

    def call(self) -> tuple[tuple, dict[str, Any]]:
        """Return the arguments with which the trainer would call the model now."""
        recorder = _Recorder(original_forward(self._model))
        try:
            self._run(recorder)
        except _Recorded:
            assert recorder.call is not None
            return recorder.call
        raise PlanError(
            f"the training step of this {type(self._owner).__name__} does not call the planned "
            f"{type(self._model).__name__}: name the module that it calls"
        )

    def _run(self, forward: Callable[..., Any]) -> torch.Tensor:
        if self._compute is None:
            raise PlanError(
                "the loss of a trainer is known only while it trains: plan in its loop, by "
                "RematCallback, or pass loss_fn=; Plan.remove(model) takes away a plan that an "
                "interrupted training has left"
            )
        with forward_set(self._model, forward), self.undoing():
            return self._compute()


def first_called(owner: nn.Module, compute: Compute, silent: tuple[str, ...]) -> nn.Module | None:
    """Return which trainable module a step calls first: ``owner`` or one of its children.

    The step runs up to that call, and what it draws until then is drawn again by the loop.
    """
    candidates = [owner, *owner.children()]
    with ExitStack() as stack:
        stack.enter_context(_as_before(owner, silent))
        recorders = {}
        for module in candidates:
            if any(p.requires_grad for p in module.parameters()):
                recorders[module] = _Recorder(original_forward(module))
                stack.enter_context(forward_set(module, recorders[module]))
        with suppress(_Recorded):
            compute()
    return next((m for m, recorder in recorders.items() if recorder.call is not None), None)


class _Answer:
    """A forward that answers its first training call with a given output."""

    def __init__(self, output: Any, own: Callable[..., Any]) -> None:
        self._output, self._own = output, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._output is None or not torch.is_grad_enabled():  # a reference, metrics
            return self._own(*args, **kwargs)
        output, self._output = self._output, None
        return tree_map(_writable, output)


def _writable(leaf: Any) -> Any:
    """A scalar as forward returns it, which a trainer may scale in place."""
    if isinstance(leaf, torch.Tensor) and leaf.numel() == 1 and leaf.requires_grad:
        return leaf.clone()
    return leaf


class _Recorded(Exception):
    """The model was called."""


class _Recorder:
    """A forward that takes down its training call instead of running."""

    def __init__(self, own: Callable[..., Any]) -> None:
        self._own = own
        self.call: tuple[tuple, dict[str, Any]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._own(*args, **kwargs)
        self.call = args, kwargs
        raise _Recorded


def _log_nothing(*_args: Any, **_kwargs: Any) -> None:
    """What is logged of a loss that is only computed for its costs."""


@contextmanager
def _as_before(owner: Any, silent: tuple[str, ...]) -> Iterator[None]:
    """Afterwards the owner's attributes, and all that they lead to, are as they were.

    Trainers count tokens, average weights and collect metrics where they compute a loss.
    Methods named in ``silent`` do nothing meanwhile.
    """
    attributes = dict(vars(owner))
    changeable = {k: v for k, v in attributes.items() if k not in _DATA}
    try:
        with undone(SimpleNamespace(**changeable), *type(owner).__mro__):
            vars(owner).update(dict.fromkeys(silent, _log_nothing))
            yield
    finally:
        vars(owner).clear()
        vars(owner).update(attributes)
