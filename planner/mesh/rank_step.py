"""Capture and plan the step of one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from graph_capture.cost_graph import CostGraph
from graph_capture.loop.loop_holds import LoopHolds
from solvers.replay import replay
from solvers.schedule import Schedule

from ..base.budget import Budget, RequestedBudget
from ..base.request import Request
from ..base.solve_options import SolveOptions
from ..base.step_spec import StepSpec
from ..block_plan import BlockPlan
from ..blocks.make_blocks import captured_in_blocks, plan_call
from ..errors import InfeasibleBudgetError
from ..pipeline import stage_times, times_of_schedule
from ..plan import Plan
from ..plan_record import PeakMemory
from ..planning.captured_call import captured_call
from ..planning.make_plan import make_plan
from .around import Around
from .communication import Axis
from .divided import explained
from .mesh_report import StageEstimate
from .rank_traffic import phase_ns, rank_traffic
from .tensor_parallel import Collectives


def rank_step(
    module: nn.Module,
    sample: dict[str, Any],
    parts: Mapping[str, str],
    collectives: Collectives,
    around: Around,
    common: Mapping[str, Any],
    options: SolveOptions,
    room: Budget | None,
    headroom: float | str | None,
    speeds: Mapping[Axis, float],
) -> tuple[StageEstimate[Plan], torch.Tensor | None]:
    """Capture and plan one rank of a stage; return what it hands to the next one, too."""
    beside = around.beside(module, sample, collectives.largest_bytes)
    holds = LoopHolds.of(
        around.outputs, around.grads, sum(beside.values()), around.flying, around.word
    )
    spec = StepSpec(model=module, sample_input=sample, holds=holds, **common)
    budget = RequestedBudget(num_bytes=None if room is None else room.total_bytes, share=1.0)
    if room is not None:
        budget = RequestedBudget(num_bytes=room.total_bytes)
    request = Request.of(spec, options, budget=budget, headroom=headroom)
    with explained(parts, around.mesh.tp), _captured(spec, request, around) as step:
        unplanned = step.unplanned
        everything = Schedule.keep_all(unplanned)
        outcome = replay(unplanned, everything)
        without = _named(PeakMemory.of(unplanned, everything, outcome), beside)
        plan, least = None, None
        planned: PeakMemory | None = without
        if room is not None and outcome.peak_bytes > room.usable_bytes:
            try:
                plan = step.planned(request)
                planned = _named(plan.memory, beside)
            except InfeasibleBudgetError as error:
                planned, least = None, error.min_budget_bytes
        handed = step.handed
    if plan is None:
        times = times_of_schedule(unplanned, everything)
    else:
        times = stage_times(plan)
    sent = rank_traffic(module, plan, parts, collectives, around, sample, handed, unplanned, speeds)
    return (
        StageEstimate(
            stage=around.stage,
            layers=None,
            in_flight=around.flying,
            unplanned=without,
            memory=planned,
            plan=plan,
            least_budget_bytes=least,
            forward_us=times.forward_ns / 1e3,
            backward_us=times.backward_ns / 1e3,
            optimizer_us=phase_ns(unplanned, "optimizer") / 1e3,
            traffic=tuple(sent),
        ),
        handed,
    )


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A captured step, whichever way it is planned."""

    unplanned: CostGraph
    planned: Callable[[Request], Plan]
    handed: torch.Tensor | None


@contextmanager
def _captured(spec: StepSpec, request: Request, around: Around) -> Iterator[_Step]:
    if around.granularity == "blocks":
        with captured_in_blocks(spec, request, around.blocks) as call:
            yield _Step(
                unplanned=call.captured.eager.whole,
                planned=lambda own: BlockPlan.of_blocks(*plan_call(call, own)),
                handed=None,
            )
        return
    with captured_call(spec) as call_of_step:
        captured = call_of_step.captured
        assert captured.unplanned is not None
        handed = None
        if around.stage < around.mesh.pp - 1:
            (place,) = captured.step.differentiated
            value = captured.step.outputs[place].meta["val"]
            handed = torch.empty(value.shape, dtype=value.dtype, device="meta", requires_grad=True)
        yield _Step(
            unplanned=captured.unplanned,
            planned=lambda own: Plan.of(*make_plan(call_of_step, own)),
            handed=handed,
        )


def _named(memory: PeakMemory, beside: Mapping[str, int]) -> PeakMemory:
    """Name what lies beside the step, which the planner knows as the caller's own."""
    parts = dict(memory.by_category)
    if parts.get("resident") == sum(beside.values()):
        del parts["resident"]
    return replace(memory, by_category={**parts, **beside} if beside else memory.by_category)
