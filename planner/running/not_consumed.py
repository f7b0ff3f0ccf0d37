"""Notice a loop that does not consume gradients as they arrive, though its plan says so."""

from __future__ import annotations

from torch import nn

from graph_capture.calls.spread_out import local_part
from graph_capture.units import format_bytes

from ..base.resident import gradients_of
from ..plan_record import PlanRecord
from .tally import Tally


def say_not_consumed(model: nn.Module, plan: PlanRecord, tally: Tally) -> None:
    """Warn once about gradients that are still there when a backward pass has ended."""
    memory = {t.untyped_storage().data_ptr(): t for t in map(local_part, gradients_of(model))}
    held_bytes = sum(t.untyped_storage().nbytes() for t in memory.values())
    if not held_bytes:
        return
    tally.say(
        "not consumed",
        f"{format_bytes(held_bytes)} of gradients are there when the backward pass of a planned "
        f"{type(model).__name__} has ended, and its plan is for a loop in which hooks consume each "
        f"as it arrives (grads='consumed'): its peak may be "
        f"{format_bytes(plan.predicted_peak_bytes + held_bytes)}, the budget is "
        f"{format_bytes(plan.budget_bytes)}. Step the optimizer in hooks "
        "(register_post_accumulate_grad_hook) that set the gradient to None, or plan with "
        "grads='none'",
    )


__all__ = ["say_not_consumed"]
