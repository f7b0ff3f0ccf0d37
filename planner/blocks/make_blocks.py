"""From a model and a budget to plans inside its blocks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from graph_capture.calls.autocast import autocast_as
from graph_capture.calls.call_spec import bind_call, split_sample, tensors_of
from graph_capture.costs.cost_model import TimingProgress
from graph_capture.costs.target import Target, target_of
from graph_capture.errors import CaptureError
from graph_capture.units import format_bytes
from solvers.block_plans.least import least_memory_of_blocks
from solvers.block_plans.solve import BlocksResult, solve_blocks
from solvers.portfolio import solve
from solvers.replay import replay
from solvers.result import OPTIMAL_GAP, Ending, SolveResult, SolveStatus
from solvers.schedule import Schedule
from solvers.scopes import BoundScope

from ..base.budget import Budget, parse_headroom
from ..base.call_guard import lazy_input
from ..base.forward_slot import original_forward
from ..base.live_state import LiveState
from ..base.progress import showing_timing
from ..base.request import Request
from ..base.step_spec import StepSpec
from ..errors import InfeasibleBudgetError
from ..plan_record import PlanRecord
from ..planning.captured_call import CapturedCall, captured_call
from ..planning.make_plan import recorded
from .block_record import BlockParts, WholeStep
from .distinct_blocks import Known, looks_of
from .find import AUTO, find_blocks, smaller_blocks
from .joined_blocks import CapturedBlocks, capture_blocks
from .unfit_blocks import UnfitBlockError

logger = logging.getLogger(__name__)

SOLVER = "block_plans"

WHOLE_SHARE = 0.25
"""Of the time for solving, what the bound of the whole step may take."""

LEAST_MEMORY_S = 2.0
"""At least, for the search of the least memory, where nothing was found within the budget."""

MOST_OPERATORS = 3_000
"""Of a step up to which it is captured as a whole as well, for that bound."""


def make_block_plan(
    spec: StepSpec, request: Request, blocks: str | Sequence[str]
) -> tuple[PlanRecord, BlockParts, tuple[LiveState, ...]]:
    """Plan a step inside its blocks.

    Returns
    -------
    tuple
        The record of the whole step, the plans of its blocks, and what this process knows
        besides each of them.

    Raises
    ------
    InfeasibleBudgetError
        When no choice of plans inside the blocks fits.
    CaptureError, PlanError, ValueError
        When a block or the rest of the step cannot be planned so.
    """
    with captured_in_blocks(spec, request, blocks) as call:
        request = request.settled(call.unplanned_peak_bytes)
        record, parts, live = plan_call(call, request, time_share=1 - WHOLE_SHARE)
        whole = _whole_step(spec, request, call.captured)
    return record, replace(parts, whole=whole), live


@dataclass(frozen=True, kw_only=True)
class CallInBlocks:
    """A call of a model, captured in blocks; to be planned under one budget or several.

    Parameters
    ----------
    model
        The model.
    arguments
        Of its forward, by name.
    captured
        The blocks and the rest; what is solved for one budget is kept for the next.
    """

    model: nn.Module
    arguments: Mapping[str, Any]
    captured: CapturedBlocks

    @cached_property
    def unplanned_peak_bytes(self) -> int:
        """Peak of the step without a plan."""
        whole = self.captured.eager.whole
        return replay(whole, Schedule.keep_all(whole)).peak_bytes

    def least_memory(self, seed: int, time_limit_s: float) -> tuple[dict[str, Schedule], int]:
        """Return the choice with the least memory that is found, and its peak in bytes."""
        step = self.captured.step
        chosen = _least(self.captured, seed, time_limit_s)
        return chosen, replay(step.whole, step.schedule(chosen)).peak_bytes


@contextmanager
def captured_in_blocks(
    spec: StepSpec, request: Request, blocks: str | Sequence[str]
) -> Iterator[CallInBlocks]:
    """Capture a step in blocks, under the autocast that it is planned for.

    Raises
    ------
    CaptureError, PlanError, ValueError
        When a block or the rest of the step cannot be planned so.
    """
    _refuse_others(spec, request)
    model = spec.model
    paths = find_blocks(model, blocks)
    forward = original_forward(model)
    arguments = bind_call(forward, *split_sample(spec.sample_input))
    lazy = lazy_input(arguments)
    if lazy is not None:
        raise ValueError(lazy)
    target = target_of(model, tensors_of(arguments), spec.device)
    under = autocast_as(target.torch_type, spec.autocast) if spec.autocast else nullcontext()
    with under:
        with showing_timing(request.progress) as timing:
            captured = _captured(
                spec, arguments, paths, target, timing, request.options.seed, blocks == AUTO
            )
        yield CallInBlocks(model=model, arguments=arguments, captured=captured)


def plan_call(
    call: CallInBlocks,
    request: Request,
    *,
    time_share: float = 1.0,
    hint: Mapping[str, Schedule] | None = None,
) -> tuple[PlanRecord, BlockParts, tuple[LiveState, ...]]:
    """Plan a captured call within a budget in bytes.

    Parameters
    ----------
    time_share
        Of the time for solving, what may be used.
    hint
        A schedule of each block, to start from.

    Raises
    ------
    InfeasibleBudgetError
        When no choice of plans inside the blocks fits.
    """
    result = _solved(call.captured, request, time_share * request.options.time_limit_s, hint)
    record = _whole_record(call.captured, request, result, call.model, call.arguments)
    parts, live = _parts(call.captured, request, result)
    return record, parts, live


def _captured(
    spec: StepSpec,
    arguments: Mapping[str, Any],
    paths: tuple[str, ...],
    target: Target,
    timing: TimingProgress | None,
    seed: int,
    automatic: bool,
) -> CapturedBlocks:
    """Capture the blocks; where they were not named, leave out or divide what is not fit."""
    known = Known()
    while True:
        try:
            return capture_blocks(
                spec.model,
                arguments,
                paths,
                spec=spec,
                target=target,
                progress=timing,
                seed=seed,
                known=known,
            )
        except UnfitBlockError as error:
            smaller = smaller_blocks(spec.model, paths, _unfit(spec.model, paths, error))
            if not automatic or not smaller:
                raise
            logger.debug("not a block: %s", error)
            paths = smaller


def _unfit(model: nn.Module, paths: tuple[str, ...], error: UnfitBlockError) -> set[str]:
    """The blocks that an error is about."""
    unfit = set(error.paths)
    if error.by_itself:
        looks = looks_of(model.get_submodule(error.paths[0]))
        unfit |= {path for path in paths if looks_of(model.get_submodule(path)) == looks}
    return unfit


def _refuse_others(spec: StepSpec, request: Request) -> None:
    """Refuse what is for plans of whole steps."""
    given = {
        "shapes=": spec.shapes is not None,
        "concurrent_calls=": spec.holds.concurrent_calls > 1,
        "grads='consumed'": spec.holds.consumes,
        "distributed=": spec.holds.distributed is not None,
        "never_recompute=": bool(request.never_recompute),
        "always_recompute=": bool(request.always_recompute),
        "reorder=True": request.options.reorder,
        f"solver={request.options.solver!r}": request.options.solver != "auto",
    }
    for name, is_given in given.items():
        if is_given:
            raise ValueError(
                f"{name} is for a plan of the whole step: leave it out, or plan with "
                "granularity='step'"
            )


def _budget(request: Request, target: Target) -> Budget:
    return parse_headroom(request.headroom, request.budget_bytes, target.torch_type)


def _solved(
    captured: CapturedBlocks,
    request: Request,
    time_limit_s: float,
    hint: Mapping[str, Schedule] | None,
) -> BlocksResult:
    budget = _budget(request, captured.rest.target)
    options = request.options
    result = solve_blocks(
        captured.step,
        captured.points,
        budget.usable_bytes,
        time_limit_s=time_limit_s,
        hint=hint,
        gap=options.gap,
        seed=options.seed,
    )
    if result.chosen is not None:
        return result
    chosen = _least(captured, options.seed, time_limit_s)
    outcome = replay(captured.step.whole, captured.step.schedule(chosen))
    if outcome.peak_bytes > budget.usable_bytes:
        raise _nothing_fits(captured, budget, chosen, outcome.peak_bytes)
    return replace(result, chosen=chosen, peak_bytes=outcome.peak_bytes, cost_ns=outcome.cost_ns)


_MAX_KEPT = 8
_least_known: dict[tuple[int, int], dict[str, Schedule]] = {}


def _least(captured: CapturedBlocks, seed: int, time_limit_s: float) -> dict[str, Schedule]:
    """Return the choice with the least memory; it is kept, for whoever asks for that budget."""
    key = hash(captured.step.whole), seed
    if key not in _least_known:
        _least_known[key], _ = least_memory_of_blocks(
            captured.step,
            captured.points,
            time_limit_s=max(LEAST_MEMORY_S, time_limit_s),
            seed=seed,
        )
        while len(_least_known) > _MAX_KEPT:
            _least_known.pop(next(iter(_least_known)), None)
    return _least_known[key]


def _nothing_fits(
    captured: CapturedBlocks, budget: Budget, chosen: dict[str, Schedule], least_bytes: int
) -> InfeasibleBudgetError:
    graph = captured.step.whole
    schedule = captured.step.schedule(chosen)
    outcome = replay(graph, schedule)
    operator = graph.operators[schedule.order[outcome.peak_step]]
    min_budget_bytes = budget.total_for(least_bytes)
    where = operator.module_path or operator.source or "the training loop"
    return InfeasibleBudgetError(
        f"No plans inside the {len(captured.step.paths)} blocks fit in "
        f"{format_bytes(budget.total_bytes)} ({budget.total_bytes} bytes). The least budget for "
        f"which plans are known is {format_bytes(min_budget_bytes)} ({min_budget_bytes} bytes), "
        f"of which {format_bytes(graph.resident_bytes)} are resident; it is reached at "
        f"{operator.name!r} ({operator.phase}, {where}). Raise the budget, name smaller or other "
        "blocks, or plan the whole step with granularity='step', which needs less",
        budget_bytes=budget.total_bytes,
        min_budget_bytes=min_budget_bytes,
        lower_bound_bytes=budget.total_for(graph.resident_bytes),
    )


def _whole_record(
    captured: CapturedBlocks,
    request: Request,
    result: BlocksResult,
    model: nn.Module,
    arguments: Mapping[str, Any],
) -> PlanRecord:
    """Record the step, blocks and all, as if it were planned as one."""
    assert result.chosen is not None
    rest, eager = captured.rest, captured.eager.whole
    near = result.cost_ns <= result.lower_bound_ns * (1 + OPTIMAL_GAP)
    as_solved = SolveResult(
        status=SolveStatus.OPTIMAL if near else SolveStatus.FEASIBLE,
        ending=Ending.TIME_LIMIT,
        schedule=captured.step.schedule(result.chosen),
        cost_ns=result.cost_ns,
        lower_bound_ns=min(result.lower_bound_ns, result.cost_ns),
        bound_scope=BoundScope.INSIDE_BLOCKS,
        global_bound_ns=0,
        staged_infeasible=False,
        peak_bytes=result.peak_bytes,
        solver=SOLVER,
        solve_s=result.solve_s,
        log=result.log,
    )
    whole = replace(rest, graph=captured.step.whole, unplanned=eager)
    call = CapturedCall(model=model, arguments=arguments, captured=whole)
    record, _ = recorded(call, whole, request, as_solved)
    # Eager code hands its outputs out as they are.
    return replace(record, detached=(), loss=captured.loss)


def _parts(
    captured: CapturedBlocks, request: Request, result: BlocksResult
) -> tuple[BlockParts, tuple[LiveState, ...]]:
    """Record each distinct pair of a block and a schedule as a plan."""
    assert result.chosen is not None
    plans: list[PlanRecord] = []
    live: list[LiveState] = []
    known: dict[tuple[int, Schedule], int] = {}
    plan_of: dict[str, int] = {}
    for call in captured.step.calls:
        key = call.block, result.chosen[call.path]
        if key not in known:
            known[key] = len(plans)
            plan, state = _part(captured, call.block, key[1], request)
            plans.append(plan)
            live.append(state)
        plan_of[call.path] = known[key]
    parts = BlockParts(plans=tuple(plans), plan_of=plan_of, measured=captured.measured)
    return parts, tuple(live)


def _part(
    captured: CapturedBlocks, b: int, schedule: Schedule, request: Request
) -> tuple[PlanRecord, LiveState]:
    block = captured.blocks[b]
    module = block.module()
    assert module is not None
    step = block.captured
    outcome = replay(step.graph, schedule)
    as_solved = SolveResult(
        status=SolveStatus.FEASIBLE,
        ending=Ending.SOLVED,
        schedule=schedule,
        cost_ns=outcome.cost_ns,
        lower_bound_ns=step.graph.base_cost_ns,
        bound_scope=BoundScope.BASE_ORDER,
        global_bound_ns=step.graph.base_cost_ns,
        staged_infeasible=False,
        peak_bytes=outcome.peak_bytes,
        solver=SOLVER,
        solve_s=0.0,
    )
    call = CapturedCall(model=module, arguments=block.arguments, captured=step)
    own = replace(request.for_other_calls, loss_fn=None, headroom=0)
    with block.autocast.holding():
        plan, state = recorded(call, step, own, as_solved)
    return replace(plan, budget_bytes=max(plan.budget_bytes, outcome.peak_bytes)), state


def _whole_step(spec: StepSpec, request: Request, captured: CapturedBlocks) -> WholeStep | None:
    """Solve the whole step under the same budget for a while, for its bound."""
    limit_s = WHOLE_SHARE * request.options.time_limit_s
    if spec.holds.sharded is not None:
        return None  # no rank has the whole step
    if captured.step.whole.num_operators > MOST_OPERATORS or limit_s <= 0:
        return None
    try:
        with captured_call(spec) as call:
            graph = call.captured.graph
    except CaptureError:
        logger.debug("the step cannot be captured as a whole", exc_info=True)
        return None
    result = solve(
        graph,
        _budget(request, captured.rest.target).usable_bytes,
        time_limit_s=limit_s,
        seed=request.options.seed,
        gap=request.options.gap,
    )
    return WholeStep(
        step_us=None if result.cost_ns is None else result.cost_ns / 1e3,
        lower_bound_us=result.global_bound_ns / 1e3,
    )
