"""Divide a model's layers among the stages of a pipeline, each with a plan of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from graph_capture.cost_graph import CostGraph
from graph_capture.units import format_bytes, format_us
from solvers.pipeline import (
    Division,
    PipelineSchedule,
    StageTimes,
    calls_in_flight,
    divide_layers,
    even_ranges,
    simulate,
)
from solvers.schedule import Schedule

from .errors import InfeasibleBudgetError
from .plan import Plan
from .plan_record import PlanRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What a stage of a pipeline is planned for.

    Parameters
    ----------
    index
        From 0 on.
    first, end
        Its layers: from ``first`` up to, and without, ``end``.
    calls_in_flight
        Micro-batches whose forward pass it has run and not their backward pass: what
        ``concurrent_calls=`` of :func:`planner.optimize` counts.
    """

    index: int
    first: int
    end: int
    calls_in_flight: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """A stage with its plan; microseconds are of one micro-batch."""

    stage: Stage
    plan: Plan
    forward_us: float
    backward_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelinePlan:
    """The stages of a pipeline, and what a step takes by the simulator.

    Parameters
    ----------
    schedule
        ``"1f1b"`` or ``"gpipe"``.
    stages
        With their plans.
    step_us
        Of a step of all micro-batches, in microseconds.
    lower_bound_us
        No division of the layers takes less, with these plans.
    even_us
        Where all stages have the same number of layers (or differ by one) and plans of their
        own; ``None`` where such a stage does not fit.
    uniform_us
        The same where all stages recompute as large a share of their time as the one that must
        recompute most, as one setting for all does.
    """

    schedule: PipelineSchedule
    num_microbatches: int
    stages: tuple[PlannedStage, ...]
    step_us: float
    idle_shares: tuple[float, ...]
    lower_bound_us: float
    even_us: float | None
    uniform_us: float | None

    def __str__(self) -> str:
        lines = [
            f"Pipeline of {len(self.stages)} stages, {self.num_microbatches} micro-batches, "
            f"{self.schedule}: {format_us(self.step_us)} a step, at least "
            f"{format_us(self.lower_bound_us)} for any division of the layers",
            f"  {'stage':>5}  {'layers':>9}  {'in flight':>9}  {'peak':>9}  {'overhead':>8}  "
            f"{'forward':>9}  {'backward':>9}  {'waits':>6}",
        ]
        for planned, idle in zip(self.stages, self.idle_shares, strict=True):
            stage, plan = planned.stage, planned.plan
            lines.append(
                f"  {stage.index:>5}  {f'{stage.first} to {stage.end - 1}':>9}  "
                f"{stage.calls_in_flight:>9}  {format_bytes(plan.predicted_peak_bytes):>9}  "
                f"{plan.overhead:>+8.2%}  {format_us(planned.forward_us):>9}  "
                f"{format_us(planned.backward_us):>9}  {idle:>6.1%}"
            )
        lines.append(f"  the same number of layers in each: {_or_none(self.even_us)}")
        lines.append(f"  and one setting for all stages: {_or_none(self.uniform_us)}")
        return "\n".join(lines)


