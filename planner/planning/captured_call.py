"""A user's model and sample as a captured step: what everything that is planned begins with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import nn

from graph_capture.autocast import autocast_as
from graph_capture.call_spec import bind_call, split_sample, tensors_of
from graph_capture.captured_step import CapturedStep, capture_step
from graph_capture.costs.devices import Device
from graph_capture.costs.resolve import ChosenCosts
from graph_capture.loss import LossFn
from graph_capture.optimizer_step import measure_optimizer
from graph_capture.target import target_of

from ..base.call_guard import lazy_input
from ..base.progress import (
    ShowProgress,
    showing_timing,
)
from ..running.attach import original_forward


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedCall:
    """A step that was captured, and the call that it is of.

    Parameters
    ----------
    arguments
        Of the model's own forward, by name.
    captured
        The step.
    """

    arguments: Mapping[str, Any]
    captured: CapturedStep


@contextmanager
def captured_call(
    model: nn.Module,
    sample_input: Any,
    *,
    loss_fn: LossFn | None = None,
    optimizer: torch.optim.Optimizer | str | None = None,
    device: str | Device | None = None,
    autocast: torch.dtype | None = None,
    cost_model: ChosenCosts = "roofline",
    progress: ShowProgress = None,
) -> Iterator[CapturedCall]:
    """Capture the step; the autocast that was asked for stays on until the context ends.

    The arguments are those of :func:`planner.optimize`; an applied plan is
    looked through.

    Raises
    ------
    CaptureError
        When the step cannot be captured.
    TypeError
        When the sample does not fit the model's signature, or ``optimizer`` is
        neither an instance nor a name.
    ValueError
        When another argument makes no sense.
    """
    if not isinstance(optimizer, (str, torch.optim.Optimizer, NoneType)):
        raise TypeError(f"optimizer must be an instance or a name, got {optimizer!r}")
    forward = original_forward(model)
    arguments = bind_call(forward, *split_sample(sample_input))
    lazy = lazy_input(arguments)
    if lazy is not None:
        raise ValueError(lazy)
    target = target_of(model, tensors_of(arguments), device)
    with autocast_as(target.torch_type, autocast) if autocast else nullcontext():
        with showing_timing(progress) as timing:
            captured = capture_step(
                model,
                arguments,
                loss=loss_fn,
                optimizer=measure_optimizer(optimizer, model, target),
                forward=forward,
                target=target,
                cost_model=cost_model,
                progress=timing,
            )
        yield CapturedCall(arguments=arguments, captured=captured)
