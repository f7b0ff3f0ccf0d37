"""What is said once of a planned step that does not do, or does more than, what was planned."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from graph_capture.values.checks import Check, OutcomeChanged

from .tally import Tally


def say_retained(tally: Tally) -> None:
    """Of a backward pass that keeps what was saved."""
    tally.say(
        "retained",
        "backward(retain_graph=True) through a planned model: what the plan saved stays "
        "in memory during and after the backward pass, which the budget does not count",
    )


def say_settings(tally: Tally, model: nn.Module, changed: Collection[str]) -> None:
    """Of settings that are others than those under which scratch memory was measured."""
    tally.say(
        "settings",
        f"PyTorch's settings ({', '.join(sorted(changed))}) have changed since a "
        f"{type(model).__name__} was planned: its kernels may be others, with other scratch memory "
        "than was measured, and its budget may not be kept. Plan under the settings of the loop",
    )


def say_own_forward(tally: Tally) -> None:
    """Of gradients that the plan cannot give."""
    tally.say(
        "own forward",
        "a backward pass from some of the outputs alone is requested of a planned model: "
        "the model's own forward runs again for it, with the same numbers, but neither its "
        "memory nor its time are in the plan. The plan has one backward pass of all outputs, "
        "by one loss_fn=",
    )


def say_waiting(tally: Tally, num_alive: int, num_planned: int, *, is_summed: bool) -> None:
    """Before a call whose predecessors wait for their backward passes."""
    if num_alive > num_planned:
        tally.say(
            "two forwards",
            "a planned model is called again before the backward pass of its last call: the "
            f"saved tensors of {num_alive} calls lie in memory side by side, and the budget "
            f"counts {num_planned}. Plan with concurrent_calls={num_alive}, or "
            "plan a module whose forward makes all calls",
        )
    if is_summed:
        tally.say(
            "sums of two calls",
            "a planned model is called again before the backward pass of its last call, and it "
            "uses a weight more than once (a tied one): where one backward pass goes through "
            "both calls, its gradients are added in another order than eager's, with other "
            "last bits. To have eager's, call backward() on each loss, or plan a module "
            "whose forward makes all calls",
        )


def say_casts(tally: Tally) -> None:
    """Before a call within an autocast region that holds casts of old parameters."""
    tally.say(
        "casts of old parameters",
        "a planned step begins within the autocast region that its last one ran in, and "
        "parameters were changed meanwhile: without the plan PyTorch would go on with casts "
        "of the old ones, which autocast keeps until its region ends; the plan casts those "
        "that are there. Leave the region before optimizer.step(), which makes both alike",
    )


def say_cast_gradients(tally: Tally) -> None:
    """Of a backward pass within an autocast region that would cast its matrix products."""
    tally.say(
        "cast gradients",
        "the backward pass of a planned step runs within an autocast region, in which PyTorch "
        "would cast what gradients are multiplied of, where forward did not (it switches "
        "autocast off there, say, or ran under another one): gradients are those of a backward "
        "pass outside of the region, with other bits. Leave the region before backward(), which "
        "makes both alike",
    )


def say_nan(tally: Tally, gradients: list[torch.Tensor]) -> None:
    """What autograd's anomaly mode finds next, and where it would find the operator."""
    if not (torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled()):
        return
    if any(bool(torch.isnan(g).any()) for g in gradients if isinstance(g, torch.Tensor)):
        tally.say(
            "anomaly",
            "a gradient of a planned step is nan, and anomaly mode sees the step as one "
            "function: make the call under `with planner.unplanned(model):` to see the "
            "operator and its line",
        )


def say_layout(tally: Tally, shape: tuple[int, ...]) -> None:
    """Backward runs call by call where a gradient lies in memory otherwise than planned."""
    tally.say(
        "layout",
        f"the gradient of an output of shape {shape} of a planned step comes in another layout "
        "than the output's, for which its compiled code was made: backward runs call by call, by "
        "the plan. Let the loss keep the output's layout, or let the model compute it",
    )


def say_copied(tally: Tally, shape: tuple[int, ...]) -> None:
    """Of a gradient that lies in memory otherwise than the planned one, and is not dense."""
    tally.say(
        "copied gradient",
        f"the gradient of an output of shape {shape} of a planned step lies in memory otherwise "
        "than planned, and is copied: sums over it may have other last bits than without the "
        "plan, and the copy is not in the budget. Plan with the loss_fn= that the loop computes, "
        "which says how its gradient lies",
    )


def what_changed(changed: OutcomeChanged, check: Check) -> str:
    """Describe a check whose outcome differs from the planned one."""
    module = f" in module {check.module_path!r}" if check.module_path else ""
    state = (
        f" It follows from {check.state!r}, which the model holds: where a first step sets that "
        "up, run the model once before planning."
    )
    return (
        f"this step takes another way through the model than the planned one: at {check.source}"
        f"{module} forward asks for {check.what}, which was {changed.planned} when the plan was "
        f"made and is {changed.got} now.{'' if check.state is None else state}"
    )
