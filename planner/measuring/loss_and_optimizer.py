"""The loss and optimizer of a plan's step."""

from __future__ import annotations

import torch
from torch import nn

from graph_capture.costs.target import target_of
from graph_capture.loop.loss import LossSource
from graph_capture.loop.optimizer_step import OPTIMIZERS, measure_optimizer

from ..base.training_step import LossFn
from ..errors import (
    PlanError,
    PlanMismatchError,
)
from ..plan_record import PlanRecord


def planned_loss_fn(
    plan: PlanRecord, loss_fn: LossFn | None, requested: LossFn | None
) -> LossFn | None:
    """Return the loss of the planned step.

    Parameters
    ----------
    loss_fn
        Given now.
    requested
        That the plan was made with, where this process knows it.

    Raises
    ------
    PlanError, PlanMismatchError
        When it is needed but not known, or given but not planned.
    """
    planned_with = plan.loss.region.source is LossSource.LOSS_FN
    if loss_fn is not None and not planned_with:
        raise PlanMismatchError(
            f"the plan differentiates {plan.loss.region.source}, not a loss_fn: leave it out, or "
            "plan with it"
        )
    if loss_fn is None and planned_with:
        if requested is None:
            raise PlanError("the plan was made with a loss_fn, which a file cannot hold: give it")
        return requested
    return loss_fn


def planned_optimizer(
    plan: PlanRecord, model: nn.Module, optimizer: torch.optim.Optimizer | str | None
) -> torch.optim.Optimizer | str | None:
    """Return the optimizer whose state and step the plan counts.

    Raises
    ------
    PlanError, PlanMismatchError
        When the optimizer is not known by name and none was given, or a different one
        was given.
    """
    counted, target = plan.optimizer, target_of(model, ())
    if optimizer is None:
        if counted is None:
            return None
        for name, build in OPTIMIZERS.items():
            if getattr(build, "func", build).__name__ == counted.name:
                twin = measure_optimizer(name, model, target, in_hooks=plan.holds.consumes)
                assert twin is not None
                # What steps in hooks take includes their kernels' scratch, which a twin has not.
                same = twin.workspace_bytes == counted.workspace_bytes or plan.holds.consumes
                if twin.state_bytes == counted.state_bytes and same:
                    return name
        raise PlanError(
            f"the plan counts an optimizer, {counted.name} with {counted.state_bytes} bytes of "
            "state, that is not one of those known by name with their defaults: pass it as "
            "optimizer="
        )
    found = measure_optimizer(optimizer, model, target, in_hooks=plan.holds.consumes)
    assert found is not None
    if counted is None:
        raise PlanMismatchError(
            f"the plan counts no optimizer and {found.name} was given: leave it out, or plan "
            "with optimizer="
        )
    if (found.name, found.state_bytes) != (counted.name, counted.state_bytes):
        raise PlanMismatchError(
            f"the plan counts {counted.name} with {counted.state_bytes} bytes of state, given was "
            f"{found.name} with {found.state_bytes}: give the planned one, or plan with this one"
        )
    return optimizer
