"""Peers that recompute each block: ``torch.utils.checkpoint`` and tools built on it.

All of them run with ``use_reentrant=False``, which PyTorch recommends and Transformers
uses by default, and with PyTorch's other defaults (early stop, the random state saved
for each block).

A key-value cache is switched off, because a block that runs twice would fill it twice.
Transformers does the same, with a warning, when it checkpoints by itself. Eager and the
strategies hold the cache, and it is in their peaks; the row's note says that the peaks
are not comparable. Pass a model with ``use_cache=False``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from solvers.strategies.policies import FUSED_ATTENTION, MATRIX_PRODUCTS

from .peer import (
    Ready,
    Situation,
)

NO_CACHE = (
    "warning: use_cache=False was set, as a block that runs twice would fill a key-value cache "
    "twice; where the model makes a cache (encoders do not), eager and the strategies hold it, and "
    "peaks are not comparable"
)


@contextmanager
def per_block(model: nn.Module, situation: Situation) -> Iterator[Ready]:
    """Wrap each block in a checkpoint."""
    blocks = situation.blocks()
    for name in blocks:
        block = model.get_submodule(name)
        # Hooks of the block stay outside, as in Transformers.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    yield Ready(model=model, setting=f"blocks={len(blocks)}", note=without_cache(model))


@contextmanager
def per_block_saving_matmuls(model: nn.Module, situation: Situation) -> Iterator[Ready]:
    """Wrap each block in a checkpoint that saves outputs of matrix products."""
    blocks = situation.blocks()
    contexts = functools.partial(create_selective_checkpoint_contexts, _saved_matmuls)
    for name in blocks:
        block = model.get_submodule(name)
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, context_fn=contexts
        )
    yield Ready(model=model, setting=f"blocks={len(blocks)}", note=without_cache(model))


@contextmanager
def by_transformers(model: nn.Module, situation: Situation) -> Iterator[Ready]:
    """Let Transformers checkpoint each layer.

    Raises
    ------
    TypeError
        When the model is not one of Transformers'.
    ValueError
        Transformers' own error, when it refuses the model.
    """
    for prefix in ("activation", "gradient"):  # the second was the name until Transformers 5
        enable = getattr(model, f"{prefix}_checkpointing_enable", None)
        if enable is not None:
            note = without_cache(model)
            option = f"{prefix}_checkpointing_kwargs"
            if option not in inspect.signature(enable).parameters:
                raise TypeError(
                    f"{type(model).__name__}.{enable.__name__} takes no {option}: this version "
                    "of Transformers cannot checkpoint with use_reentrant=False"
                )
            enable(**{option: {"use_reentrant": False}})
            yield Ready(model=model, note=note)
            return
    raise TypeError(
        f"a {type(model).__name__} is no model of Transformers: it has no "
        "gradient_checkpointing_enable; try checkpoint_per_block"
    )


def without_cache(model: nn.Module) -> str:
    """Switch key-value caches off; returns a note if there was one."""
    found = False
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False) is True:
            config.use_cache = False  # type: ignore[union-attr]
            found = True
    return NO_CACHE if found else ""


def _saved_matmuls(_context: Any, call: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """The policy: the calls that strategy ``save_matmuls_per_block`` saves."""
    name = getattr(call, "overloadpacket", call).__name__
    if name in MATRIX_PRODUCTS or name.startswith(FUSED_ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
