"""The module inside a ``DistributedDataParallel``, and what the processes of a job hold."""

from __future__ import annotations

from typing import Any

from torch.nn.parallel import DistributedDataParallel

from graph_capture.loop.data_parallel import DataParallel
from graph_capture.loop.fully_sharded import FullySharded

from .unwrap import refuse_no_module

Distributed = str | DataParallel | FullySharded | None
"""As users write it: ``None``, ``"ddp"``, ``"ddp:gradient_as_bucket_view"``, ``"fsdp2:ranks=2"``.

The last is for plans in blocks.
"""


def inside(model: Any) -> Any:
    """Return the module inside a ``DistributedDataParallel``; another module as it is."""
    refuse_no_module(model)
    return model.module if isinstance(model, DistributedDataParallel) else model


def wrapped_by(
    model: Any, distributed: Distributed
) -> tuple[Any, DataParallel | FullySharded | None]:
    """Return the module to plan, and the wrapper that is around it, or how it is sharded.

    Parameters
    ----------
    model
        A module, or a ``DistributedDataParallel`` of it, whose own options are taken; likewise
        those with which ``replicate`` was called on it.
    distributed
        What the user says is around it.

    Raises
    ------
    ValueError
        When the word is none, or names other options than the wrapper has.
    """
    is_sharded = FullySharded.is_word(distributed)
    said = FullySharded.of(distributed) if is_sharded else DataParallel.of(distributed)
    found = DataParallel.found_on(model)
    if found is None:
        return model, said
    if said is not None and said not in (found, DataParallel()):
        raise ValueError(
            f"distributed={str(said)!r}, and the model is wrapped as {str(found)!r}: leave the "
            "argument out, since the wrapper's own options are taken"
        )
    return inside(model), found


__all__ = ["Distributed", "inside", "wrapped_by"]
