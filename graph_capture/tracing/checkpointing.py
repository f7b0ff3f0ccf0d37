"""Run a model as if it did not use ``torch.utils.checkpoint``.

The plan decides what is recomputed. If a checkpointed part were traced as written,
it would run twice even in the unplanned step. Its second run would draw other
random numbers, because it resets the generator, and that is not a call that can be
recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint as implementation

from ..private_torch.replacing import CHECKPOINT_GENERATOR


class _Depth:
    """How many checkpoints with gradients the code is inside of."""

    def __init__(self) -> None:
        self.num = 0

    @contextmanager
    def deeper(self) -> Iterator[None]:
        one = int(torch.is_grad_enabled())  # else it runs once
        self.num += one
        try:
            yield
        finally:
            self.num -= one


class _Here(threading.local):
    def __init__(self) -> None:
        self.depth = _Depth()


_here = _Here()


def inside_checkpoint() -> bool:
    """Whether the code is a checkpoint's, which would repeat it in backward.

    Known while :func:`checkpoints_inlined` or :func:`checkpoints_noticed` is active.
    """
    return _here.depth.num > 0


class _CallThrough:
    """Replaces the autograd function behind ``checkpoint(use_reentrant=True)``.

    As an autograd function it knows its own arguments alone: where none of them requires grad,
    what it returns does not either, and parameters inside get no gradient.
    """

    @staticmethod
    def apply(function: Callable[..., Any], _preserve_rng_state: bool, *args: Any) -> Any:
        implementation.check_backward_validity(args)  # PyTorch's own warning of that
        known = any(isinstance(each, torch.Tensor) and each.requires_grad for each in args)
        with torch.set_grad_enabled(known and torch.is_grad_enabled()), _here.depth.deeper():
            return function(*args)


def _keep_everything(*_args: Any, **_kwargs: Any) -> Iterator[None]:
    """Replace the generator behind ``checkpoint(use_reentrant=False)``."""
    with _here.depth.deeper():
        yield


@contextmanager
def checkpoints_inlined() -> Iterator[None]:
    """While active, ``torch.utils.checkpoint.checkpoint(f, *args)`` is ``f(*args)``.

    Both of its implementations are replaced where it looks them up, so code that
    has imported the function by name is covered as well.
    """
    with _replaced(_CallThrough, _keep_everything):
        yield


@contextmanager
def checkpoints_noticed() -> Iterator[None]:
    """While active, code knows that it is :func:`inside_checkpoint`; nothing else changes."""
    function = implementation.CheckpointFunction
    generator: Any = CHECKPOINT_GENERATOR.value

    class Noticed:
        @staticmethod
        def apply(*args: Any) -> Any:
            with _here.depth.deeper():
                return function.apply(*args)

    def noticed(*args: Any, **kwargs: Any) -> Iterator[None]:
        with _here.depth.deeper():
            yield from generator(*args, **kwargs)

    with _replaced(Noticed, noticed):
        yield


@contextmanager
def _replaced(function: Any, generator: Any) -> Iterator[None]:
    """Put others into the places of both implementations."""
    stand_ins = {"CheckpointFunction": function, CHECKPOINT_GENERATOR.name: generator}
    before = {name: getattr(implementation, name) for name in stand_ins}
    outer, _here.depth = _here.depth, _Depth()  # an exception may leave a checkpoint half open
    vars(implementation).update(stand_ins)
    try:
        yield
    finally:
        vars(implementation).update(before)
        _here.depth = outer
