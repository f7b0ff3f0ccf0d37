"""Find the largest batch within a budget, with and without a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from graph_capture.costs.devices import Device
from graph_capture.costs.resolve import CostModelChoice
from graph_capture.loop.loop_holds import Grads, LoopHolds, Outputs
from graph_capture.loop.loss import LossFn

from .base.data_parallel import Distributed, wrapped_by
from .base.progress import ShowLines
from .base.request import Request
from .base.solve_options import SolveOptions
from .base.step_spec import StepSpec
from .plan import Plan
from .sizing.batch_search import LONGEST_S
from .sizing.device_budget import budget_or_device
from .sizing.max_batch import LARGEST_BATCH, search_batches
from .sizing.max_batch_report import MaxBatch
from .sizing.samples import MakeSample
from .sizing.step_family import StepFamily


def max_batch(
    model: nn.Module,
    sample_input: Any,
    *,
    budget: str | None = None,
    budget_gb: float | str | None = None,
    budget_bytes: int | None = None,
    device: str | Device | None = None,
    loss_fn: LossFn | None = None,
    optimizer: torch.optim.Optimizer | str | None = None,
    autocast: torch.dtype | None = None,
    cost_model: CostModelChoice = "roofline",
    headroom: float | str | None = None,
    outputs: Outputs = "held",
    grads: Grads = "none",
    resident_bytes: int | str = 0,
    distributed: Distributed = None,
    never_recompute: Sequence[str] = (),
    always_recompute: Sequence[str] = (),
    batch_dim: int = 0,
    make_sample: MakeSample | None = None,
    largest: int = LARGEST_BATCH,
    time_limit_s: float | None = None,
    seed: int = 0,
    progress: ShowLines = None,
) -> MaxBatch[Plan]:
    """Find the largest batch of ``model`` that fits a budget, with and without a plan.

    Parameters
    ----------
    model, sample_input, device, loss_fn, optimizer, autocast, cost_model, headroom
        As for :func:`planner.optimize`. The sample, and targets in the closure
        of ``loss_fn``, are resized by the rule of :mod:`planner.sizing.samples`.
    budget, budget_gb, budget_bytes
        At most one of them, as for :func:`planner.optimize`; a share is one of the peak of
        the sample's own step without a plan: ``"100%"`` asks which batch fits where the
        sample's fits now. By default, the device's memory minus what its context takes.
    never_recompute, always_recompute, outputs, grads, resident_bytes, distributed
        As for :func:`planner.optimize`.
    batch_dim
        Which dimension of the inputs is the batch.
    make_sample
        Called with a batch size and ``None`` instead of resizing the sample;
        its tensors may lie on ``meta``.
    largest
        Largest batch to try.
    time_limit_s
        For searching schedules and solving the plan; captures come on top. ``None`` for
        0.1 s per operator of the step, 10 s at least and 60 s at most.
    progress
        ``True`` shows progress; a function receives it line by line.

    Raises
    ------
    InfeasibleBudgetError
        When not even a batch of one fits; the message says the least budget that would.
    CaptureError
        When the step cannot be captured at a batch size that the search needs.
    TypeError, ValueError
        When an argument is invalid, or no budget is given and the device's memory is
        unknown.

    Examples
    --------
    >>> layer, sample = nn.Linear(4, 8, bias=False), torch.zeros(1, 4)
    >>> found = max_batch(layer, sample, budget_bytes=10_000, loss_fn=torch.sum)
    >>> found.plan.predicted_peak_bytes <= 10_000
    True
    """
    model, around = wrapped_by(model, distributed)
    spec = StepSpec(
        model=model,
        sample_input=sample_input,
        loss_fn=loss_fn,
        optimizer=optimizer,
        device=device,
        autocast=autocast,
        cost_model=cost_model,
        holds=LoopHolds.of(outputs, grads, resident_bytes, distributed=around),
    )
    family = StepFamily.of(
        spec, batch_dim=batch_dim, sequence_dim=batch_dim + 1, make_sample=make_sample
    )
    requested = budget_or_device(
        family.target, budget=budget, budget_gb=budget_gb, budget_bytes=budget_bytes
    )
    if requested is None:
        raise ValueError(
            f"the memory of {family.target.device.title!r} is not known: give budget, budget_gb, "
            "budget_bytes or a device whose memory is"
        )
    options = SolveOptions(
        time_limit_s=LONGEST_S if time_limit_s is None else time_limit_s, seed=seed
    )
    request = Request.of(
        spec,
        options,
        budget=requested,
        headroom=headroom,
        never_recompute=never_recompute,
        always_recompute=always_recompute,
    )
    if requested.share is not None:
        request = request.settled(family.unplanned_peak_bytes())
    return search_batches(
        family,
        request,
        largest=largest,
        time_limit_s=time_limit_s,
        progress=progress,
        as_plan=Plan.of,
    )
