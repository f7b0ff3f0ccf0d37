"""The training step in question, validated once."""

from __future__ import annotations

from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import nn

from graph_capture.costs.devices import Device
from graph_capture.costs.resolve import CostModelChoice
from graph_capture.loop.loop_holds import NOTHING_ELSE, LoopHolds
from graph_capture.loop.loss import LossFn
from graph_capture.private_torch.modules import compiled_from

from .shape_range import Shapes
from .unwrap import refuse_no_module


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepSpec:
    """A model, how it is called, and what the training loop does with its output.

    Parameters
    ----------
    model
        In training mode.
    sample_input, shapes, loss_fn, optimizer, device, autocast, cost_model
        As of :func:`planner.optimize`.
    holds
        What the loop around the step holds.

    Raises
    ------
    TypeError
        When ``model`` is not a module, or ``optimizer`` neither an instance nor a name.
    ValueError
        When the model is in eval mode or runs a graph of its own, ``loss_fn`` is not
        a function, or ``autocast`` no floating dtype.
    """

    model: nn.Module
    sample_input: Any
    shapes: Shapes = None
    loss_fn: LossFn | None = None
    optimizer: torch.optim.Optimizer | str | None = None
    device: str | Device | None = None
    autocast: torch.dtype | None = None
    cost_model: CostModelChoice = "roofline"
    holds: LoopHolds = NOTHING_ELSE

    def __post_init__(self) -> None:
        check_model(self.model)
        if self.loss_fn is not None and not callable(self.loss_fn):
            raise ValueError(f"loss_fn must be a function of the output, got {self.loss_fn!r}")
        if not isinstance(self.optimizer, (str, torch.optim.Optimizer, NoneType)):
            raise TypeError(f"optimizer must be an instance or a name, got {self.optimizer!r}")
        dtype = self.autocast
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"autocast is a dtype such as torch.bfloat16, got {dtype!r}")


def check_model(model: nn.Module, *, training: bool = True) -> None:
    """Refuse what is not a module in training mode, or could not run by a plan.

    Parameters
    ----------
    training
        Whether the model has to be in training mode already.

    Raises
    ------
    TypeError
        When it is not a module.
    ValueError
        When it runs a graph of its own or is in eval mode.
    """
    refuse_no_module(model)
    if isinstance(model, torch.jit.ScriptModule) or isinstance(compiled_from(model), nn.Module):
        raise ValueError(
            f"a {type(model).__name__} runs a graph of its own, which a plan would replace; plan "
            "the module that was compiled or scripted"
        )
    if training and not model.training:
        raise ValueError("the model is in eval mode; a plan is for training: call model.train()")
