"""Estimate a training step for many shapes and any device, without running anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import torch
from torch import nn

from graph_capture.captured_step import CapturedStep
from graph_capture.costs.cost_model import CostRecord
from graph_capture.costs.devices import Device
from graph_capture.costs.resolve import CostModelChoice
from graph_capture.errors import CaptureError
from graph_capture.loop.loop_holds import Grads, LoopHolds, Outputs
from graph_capture.loop.loss import LossFn
from solvers.replay import replay
from solvers.schedule import Schedule

from ..base.budget import Budget, parse_headroom
from ..base.data_parallel import Distributed, wrapped_by
from ..base.progress import (
    ShowLines,
    showing_lines,
)
from ..base.step_spec import StepSpec
from ..plan_record import PeakMemory
from .device_budget import budget_or_device
from .estimate_report import Estimate, EstimateRow, PlannedRow, dimension_notes
from .fitting import Wiring, find_fit, quick_plan, wiring_of
from .samples import MakeSample
from .step_family import StepFamily, reason


def estimate(
    model: nn.Module,
    sample_input: Any,
    *,
    device: str | Device | None = None,
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16),
    sequence_lengths: Sequence[int] | None = None,
    budget: float | str | None = None,
    loss_fn: LossFn | None = None,
    optimizer: torch.optim.Optimizer | str | None = None,
    autocast: torch.dtype | None = None,
    cost_model: CostModelChoice = "roofline",
    headroom: float | str | None = None,
    outputs: Outputs = "held",
    grads: Grads = "none",
    resident_bytes: int | str = 0,
    distributed: Distributed = None,
    batch_dim: int = 0,
    sequence_dim: int = 1,
    make_sample: MakeSample | None = None,
    measure_scratch: bool = False,
    time_limit_s: float = 3.0,
    seed: int = 0,
    progress: ShowLines = None,
) -> Estimate:
    """Estimate memory by category, step time and fit, for each batch size and sequence length.

    Each step is captured on stand-ins: no batch is allocated and nothing runs,
    so a model on ``meta`` can be estimated for a device that is not at hand.

    Parameters
    ----------
    model
        In training mode; on ``meta``, too.
    sample_input
        As for :func:`planner.optimize`. It is resized by the rule of
        :mod:`planner.sizing.samples`. Its yes-or-no answers (``mask.all()``) hold for all shapes.
    device
        Where the step would run, as for :func:`planner.optimize`.
    batch_sizes, sequence_lengths
        The shapes to estimate: every pair. ``None`` keeps the sample's own length.
    budget
        In GB, or a string such as ``"40GiB"``; ``None`` for the device's memory less
        that of its context, if known.
    loss_fn
        As for :func:`planner.optimize`; targets in its closure are resized like
        the sample.
    optimizer, autocast, cost_model, headroom, outputs, grads, resident_bytes, distributed
        As for :func:`planner.optimize`.
    batch_dim, sequence_dim
        The dimensions of the inputs that are batch and sequence.
    make_sample
        Called with a batch size and a sequence length (or ``None``) instead of
        resizing the sample; its tensors may lie on ``meta``.
    measure_scratch
        Also run each distinct call once, alone, on a device that is at hand, to
        measure its kernel's scratch memory, as :func:`planner.optimize` does; peaks are
        then the same to the byte.
    time_limit_s
        Seconds for each search, in rows that do not fit without a plan.
    progress
        ``True`` shows what is being done; a function receives it line by line.

    Returns
    -------
    Estimate
        If the model cannot be captured at a shape, the row says why.

    Raises
    ------
    TypeError
        When ``model`` is not a module, or the sample does not fit its signature.
    ValueError
        When an argument is invalid.

    Notes
    -----
    Without ``measure_scratch``, the scratch memory of CPU kernels is left out, so the
    peak of a convolution may be a few per cent too low there.

    Examples
    --------
    >>> layer, sample = nn.Linear(4, 8, bias=False), torch.zeros(1, 4)
    >>> found = estimate(layer, sample, batch_sizes=(1, 1000), loss_fn=torch.sum)
    >>> [row.memory.by_category["input"] for row in found.rows]
    [16, 16000]
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
    batches = positive_integers("batch_sizes", batch_sizes)
    lengths: tuple[int | None, ...] = (None,)
    if sequence_lengths is not None:
        lengths = positive_integers("sequence_lengths", sequence_lengths)
    family = StepFamily.of(
        spec,
        batch_dim=batch_dim,
        sequence_dim=sequence_dim,
        make_sample=make_sample,
        measure_scratch=measure_scratch,
    )
    limits = _limits(family, budget, headroom)
    rows: list[EstimateRow] = []
    known: dict[Wiring, list[Schedule]] = {}
    costs: CostRecord | None = None
    with showing_lines(progress) as say:
        for sequence, batch in product(lengths, batches):
            at = f"batch {batch}" + (f", sequence {sequence}" if sequence else "")
            say(f"{at}: capturing")
            arguments = family.arguments(batch, sequence)
            try:
                captured = family.capture(arguments, batch, sequence)
            except CaptureError as error:
                rows.append(EstimateRow(batch=batch, sequence=sequence, error=reason(error)))
                continue
            costs = captured.costs
            schedules = known.setdefault(wiring_of(captured.graph), [])
            say(f"{at}: looking for a plan")
            rows.append(_row(batch, sequence, captured, limits, schedules, time_limit_s, seed))
    measured = measure_scratch and family.target.at_hand
    return Estimate(
        model=type(model).__name__,
        device=family.target.device.title,
        device_type=family.target.torch_type,
        budget_bytes=None if limits is None else limits.total_bytes,
        headroom_bytes=0 if limits is None else limits.headroom_bytes,
        optimizer=None if family.optimizer is None else family.optimizer.name,
        autocast=None if autocast is None else str(autocast).removeprefix("torch."),
        costs=costs or CostRecord(model="none", device=family.target.device.title),
        counts_scratch=measured,
        torch_version=torch.__version__,
        rows=tuple(rows),
        notes=dimension_notes(rows, sequence_dim if make_sample is None else None),
    )


