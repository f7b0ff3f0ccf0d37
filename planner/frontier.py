"""Plans of one step at many budgets, from one capture."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import nn

from graph_capture.costs.devices import Device
from graph_capture.costs.resolve import CostModelChoice
from graph_capture.loop.loop_holds import Grads, LoopHolds, Outputs
from graph_capture.loop.loss import LossFn

from .base.budget import Budget, RequestedBudget, parse_headroom
from .base.data_parallel import Distributed, wrapped_by
from .base.progress import ShowLines, showing_lines
from .base.request import Request
from .base.solve_options import DEFAULT_GAP, SolveOptions
from .base.step_spec import StepSpec
from .block_plan import BlockPlan
from .blocks.make_blocks import captured_in_blocks, plan_call
from .comparing.budgets import (
    LEAST_BARE_BYTES,
    AskedBudget,
    NamedBudget,
    even_budgets,
    in_bytes,
    read_budgets,
)
from .errors import InfeasibleBudgetError
from .optimize import Granularity
from .plan import Plan
from .planning.captured_call import captured_call
from .planning.known_least import known_least_memory
from .planning.make_plan import make_plan
from .sizing.frontier_report import Frontier, FrontierPoint

NUM_BUDGETS = 20

LEAST_SHARE = 4
"""Times the limit of one plan in blocks, what the search for the least memory may take."""

Planned = Callable[[Request, Plan | None], Plan]
"""Plans within a budget; starts from the plan of a smaller one."""


def frontier(
    model: nn.Module,
    sample_input: Any,
    *,
    budgets: int | Sequence[AskedBudget] = NUM_BUDGETS,
    granularity: Granularity = "step",
    blocks: str | Sequence[str] = "auto",
    loss_fn: LossFn | None = None,
    optimizer: torch.optim.Optimizer | str | None = None,
    device: str | Device | None = None,
    autocast: torch.dtype | None = None,
    cost_model: CostModelChoice = "roofline",
    headroom: float | str | None = None,
    outputs: Outputs = "held",
    grads: Grads = "none",
    resident_bytes: int | str = 0,
    distributed: Distributed = None,
    time_limit_s: float = 5.0,
    gap: float = DEFAULT_GAP,
    seed: int = 0,
    progress: ShowLines = None,
) -> Frontier[Plan]:
    """Plan one training step at many budgets: what each byte of memory costs in time.

    The step is captured once. Budgets are planned from the lowest up, each from the plan of the
    one before, so no plan is slower than one for less memory.

    Parameters
    ----------
    model, sample_input, granularity, blocks, loss_fn, optimizer, device, autocast
        As for :func:`planner.optimize`.
    budgets
        How many, evenly spaced from the least known to work to the peak without a plan, both
        included; or which: shares of that peak (``0.6``, ``"60%"``) and bytes (``"12GB"``).
    cost_model, headroom, outputs, grads, resident_bytes, distributed
        As for :func:`planner.optimize`.
    time_limit_s
        For each plan; plans inside blocks share what is solved of their blocks.
    gap, seed
        As for :func:`planner.optimize`.
    progress
        ``True`` shows what is being done; a function receives it line by line.

    Returns
    -------
    Frontier
        Prints as a table. A budget that nothing fits in has no plan and says why.

    Raises
    ------
    CaptureError
        When the step cannot be captured.
    TypeError, ValueError
        When an argument is invalid.

    Examples
    --------
    >>> layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4)))
    >>> found = frontier(layers, torch.zeros(64, 8), budgets=3, loss_fn=torch.sum)
    >>> [point.plan.overhead == 0 for point in found.points]
    [False, False, True]
    """
    began_s = time.monotonic()
    if granularity not in get_args(Granularity):
        raise ValueError(f"granularity is one of {get_args(Granularity)}, got {granularity!r}")
    count, read = NUM_BUDGETS, None
    if isinstance(budgets, int):
        if isinstance(budgets, bool) or budgets < 2:
            raise ValueError(f"budgets is a number from 2 on, or a list of them, got {budgets!r}")
        if budgets >= LEAST_BARE_BYTES:
            raise ValueError(
                f"budgets={budgets!r} asks for so many plans: write budgets=[{budgets!r}] for one "
                "of so many bytes"
            )
        count = budgets
    else:
        read = read_budgets(budgets, ())
        if not read:
            raise ValueError("budgets has none: give some, or how many")
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
    request = Request.of(
        spec,
        SolveOptions(time_limit_s=time_limit_s, gap=gap, seed=seed),
        budget=RequestedBudget(num_bytes=None, share=1.0),
        headroom=headroom,
    )
    way = _in_blocks(spec, request, blocks) if granularity == "blocks" else _as_one(spec, request)
    with showing_lines(progress) as say:
        say("capturing")
        with way as step:
            capture_s = time.monotonic() - began_s
            asked = _asked(step, request, read, count)
            points = tuple(_points(step, request, asked, say))
    return Frontier(
        model=type(model).__name__,
        granularity=granularity,
        device=step.device,
        unplanned_peak_bytes=step.unplanned_peak_bytes,
        points=points,
        capture_s=capture_s,
        total_s=time.monotonic() - began_s,
    )


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A captured step, whichever way it is planned."""

    unplanned_peak_bytes: int
    least_bytes: Callable[[], int]
    plan: Planned
    device_type: str
    device: str


