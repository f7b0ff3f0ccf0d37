"""The largest batch that a byte budget takes, without a plan and with one.

Read ``batch_search.py`` for how it is found. With a plan it is the largest
batch *known*: the least memory of a step is found by a search, so unless a
lower bound proves that the next batch does not fit, a longer one may.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from graph_capture.costs.devices import Device
from graph_capture.costs.resolve import ChosenCosts
from graph_capture.loss import LossFn
from graph_capture.optimizer_step import measure_optimizer
from graph_capture.target import target_of

from ..base.budget import (
    Budget,
    parse_headroom,
)
from ..base.progress import (
    ShowLines,
    showing_lines,
)
from ..errors import PlanError
from ..optimize import check_model, patterns_of
from ..plan import Plan
from ..planning.make_plan import (
    Request,
    request_again,
)
from .batch_search import LONGEST_S, BatchSearch
from .device_budget import budget_or_device
from .samples import MakeSample
from .step_family import StepFamily

LARGEST_BATCH = 2**16
"""Where the search ends if nothing else ends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaxBatch:
    """The largest batches within a budget.

    Parameters
    ----------
    budget_bytes, headroom_bytes
        Peaks stay below their difference.
    device
        In words.
    batch_without_plan
        The largest batch whose unplanned step fits; 0 where none does.
    unplanned_peak_bytes, unplanned_step_us
        Of that step; ``None`` where there is none.
    batch
        The largest batch known to fit with a plan.
    plan
        A plan for it, ready to be applied; says overhead and gap.
    next_least_bytes
        The least peak known at ``batch + 1``, which is more than the budget
        leaves; ``None`` where the search ended at its largest batch.
    proven
        Whether a lower bound excludes ``batch + 1``, for every schedule whose
        first runs keep eager's order. If not, a longer search may fit more.
    captured_batches
        Every batch size at which the step was captured, in that order.
    search_s
        Wall-clock time of it all.
    """

    budget_bytes: int
    headroom_bytes: int
    device: str
    batch_without_plan: int
    unplanned_peak_bytes: int | None
    unplanned_step_us: float | None
    batch: int
    plan: Plan
    next_least_bytes: int | None
    proven: bool
    captured_batches: tuple[int, ...]
    search_s: float

    @property
    def num_captures(self) -> int:
        """How often the step was captured."""
        return len(self.captured_batches)

    @property
    def overhead(self) -> float:
        """Extra time of the planned step over the unplanned one of the same batch, a fraction."""
        return self.plan.overhead

    @property
    def gap(self) -> float:
        """Of the plan, see :attr:`Plan.gap`."""
        return self.plan.gap

    @property
    def samples_per_s_without_plan(self) -> float | None:
        """Predicted throughput at the largest batch that needs no plan."""
        if not self.unplanned_step_us:
            return None
        return self.batch_without_plan * 1e6 / self.unplanned_step_us

    @property
    def samples_per_s(self) -> float | None:
        """Predicted throughput at the largest batch with its plan."""
        step_us = self.plan.predicted_step_us
        return self.batch * 1e6 / step_us if step_us else None

    def to_dict(self) -> dict[str, Any]:
        """Plain figures, ready for JSON; the plan has a file of its own."""
        return {
            "budget_bytes": self.budget_bytes,
            "headroom_bytes": self.headroom_bytes,
            "device": self.device,
            "batch_without_plan": self.batch_without_plan,
            "unplanned_peak_bytes": self.unplanned_peak_bytes,
            "unplanned_step_us": self.unplanned_step_us,
            "samples_per_s_without_plan": self.samples_per_s_without_plan,
            "batch": self.batch,
            "peak_bytes": self.plan.predicted_peak_bytes,
            "step_us": self.plan.predicted_step_us,
            "samples_per_s": self.samples_per_s,
            "overhead": self.overhead,
            "gap": self.gap,
            "next_least_bytes": self.next_least_bytes,
            "proven": self.proven,
            "captured_batches": list(self.captured_batches),
            "search_s": self.search_s,
        }

    def __str__(self) -> str:
        from .max_batch_report import report

        return report(self)


