"""The way from a model and a budget to a plan. Read this first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any

import torch
from torch import nn

from graph_capture.call_spec import bind_call, split_sample
from graph_capture.captured_step import capture_step
from graph_capture.optimizer_step import measure_optimizer
from graph_capture.policies import apply_policies

from .application import original_forward
from .budget import parse_budget
from .make_plan import Request, make_plan
from .plan import Plan
from .progress import ShowProgress


def optimize(
    model: nn.Module,
    sample_input: Any,
    *,
    budget_gb: float | str | None = None,
    budget_bytes: int | None = None,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | str | None = None,
    solver: str = "auto",
    time_limit_s: float = 60.0,
    seed: int = 0,
    never_recompute: Sequence[str] = (),
    always_recompute: Sequence[str] = (),
    reorder: bool = False,
    progress: ShowProgress = None,
) -> Plan:
    """Plan a training step of ``model`` whose peak memory stays within a budget.

    The budget is the device's peak during a whole step: parameters, buffers,
    gradients, optimizer state, inputs, outputs, activations, temporaries and
    scratch. The model is left as it is; :meth:`Plan.apply` makes it train by
    the plan.

    Parameters
    ----------
    model
        In training mode, on the device where it will train.
    sample_input
        A tensor, a tuple of positional arguments or a dict of keyword
        arguments. Only shapes, dtypes and devices matter. Under autocast, call
        this under the same autocast.
    budget_gb, budget_bytes
        One of them. 1 GB = 10^9 bytes; ``budget_gb`` also takes ``"40GiB"``.
    loss_fn
        What the training loop computes from the output: a scalar. It stays in
        the loop; its memory and time are counted. Without it the scalar output
        or ``output.loss`` is differentiated, else every output that requires
        grad.
    optimizer
        An instance or a name such as ``"adamw"``; ``None`` counts none.
    solver
        A name of ``solvers.solve``.
    time_limit_s
        For solving.
    seed
        The same inputs and seed give the same plan, unless the time limit cuts
        the solve.
    never_recompute, always_recompute
        Patterns that name operators, see ``graph_capture.policies``.
    reorder
        Operators may run first in another order than eager's, at the same time
        and with the same bits. The search for orders shares the time limit;
        convnets gain a little, transformers next to nothing (``docs/design.md``).
    progress
        ``True`` shows a progress bar, a function receives
        :class:`solvers.progress.ProgressEvent`.

    Raises
    ------
    InfeasibleBudgetError
        When nothing fits; says the least budget that would and what holds it up.
    CaptureError
        When the step cannot be captured; names the line that stands in the way.
    TypeError
        When ``model`` is no module, or the sample does not fit its signature.
    ValueError
        When an argument makes no sense.
    """
    budget = parse_budget(budget_gb, budget_bytes)
    _check_model(model)
    forward = original_forward(model)
    arguments = bind_call(forward, *split_sample(sample_input))
    request = Request(
        budget_bytes=budget,
        loss_fn=loss_fn,
        solver=solver,
        time_limit_s=time_limit_s,
        seed=seed,
        never_recompute=_patterns("never_recompute", never_recompute),
        always_recompute=_patterns("always_recompute", always_recompute),
        reorder=reorder,
        progress=progress,
    )
    if not isinstance(optimizer, (str, torch.optim.Optimizer, NoneType)):
        raise TypeError(f"optimizer must be an instance or a name, got {optimizer!r}")
    captured = capture_step(
        model,
        arguments,
        loss=loss_fn,
        optimizer=measure_optimizer(optimizer, model),
        forward=forward,
    )
    constrained = apply_policies(captured, never_recompute, always_recompute)
    return make_plan(model, arguments, captured, constrained, request)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule) or isinstance(
        getattr(model, "_orig_mod", None), nn.Module
    ):
        raise ValueError(
            f"a {type(model).__name__} runs a graph of its own, which a plan would replace; plan "
            "the module that was compiled or scripted"
        )
    if not model.training:
        raise ValueError("the model is in eval mode; a plan is for training: call model.train()")


def _patterns(option: str, patterns: Sequence[str]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        raise ValueError(f"{option} takes a sequence of patterns: write ({patterns!r},)")
    return tuple(patterns)
