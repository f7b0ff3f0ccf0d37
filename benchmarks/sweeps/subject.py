"""A subject of the model sweep: a model, its inputs and its loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planner.base.training_step import (
    LossFn,
    output_tensors,
)


class NotInstalled(Exception):
    """The library of a subject is not installed; the subject is skipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One model of a sweep.

    Parameters
    ----------
    make
        Builds the model in training mode; the same seed gives the same weights.
    sample
        Maps a seed to an input.
    loss_fn
        Computes the loss from the output; ``None`` if the model does.
    context
        Surrounds planning and steps, e.g. an autocast.
    """

    make: Callable[[], nn.Module]
    sample: Callable[[int], Any]
    loss_fn: LossFn | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def mean_square(output: Any) -> Tensor:
    """Mean of the squares of every output that requires grad, added up."""
    parts = [
        t.abs().pow(2).mean()
        for t in output_tensors(output)
        if t.requires_grad and (t.is_floating_point() or t.is_complex())
    ]
    if not parts:
        raise ValueError("no output requires grad")
    return torch.stack([p.float() for p in parts]).sum()


def seeded(seed: int) -> torch.Generator:
    """A new generator with this seed."""
    return torch.Generator().manual_seed(seed)
