"""What a sweep of models runs: a model, its inputs and what is differentiated."""

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
    """The library of a subject is not there; the subject is skipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One model of a sweep.

    Parameters
    ----------
    make
        Builds the model in training mode; the same seed gives the same weights.
    sample
        From a seed to an input.
    loss_fn
        What the loop computes from the output; ``None`` where the model does.
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
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)
