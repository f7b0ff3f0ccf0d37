"""Define peers: other tools, or settings of PyTorch, that train with less memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from graph_capture import capture
from graph_capture.costs.resolve import CostModelChoice
from solvers.strategies import module_blocks

from ...base.training_step import (
    LossFn,
    Sample,
)

PEER_ERRORS = (
    RuntimeError,  # includes out of memory, Dynamo's own errors, and failed captures
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    LookupError,
    ImportError,
    OSError,
    MemoryError,
)
"""Errors that a compiler or a model may raise in a trial."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What a peer may know about the step, besides the model.

    Parameters
    ----------
    sample_input, loss_fn
        As for :func:`planner.base.training_step.train_step`.
    device
        Where the model lies.
    blocks
        Returns the paths of the model's blocks in the order in which they run, each
        once; raises :class:`~solvers.strategies.StrategyError` if there are none.
    budget_bytes
        The budget of the whole step; ``None`` if there is none.
    beside_bytes
        What is on the device all step long and is no parameter: buffers, the input, the
        optimizer's state, what the loop holds.
    cost_model
        As for :func:`planner.optimize`.
    """

    sample_input: Sample
    loss_fn: LossFn | None
    device: torch.device
    blocks: Callable[[], tuple[str, ...]]
    budget_bytes: int | None = None
    beside_bytes: int = 0
    cost_model: CostModelChoice = "roofline"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A model that is ready to train the peer's way.

    Parameters
    ----------
    model
        The model to call instead of the given one.
    setting, note
        The peer's parameters, and a note for the row.
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
        The function that users know.
    prepare
        Makes a model train the peer's way while its context lasts. The model is the
        peer's own copy. Settings outside the model are restored when the context ends.
        Raises one of :data:`PEER_ERRORS` if the peer does not apply.
    needs_budget
        Whether it works towards a budget: it then runs once for each budget of a comparison.
    """

    name: str
    summary: str
    source: str
    prepare: Prepare
    needs_budget: bool = False


def blocks_of(
    model: nn.Module, sample_input: Sample, loss_fn: LossFn | None = None
) -> tuple[str, ...]:
    """Paths of a model's blocks, each once; the strategies divide the same ones.

    Raises
    ------
    StrategyError
        When the model has no repeated blocks.
    CaptureError
        When the step cannot be captured.
    """
    graph = capture(model, sample_input, loss_fn=loss_fn)
    return tuple(dict.fromkeys(block.name for block in module_blocks(graph).blocks))
