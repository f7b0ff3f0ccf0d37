"""Find the largest batch within a byte budget, with and without a plan.

``batch_search.py`` says how it is found. With a plan it is the largest batch *known*:
the least memory of a step is found by a search. Unless a lower bound proves that the
next batch does not fit, a longer search may show that it does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from graph_capture.loop.loss import LossFn, LossSource

from ..base.budget import parse_headroom
from ..base.live_state import LiveState
from ..base.progress import ShowLines, showing_lines
from ..base.request import Request
from ..base.step_spec import StepSpec, check_model
from ..errors import PlanError
from ..plan_record import PlanRecord
from ..planning.make_plan import request_again
from .batch_search import LONGEST_S, BatchSearch
from .max_batch_report import MaxBatch, PlanT
from .samples import MakeSample
from .step_family import StepFamily

LARGEST_BATCH = 2**16
"""Where the search ends if nothing else ends it."""


def max_batch_of(
    plan: PlanRecord,
    live: LiveState | None,
    model: nn.Module,
    sample_input: Any,
    *,
    loss_fn: LossFn | None,
    batch_dim: int,
    make_sample: MakeSample | None,
    largest: int,
    time_limit_s: float | None,
    progress: ShowLines,
    as_plan: Callable[[PlanRecord, LiveState], PlanT],
) -> MaxBatch[PlanT]:
    """:meth:`planner.Plan.max_batch`: the plan's request at other batch sizes."""
    check_model(model)
    request = None if live is None else live.request
    if request is None:
        if loss_fn is None and plan.loss.region.source is LossSource.LOSS_FN:
            raise PlanError(
                "a plan from a file does not hold its loss_fn, which other batch sizes need: give "
                "max_batch(..., loss_fn=...)"
            )
        request = request_again(plan)
    spec = StepSpec(
        model=model,
        sample_input=sample_input,
        loss_fn=request.loss_fn if loss_fn is None else loss_fn,
        device=request.device,
        autocast=None if plan.guard.autocast is None else getattr(torch, plan.guard.autocast),
        cost_model=request.cost_model,
        holds=plan.holds,
    )
    limit_s = LONGEST_S if time_limit_s is None else time_limit_s
    options = replace(request.options, time_limit_s=limit_s)
    request = replace(request, options=options, loss_fn=spec.loss_fn, progress=None)
    family = replace(
        StepFamily.of(
            spec, batch_dim=batch_dim, sequence_dim=batch_dim + 1, make_sample=make_sample
        ),
        optimizer=plan.optimizer if live is None else live.captured.optimizer,
    )
    if family.target.torch_type != plan.device_type:
        raise PlanError(
            f"the plan is for {plan.device_type} ({plan.costs.device}) and comes from a file, "
            "which does not say how to find that device again (it was not requested by a name of "
            "the table); this model lies on "
            f"{family.target.torch_type}: call planner.max_batch(..., device=...)"
        )
    return search_batches(
        family,
        request,
        largest=largest,
        time_limit_s=time_limit_s,
        progress=progress,
        as_plan=as_plan,
    )


def search_batches(
    family: StepFamily,
    request: Request,
    *,
    largest: int,
    time_limit_s: float | None,
    progress: ShowLines,
    as_plan: Callable[[PlanRecord, LiveState], PlanT],
) -> MaxBatch[PlanT]:
    """:func:`planner.max_batch` with everything settled.

    Parameters
    ----------
    time_limit_s
        Seconds; ``None`` to choose by the size of the step.
    as_plan
        Makes the returned plan from a decision.
    """
    if isinstance(largest, bool) or not isinstance(largest, int) or largest < 1:
        raise ValueError(f"largest must be a whole number from 1 on, got {largest!r}")
    begin_s = time.monotonic()
    share, request = request.budget.share, request.for_other_calls
    budget = parse_headroom(request.headroom, request.budget_bytes, family.target.torch_type)
    with showing_lines(progress) as say:
        search = BatchSearch(family, budget, request, largest, say)
        search.allow(time_limit_s)
        without = search.without_plan()
        batch = search.with_plan(without)
        say(f"batch {batch}: solving")
        plan = as_plan(*search.plan(batch))
    unplanned = search.at(without) if without else None
    outside = search.least_of.get(batch + 1)
    step_ns = unplanned.unplanned.base_cost_ns if unplanned else None
    return MaxBatch(
        budget_bytes=budget.total_bytes,
        budget_share=share,
        headroom_bytes=budget.headroom_bytes,
        device=family.target.device.title,
        batch_without_plan=without,
        unplanned_peak_bytes=unplanned.unplanned_bytes if unplanned else None,
        unplanned_step_us=None if step_ns is None else step_ns / 1e3,
        batch=batch,
        plan=plan,
        next_least_bytes=None if outside is None else outside.peak_bytes,
        proven=outside is not None and outside.lower_bound_bytes > budget.usable_bytes,
        captured_batches=tuple(search.captures),
        search_s=time.monotonic() - begin_s,
    )