def max_batch(
    model: nn.Module,
    sample_input: Any,
    *,
    budget_gb: float | str | None = None,
    budget_bytes: int | None = None,
    device: str | Device | None = None,
    loss_fn: LossFn | None = None,
    optimizer: torch.optim.Optimizer | str | None = None,
    autocast: torch.dtype | None = None,
    cost_model: ChosenCosts = "roofline",
    headroom: float | str | None = None,
    never_recompute: Sequence[str] = (),
    always_recompute: Sequence[str] = (),
    batch_dim: int = 0,
    make_sample: MakeSample | None = None,
    largest: int = LARGEST_BATCH,
    time_limit_s: float | None = None,
    seed: int = 0,
    progress: ShowLines = None,
) -> MaxBatch:
    """The largest batch of ``model`` that fits a budget, without a plan and with one.

    Parameters
    ----------
    model, sample_input, device, loss_fn, optimizer, autocast, cost_model, headroom
        As for :func:`planner.optimize`. The sample, and targets in the closure
        of ``loss_fn``, are resized by the rule of :mod:`planner.sizing.samples`.
    budget_gb, budget_bytes
        At most one of them; without, the device's memory less what its context
        takes.
    never_recompute, always_recompute
        As for :func:`planner.optimize`.
    batch_dim
        Which dimension of the inputs is the batch.
    make_sample
        Called with a batch size and ``None`` instead of resizing the sample;
        its tensors may lie on ``meta``.
    largest
        No batch above it is tried.
    time_limit_s
        For searching schedules and solving the plan; captures come on top. ``None``
        for 0.1 s an operator of the step, 10 s at least and 60 s at most.
    progress
        ``True`` shows what is being done, a function receives it line by line.

    Raises
    ------
    InfeasibleBudgetError
        When not even a batch of one fits; says the least budget that would do.
    CaptureError
        When the step cannot be captured at a batch size that the search needs.
    TypeError, ValueError
        When an argument makes no sense, or neither a budget is given nor the
        device's memory known.

    Examples
    --------
    >>> layer, sample = nn.Linear(4, 8, bias=False), torch.zeros(1, 4)
    >>> found = max_batch(layer, sample, budget_bytes=10_000, loss_fn=torch.sum)
    >>> found.plan.predicted_peak_bytes <= 10_000
    True
    """
    check_model(model)
    family = StepFamily.of(
        model,
        sample_input,
        device=device,
        batch_dim=batch_dim,
        sequence_dim=batch_dim + 1,
        make_sample=make_sample,
        loss_fn=loss_fn,
        optimizer=measure_optimizer(optimizer, model, target_of(model, (), device)),
        autocast=autocast,
        cost_model=cost_model,
    )
    budget = budget_or_device(
        family.target, budget_gb=budget_gb, budget_bytes=budget_bytes, headroom=headroom
    )
    if budget is None:
        raise ValueError(
            f"the memory of {family.target.device.title!r} is not known: give budget_gb, "
            "budget_bytes or a device whose memory is"
        )
    request = Request(
        budget_bytes=budget.total_bytes,
        loss_fn=loss_fn,
        time_limit_s=LONGEST_S if time_limit_s is None else time_limit_s,
        seed=seed,
        never_recompute=patterns_of("never_recompute", never_recompute),
        always_recompute=patterns_of("always_recompute", always_recompute),
        device=device,
        cost_model=cost_model,
        headroom=headroom,
    )
    return search_batches(
        family,
        budget,
        request,
        largest=largest,
        time_limit_s=time_limit_s,
        progress=progress,
    )


def max_batch_of(
    plan: Plan,
    model: nn.Module,
    sample_input: Any,
    *,
    loss_fn: LossFn | None,
    **options: Any,
) -> MaxBatch:
    """:meth:`Plan.max_batch`: what the plan was asked for, at other batch sizes."""
    check_model(model)
    request = plan._request
    if request is None:
        if loss_fn is None and plan.loss.region.label == "loss_fn":
            raise PlanError(
                "a plan from a file does not hold its loss_fn, which other batch sizes need: give "
                "max_batch(..., loss_fn=...)"
            )
        request = request_again(plan)
    if loss_fn is not None:
        request = replace(request, loss_fn=loss_fn)
    limit_s = options["time_limit_s"]
    request = replace(
        request, time_limit_s=LONGEST_S if limit_s is None else limit_s, progress=None
    )
    captured, autocast = plan._captured, plan.guard.autocast
    family = StepFamily.of(
        model,
        sample_input,
        device=request.device,
        batch_dim=options["batch_dim"],
        sequence_dim=options.pop("batch_dim") + 1,
        make_sample=options.pop("make_sample"),
        loss_fn=request.loss_fn,
        optimizer=plan.optimizer if captured is None else captured.optimizer,
        autocast=None if autocast is None else getattr(torch, autocast),
        cost_model=request.cost_model,
    )
    if family.target.torch_type != plan.device_type:
        raise PlanError(
            f"the plan is for {plan.device_type} ({plan.costs.device}) and comes from a file, "
            "which does not say how to find that device again (one not asked for by a name of "
            "the table); this model lies on "
            f"{family.target.torch_type}: call planner.max_batch(..., device=...)"
        )
    budget = parse_headroom(request.headroom, plan.budget_bytes, family.target.torch_type)
    return search_batches(family, budget, request, **options)


def search_batches(
    family: StepFamily,
    budget: Budget,
    request: Request,
    *,
    largest: int = LARGEST_BATCH,
    time_limit_s: float | None = None,
    progress: ShowLines = None,
) -> MaxBatch:
    """:func:`max_batch` with everything settled."""
    if isinstance(largest, bool) or not isinstance(largest, int) or largest < 1:
        raise ValueError(f"largest must be a whole number from 1 on, got {largest!r}")
    begin_s = time.monotonic()
    with showing_lines(progress) as say:
        search = BatchSearch(family, budget, request, largest, say)
        search.allow(time_limit_s)
        without = search.without_plan()
        batch = search.with_plan(without)
        say(f"batch {batch}: solving")
        plan = search.plan(batch)
    unplanned = search.at(without) if without else None
    outside = search.least_of.get(batch + 1)
    step_ns = unplanned.unplanned.base_cost_ns if unplanned else None
    return MaxBatch(
        budget_bytes=budget.total_bytes,
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
