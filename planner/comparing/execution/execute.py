"""Execute a comparison's schedules, each distinct one once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from graph_capture.costs.target import Target
from solvers.schedule import Schedule

from ...base.budget import RequestedBudget
from ...base.forward_slot import forward_set, own_forward
from ...base.preserve_state import preserve_state
from ...base.request import Request
from ...base.solve_options import SolveOptions
from ...base.training_step import (
    Sample,
    output_tensors,
)
from ...comparison_record import (
    ComparisonRecord,
    ComparisonRow,
    MeasuredStep,
)
from ...plan_record import PlanRecord
from ...planning.captured_call import CapturedCall
from ...planning.make_plan import (
    make_plan,
)
from ..events import ProgressReporter
from .runner import (
    Execution,
    Runner,
    caught,
)


def must_run(
    wanted: bool | None,
    target: Target,
    model: nn.Module,
    sample_input: Sample,
    measured_only: Sequence[str],
) -> bool:
    """Whether schedules are executed.

    Parameters
    ----------
    wanted
        ``None`` for yes if the device is at hand.
    measured_only
        Names of the arguments that asked for rows without other figures.

    Raises
    ------
    ValueError
        When they must be executed but cannot be, or when they need not be and rows were
        asked for that have no other figures.
    """
    why = _why_not(target, model, sample_input)
    if wanted and why:
        raise ValueError(f"measure=True, but {why}: use measure=False")
    if measured_only and (why or wanted is False):
        names = " and ".join(measured_only)
        raise ValueError(
            f"{names} have measured figures only, and {why or 'measure is False'}: leave {names} "
            "out"
        )
    return wanted is not False and not why


def _why_not(target: Target, model: nn.Module, sample_input: Sample) -> str:
    if target.elsewhere or not target.at_hand:
        return f"the step is for {target.device.title}, which the model does not lie on"
    tensors = [*model.parameters(), *model.buffers(), *output_tensors(sample_input)]
    if any(t.device.type == "meta" for t in tensors):
        return "the model or its input lies on 'meta', where nothing can run"
    return ""


def executed(
    comparison: ComparisonRecord,
    schedules: Sequence[Schedule | None],
    call: CapturedCall,
    execution: Execution,
    tell: ProgressReporter,
) -> ComparisonRecord:
    """Return the comparison with the measurements of real steps.

    Each distinct schedule that fits its budget, or is a strategy's own choice, runs
    once. Every row with the same schedule gets its figures.

    Parameters
    ----------
    schedules
        The schedule of each row; ``None`` if there is none.
    """
    wanted: dict[Schedule, str] = {}
    for row, schedule in zip(comparison.rows, schedules, strict=True):
        if schedule is not None and row.fits is not False:
            wanted.setdefault(schedule, _name_of(row))
    tell.expect(1 + len(wanted))
    e = execution
    with runner_of(call, e, comparison.baseline_peak_bytes) as (runner, plan):
        tell("running eager")
        eager, eager_error = caught(e, runner.eager)
        found: dict[Schedule, tuple[MeasuredStep | None, str]] = {}
        for schedule, name in wanted.items():
            tell(f"running {name}")
            one = with_schedule(plan, schedule)
            found[schedule] = caught(e, lambda one=one: runner.planned(one))  # type: ignore[misc]
    rows = []
    for row, schedule in zip(comparison.rows, schedules, strict=True):
        measured, error = found.get(schedule, (None, "")) if schedule else (None, "")
        rows.append(replace(row, measured=measured, error=row.error or error))
    return replace(comparison, rows=tuple(rows), eager=eager, eager_error=eager_error)


@contextmanager
def runner_of(
    call: CapturedCall, execution: Execution, unplanned_peak_bytes: int
) -> Iterator[tuple[Runner, PlanRecord]]:
    """Yield a runner for plans of a captured step, and a plan to put schedules into.

    The plan keeps everything. All state is restored afterwards.
    """
    spec = execution.spec
    own = own_forward(spec.model)
    state = preserve_state(spec.model, spec.sample_input, spec.loss_fn, spec.optimizer)
    with forward_set(spec.model, own), state:
        roomy = Request.of(
            spec,
            SolveOptions(solver="keep_all"),
            budget=RequestedBudget(num_bytes=2 * unplanned_peak_bytes),
            headroom=0,
        )
        plan, live = make_plan(call, roomy)
        yield Runner(execution, call.arguments, own, live), plan


def with_schedule(plan: PlanRecord, schedule: Schedule) -> PlanRecord:
    """Return the plan with another schedule, and a budget that its peak fits."""
    other = replace(plan, schedule=schedule)
    return replace(other, budget_bytes=max(plan.budget_bytes, other.predicted_peak_bytes))


def _name_of(row: ComparisonRow) -> str:
    return f"{row.strategy} at {row.budget or 'its own choice'}"