@contextmanager
def _as_one(spec: StepSpec, request: Request) -> Iterator[_Step]:
    seed = request.options.seed
    with captured_call(spec) as call:
        target = call.captured.target
        yield _Step(
            unplanned_peak_bytes=call.unplanned_peak_bytes,
            least_bytes=lambda: known_least_memory(call.captured.graph, seed).peak_bytes,
            plan=lambda own, below: Plan.of(
                *make_plan(call, own, None if below is None else below.schedule)
            ),
            device_type=target.torch_type,
            device=target.device.title,
        )


@contextmanager
def _in_blocks(spec: StepSpec, request: Request, blocks: str | Sequence[str]) -> Iterator[_Step]:
    seed = request.options.seed

    def planned(own: Request, below: Plan | None) -> Plan:
        hint = None
        if isinstance(below, BlockPlan):
            hint = {path: below.parts.of(path).schedule for path in below.parts.plan_of}
        return BlockPlan.of_blocks(*plan_call(call, own, hint=hint), loss_fn=spec.loss_fn)

    with captured_in_blocks(spec, request, blocks) as call:
        target = call.captured.rest.target
        yield _Step(
            unplanned_peak_bytes=call.unplanned_peak_bytes,
            least_bytes=lambda: call.least_memory(seed, LEAST_SHARE * request.options.time_limit_s)[
                1
            ],
            plan=planned,
            device_type=target.torch_type,
            device=target.device.title,
        )


def _asked(
    step: _Step, request: Request, read: Sequence[Any] | None, count: int
) -> tuple[NamedBudget, ...]:
    """Return the budgets, from the lowest up."""
    peak = step.unplanned_peak_bytes
    if read is not None:
        named = in_bytes(read, unplanned_peak_bytes=peak, own_peak_bytes=lambda _: peak)
        return tuple(sorted(named, key=lambda budget: budget.num_bytes))
    room: Budget = parse_headroom(request.headroom, peak, step.device_type)
    return even_budgets(room.total_for(step.least_bytes()), room.total_for(peak), count)


def _points(
    step: _Step, request: Request, asked: Sequence[NamedBudget], say: Callable[[str], None]
) -> Iterator[FrontierPoint[Plan]]:
    below: Plan | None = None
    for number, budget in enumerate(asked, start=1):
        say(f"budget {number} of {len(asked)}: {budget.label}")
        own = replace(request, budget=RequestedBudget(num_bytes=budget.num_bytes))
        try:
            below = step.plan(own, below)
        except InfeasibleBudgetError as error:
            yield FrontierPoint(
                budget_bytes=budget.num_bytes, least_budget_bytes=error.min_budget_bytes
            )
            continue
        yield FrontierPoint(budget_bytes=budget.num_bytes, plan=below)
