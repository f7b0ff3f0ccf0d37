"""Define peers: other tools, or settings of PyTorch, that train with less memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from graph_capture import capture
from solvers.strategies import module_blocks

from ...base.training_step import (
    LossFn,
    Sample,
)

PEER_ERRORS = (
    RuntimeError,  # out of memory, Dynamo's own errors and captures that fail among them
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    LookupError,
    ImportError,
    OSError,
    MemoryError,
)
"""What a compiler or a model may raise while it is tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What a peer may know about the step, besides the model.

    Parameters
    ----------
    sample_input, loss_fn
        As :func:`planner.base.training_step.train_step` takes them.
    device
        Where the model lies.
    blocks
        Gives the paths of the model's blocks in the order in which they run,
        each once; raises :class:`~solvers.strategies.StrategyError` where there are
        none.
    """

    sample_input: Sample
    loss_fn: LossFn | None
    device: torch.device
    blocks: Callable[[], tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A model that is ready to train the peer's way.

    Parameters
    ----------
    model
        To be called in the place of the one that was given.
    setting, note
        The peer's parameters, and what else is known, for the row.
    """

    model: nn.Module
    setting: str = ""
    note: str = ""


Prepare = Callable[[nn.Module, Situation], AbstractContextManager[Ready]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A way to train with less memory, run as its users run it.

    Parameters
    ----------
    name
        Key in a registry.
    summary
        What it saves and what it recomputes, in one line.
    source
        The function that users know it by.
    prepare
        Makes a model train the peer's way while its context lasts. The model is
        a copy that is the peer's own; settings that are not the model's are put
        back when the context ends. Raises one of :data:`PEER_ERRORS` where it
        does not apply.
    """

    name: str
    summary: str
    source: str
    prepare: Prepare


def blocks_of(
    model: nn.Module, sample_input: Sample, loss_fn: LossFn | None = None
) -> tuple[str, ...]:
    """Paths of a model's blocks, each once: those that the strategies divide, too.

    Raises
    ------
    StrategyError
        When the model has no repeated blocks.
    CaptureError
        When the step cannot be captured.
    """
    graph = capture(model, sample_input, loss_fn=loss_fn)
    return tuple(dict.fromkeys(block.name for block in module_blocks(graph).blocks))