def _limits(
    family: StepFamily, budget: float | str | None, headroom: float | str | None
) -> Budget | None:
    requested = budget_or_device(family.target, budget_gb=budget)
    if requested is None:
        return None
    if requested.num_bytes is None:
        raise ValueError(
            f"budget={budget!r} is a share of the peak without a plan, and so another budget in "
            "each row: write bytes such as '40GB'"
        )
    return parse_headroom(headroom, requested.num_bytes, family.target.torch_type)


def _row(
    batch: int,
    sequence: int | None,
    captured: CapturedStep,
    limits: Budget | None,
    known: list[Schedule],
    time_limit_s: float,
    seed: int,
) -> EstimateRow:
    """The figures of one captured step; its schedules help the next step of the same wiring."""
    assert captured.unplanned is not None
    keep_all = Schedule.keep_all(captured.unplanned)
    unplanned = replay(captured.unplanned, keep_all)
    memory = PeakMemory.of(captured.unplanned, keep_all, unplanned)
    figures: dict[str, Any] = {
        "batch": batch,
        "sequence": sequence,
        "memory": memory,
        "step_us": unplanned.cost_ns / 1e3,
    }
    if limits is None:
        return EstimateRow(**figures)
    if memory.total_bytes <= limits.usable_bytes:
        return EstimateRow(**figures, fits=True)
    graph, limit_bytes = captured.graph, limits.usable_bytes
    fit = find_fit(graph, limit_bytes, known=known, time_limit_s=time_limit_s, seed=seed)
    if fit.least is not None:
        known.append(fit.least.schedule)
    if fit.schedule is None:
        assert fit.least is not None
        return EstimateRow(
            **figures,
            fits=False,
            least_budget_bytes=limits.total_for(fit.least.peak_bytes),
            lower_bound_bytes=limits.total_for(fit.least.lower_bound_bytes),
        )
    plan = quick_plan(graph, limit_bytes, fit.schedule, time_limit_s=time_limit_s, seed=seed)
    known.append(plan.schedule)
    overhead = plan.cost_ns / unplanned.cost_ns - 1 if unplanned.cost_ns else 0.0
    planned = PlannedRow(peak_bytes=plan.peak_bytes, overhead=overhead, gap=plan.gap)
    return EstimateRow(**figures, fits=False, planned=planned)


def positive_integers(name: str, values: Iterable[int]) -> tuple[int, ...]:
    """``values`` as a tuple.

    Raises
    ------
    ValueError
        When there are none, or one is not a whole number from 1 on.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} takes a sequence of whole numbers, got {values!r}")
    numbers = tuple(values)
    bad = [n for n in numbers if isinstance(n, bool) or not isinstance(n, int) or n < 1]
    if bad or not numbers:
        raise ValueError(f"{name} takes whole numbers from 1 on, got {bad[0] if bad else 'none'!r}")
    return tuple(dict.fromkeys(numbers))