def plan_pipeline(
    plan_stage: Callable[[Stage], Plan],
    *,
    num_layers: int,
    num_stages: int,
    num_microbatches: int,
    schedule: PipelineSchedule = "1f1b",
    send_us: float = 0.0,
    alike: bool = False,
) -> PipelinePlan:
    """Find how many layers each stage of a pipeline should have, with a plan for each.

    Every device has its own budget, and the first stage has the most micro-batches in
    flight. It recomputes the most if all have the same number of layers, and all others
    wait for it.

    Parameters
    ----------
    plan_stage
        Makes a stage's module and plans it with :func:`planner.optimize`, its
        ``calls_in_flight`` as ``concurrent_calls=``. :class:`planner.InfeasibleBudgetError`
        means that so many layers do not fit. What comes before the first layer and
        behind the last one belongs to the first and the last stage.
    num_layers
        At least one for each stage.
    send_us
        Microseconds until a stage's output has arrived at the next.
    alike
        Whether all layers are alike, and stages between the first and the last with the
        same number of layers and calls in flight, too: such stages are planned once.

    Returns
    -------
    PipelinePlan
        Prints as a table. The slowest stage is as fast as can be; the step's time is the
        simulator's.

    Raises
    ------
    InfeasibleBudgetError
        When no division fits; that of the stage that failed last.
    ValueError
        When an argument is invalid.

    Notes
    -----
    See ``solvers/pipeline.py`` for the algorithm and its sources.
    """
    plans: dict[object, Plan | InfeasibleBudgetError] = {}
    refused: list[InfeasibleBudgetError] = []

    def planned(index: int, first: int, end: int) -> Plan | None:
        in_flight = calls_in_flight(schedule, index, num_stages, num_microbatches)
        stage = Stage(index=index, first=first, end=end, calls_in_flight=in_flight)
        where = (index == 0, index == num_stages - 1, end - first) if alike else (index, first, end)
        key = where, stage.calls_in_flight
        if key not in plans:
            try:
                plans[key] = plan_stage(stage)
            except InfeasibleBudgetError as error:
                plans[key] = error
                refused.append(error)
        found = plans[key]
        return None if isinstance(found, InfeasibleBudgetError) else found

    def times_of(index: int, first: int, end: int) -> StageTimes | None:
        plan = planned(index, first, end)
        return None if plan is None else stage_times(plan)

    if not 0 <= send_us < math.inf:
        raise ValueError(f"send_us is a number of microseconds from 0 on, got {send_us!r}")
    send_ns = round(send_us * 1e3)
    division = divide_layers(
        times_of, num_layers, num_stages, num_microbatches, schedule, send_ns=send_ns
    )
    if division is None:
        raise refused[-1]

    even = [planned(s, *layers) for s, layers in enumerate(even_ranges(num_layers, num_stages))]

    def simulated(*, uniform: bool) -> float | None:
        plans = [plan for plan in even if plan is not None]
        if len(plans) < num_stages:
            return None
        most = max(plan.overhead for plan in plans)
        times = [_with_overhead(plan, most) if uniform else stage_times(plan) for plan in plans]
        return simulate(times, num_microbatches, schedule, send_ns=send_ns).step_ns / 1e3

    return PipelinePlan(
        schedule=schedule,
        num_microbatches=num_microbatches,
        stages=_stages(division, planned, schedule, num_microbatches),
        step_us=division.run.step_ns / 1e3,
        idle_shares=tuple(division.run.idle_share(s) for s in range(num_stages)),
        lower_bound_us=division.lower_bound_ns / 1e3,
        even_us=simulated(uniform=False),
        uniform_us=simulated(uniform=True),
    )


def stage_times(plan: PlanRecord) -> StageTimes:
    """Return what a plan's forward and backward passes take for one micro-batch.

    Forward ends with the loss, or else with the last run of one of its operators; the
    optimizer is no part of it.
    """
    return times_of_schedule(plan.graph, plan.schedule)


def times_of_schedule(graph: CostGraph, schedule: Schedule) -> StageTimes:
    """Return the same of any schedule of a step."""
    operators, order = graph.operators, schedule.order
    ends = max(
        (i for i, v in enumerate(order) if operators[v].phase == "loss"),
        default=max(i for i, v in enumerate(order) if operators[v].phase == "forward"),
    )
    costs = [0 if operators[v].phase == "optimizer" else operators[v].cost_ns for v in order]
    return StageTimes(forward_ns=sum(costs[: ends + 1]), backward_ns=sum(costs[ends + 1 :]))


def _with_overhead(plan: PlanRecord, overhead: float) -> StageTimes:
    """A stage's times if it recomputed more, up to this overhead."""
    times = stage_times(plan)
    more_us = max(0.0, overhead - plan.overhead) * plan.baseline_step_us
    return replace(times, backward_ns=times.backward_ns + round(more_us * 1e3))


def _stages(
    division: Division,
    planned: Callable[[int, int, int], Plan | None],
    schedule: PipelineSchedule,
    num_microbatches: int,
) -> tuple[PlannedStage, ...]:
    stages = []
    for index, (first, end) in enumerate(division.ranges):
        plan = planned(index, first, end)
        assert plan is not None
        times = stage_times(plan)
        in_flight = calls_in_flight(schedule, index, len(division.ends), num_microbatches)
        stages.append(
            PlannedStage(
                stage=Stage(index=index, first=first, end=end, calls_in_flight=in_flight),
                plan=plan,
                forward_us=times.forward_ns / 1e3,
                backward_us=times.backward_ns / 1e3,
            )
        )
    return tuple(stages)


def _or_none(us: float | None) -> str:
    return "does not fit" if us is None else format_us(us)
