"""The captures of ``graph_capture``, of a model's own forward where the model lies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graph_capture import step_capture
from graph_capture.calls.call_spec import tensors_of
from graph_capture.captured_step import CapturedStep
from graph_capture.costs.target import Target, target_of
from graph_capture.loop import optimizer_step
from graph_capture.loop.optimizer_step import OptimizerStep
from graph_capture.tracing import trace
from graph_capture.tracing.traced_step import TracedStep


def capture_step(
    model: nn.Module, arguments: Mapping[str, Any], *, forward: Any = None, **how: Any
) -> CapturedStep:
    """A step of ``model.forward``, for where the model lies unless ``target`` says otherwise."""
    if "target" not in how:
        how["target"] = target_of(model, tensors_of(arguments))
    return step_capture.capture_step(model, arguments, forward=forward or model.forward, **how)


def trace_step(
    model: nn.Module,
    arguments: Mapping[str, Any],
    loss: Any = None,
    *,
    forward: Any = None,
    **how: Any,
) -> TracedStep:
    """The traced step of ``model.forward``, for where the model lies."""
    if "target" not in how:
        how["target"] = target_of(model, tensors_of(arguments))
    return trace.trace_step(model, arguments, loss, forward=forward or model.forward, **how)


def measure_optimizer(
    optimizer: torch.optim.Optimizer | str | None, model: nn.Module, target: Target | None = None
) -> OptimizerStep | None:
    """An optimizer on the parameters of ``model``, where they lie."""
    return optimizer_step.measure_optimizer(optimizer, model, target or target_of(model, ()))
