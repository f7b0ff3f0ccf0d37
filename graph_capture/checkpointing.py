"""Run a model as if it did not use ``torch.utils.checkpoint``.

The plan decides what is recomputed. If a checkpointed part were traced as written,
it would run twice even in the unplanned step. Its second run would draw other
random numbers, because it resets the generator, and that is not a call that can be
recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint as implementation

from .private_torch.replacing import CHECKPOINT_GENERATOR


class _CallThrough:
    """Replaces the autograd function behind ``checkpoint(use_reentrant=True)``."""

    @staticmethod
    def apply(function: Callable[..., Any], _preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _keep_everything(*_args: Any, **_kwargs: Any) -> Iterator[None]:
    """Replace the generator behind ``checkpoint(use_reentrant=False)``."""
    yield


@contextmanager
def checkpoints_inlined() -> Iterator[None]:
    """While active, ``torch.utils.checkpoint.checkpoint(f, *args)`` is ``f(*args)``.

    Both of its implementations are replaced where it looks them up, so code that
    has imported the function by name is covered as well.
    """
    stand_ins = {
        "CheckpointFunction": _CallThrough,
        CHECKPOINT_GENERATOR.name: _keep_everything,
    }
    before = {name: getattr(implementation, name) for name in stand_ins}
    vars(implementation).update(stand_ins)
    try:
        yield
    finally:
        vars(implementation).update(before)
