"""Warn about what lies in memory beside a planned step and is in no plan, once of each kind."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from graph_capture.calls.spread_out import local_part
from graph_capture.loop.data_parallel import DataParallel
from graph_capture.units import format_bytes

from .planned_call import PlannedCall
from .tally import Tally
from .uncounted_buckets import output_bytes, uncounted_bytes


def say_kept(tally: Tally, call: PlannedCall) -> None:
    """Warn about parameters that others took the place of, and about parts of larger inputs."""
    guard = call.prepared[0].guard
    if guard.replaced_bytes:
        _say(
            tally,
            call,
            "parameters replaced",
            guard.replaced_bytes,
            "parameters are still in memory that others took the place of",
            "Let go of them, or plan with a budget that is lower by these bytes",
        )
    if guard.uncounted_bytes:
        _say(
            tally,
            call,
            "larger inputs",
            guard.uncounted_bytes,
            "memory is kept by inputs that are slices of larger tensors, or that were one "
            "tensor in the sample",
            "Plan with a sample that is made as the loop makes its batches",
        )


def say_gradients(tally: Tally, call: PlannedCall, model: nn.Module) -> None:
    """Warn about gradients of an earlier step that still exist when a forward pass begins."""
    held = sum(
        local_part(p.grad).untyped_storage().nbytes()
        for p in model.parameters()
        if p.grad is not None
    )
    _say(
        tally,
        call,
        "gradients held",
        held,
        "gradients are there when a planned step begins",
        "Call zero_grad(set_to_none=True) before forward, or plan with grads='accumulated', "
        "which counts them",
    )


def say_buckets(tally: Tally, call: PlannedCall, wrapper: DistributedDataParallel) -> None:
    """Warn that ``DistributedDataParallel`` accumulates gradients in its own memory."""
    plan = call.plan
    num_bytes = uncounted_bytes(wrapper, plan.holds, plan.device_type, output_bytes(plan))
    if num_bytes:
        _say(
            tally,
            call,
            "buckets",
            num_bytes,
            "gradients lie in the buckets of a DistributedDataParallel",
            f"Plan the wrapped model, or with distributed='{DataParallel.of_wrapper(wrapper)}', "
            "which counts them",
        )


def _say(
    tally: Tally, call: PlannedCall, kind: str, held_bytes: int, what: str, advice: str
) -> None:
    peak_bytes, budget_bytes = call.peak_bytes + held_bytes, call.plan.budget_bytes
    if peak_bytes > budget_bytes:
        tally.say(
            kind,
            f"{format_bytes(held_bytes)} of {what}, which the plan does not count: its peak "
            f"may be {format_bytes(peak_bytes)}, the budget is {format_bytes(budget_bytes)}. "
            f"{advice}",
        )


__all__ = ["say_buckets", "say_gradients", "say_kept"]
