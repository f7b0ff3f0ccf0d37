"""Solve a captured step and write down the plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import NoneType
from typing import Any

import torch
from torch import nn

from graph_capture.call_spec import tensors_of
from graph_capture.captured_step import CapturedStep, capture_step
from graph_capture.cost_graph import CostGraph
from graph_capture.costs.devices import DEVICES, Device
from graph_capture.costs.resolve import ChosenCosts
from graph_capture.loss import LossFn
from graph_capture.optimizer_step import OptimizerStep
from graph_capture.policies import apply_policies
from graph_capture.target import target_of
from solvers.any_order.memory import least_memory_in_any_order
from solvers.any_order.solve import solve_in_any_order
from solvers.least_memory import LeastMemory, least_memory
from solvers.portfolio import solve
from solvers.replay import replay
from solvers.result import SolveResult
from solvers.schedule import Schedule
from solvers.uniform import uniform_under_budget

from ..base.budget import (
    Budget,
    nothing_fits,
    parse_headroom,
)
from ..base.call_guard import CallGuard
from ..base.module_structure import Structure
from ..base.progress import (
    ShowProgress,
    showing,
    showing_timing,
)
from ..errors import PlanError
from ..plan import Plan

LEAST_MEMORY_LIMIT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked of :func:`planner.optimize`, beside the model; the same names."""

    budget_bytes: int
    loss_fn: LossFn | None = None
    solver: str = "auto"
    time_limit_s: float = 60.0
    gap: float = 0.001
    seed: int = 0
    never_recompute: tuple[str, ...] = ()
    always_recompute: tuple[str, ...] = ()
    reorder: bool = False
    device: str | Device | None = None
    cost_model: ChosenCosts = "roofline"
    headroom: float | str | None = None
    progress: ShowProgress = None

    def __post_init__(self) -> None:
        if isinstance(self.time_limit_s, bool) or not 0 <= self.time_limit_s < math.inf:
            raise ValueError(f"time_limit_s must be finite and >= 0, got {self.time_limit_s!r}")
        if isinstance(self.gap, bool) or not 0 <= self.gap < math.inf:
            raise ValueError(f"gap must be finite and >= 0, got {self.gap!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        if self.loss_fn is not None and not callable(self.loss_fn):
            raise ValueError(f"loss_fn must be a function of the output, got {self.loss_fn!r}")
        if not isinstance(self.reorder, bool):
            raise ValueError(f"reorder must be True or False, got {self.reorder!r}")
        if not isinstance(self.progress, (bool, NoneType)) and not callable(self.progress):
            raise ValueError(f"progress must be True or a function, got {self.progress!r}")
        parse_headroom(self.headroom, self.budget_bytes, "cpu")  # wrong ones are refused at once


def make_plan(
    model: nn.Module,
    arguments: Mapping[str, Any],
    captured: CapturedStep,
    constrained: CapturedStep,
    request: Request,
    hint: Schedule | None = None,
) -> Plan:
    """Solve ``constrained``, which is ``captured`` under the user's own rules.

    Parameters
    ----------
    hint
        A schedule that is known to fit, to begin with.

    Raises
    ------
    InfeasibleBudgetError
        When no schedule fits.
    """
    budget = parse_headroom(request.headroom, request.budget_bytes, captured.target.torch_type)
    result = _solve(constrained.graph, budget, request, hint)
    assert result.schedule is not None
    assert captured.costs is not None
    assert captured.unplanned is not None
    baseline = replay(captured.unplanned, Schedule.keep_all(captured.unplanned))
    step, optimizer = captured.step, captured.optimizer
    return Plan(
        graph=constrained.graph,
        schedule=result.schedule,
        guard=CallGuard.of(model, arguments, captured.device_type, captured.target.place),
        budget_bytes=request.budget_bytes,
        headroom_bytes=budget.headroom_bytes,
        baseline_peak_bytes=baseline.peak_bytes,
        baseline_step_us=baseline.cost_ns / 1e3,
        lower_bound_us=result.lower_bound_ns / 1e3,
        bound_scope=result.bound_scope,
        status=result.status,
        solver=result.solver,
        solve_s=result.solve_s,
        seed=request.seed,
        log=result.log,
        optimizer=None if optimizer is None else _priced(optimizer, constrained.graph),
        loss=step.loss_spec,
        never_recompute=request.never_recompute,
        always_recompute=request.always_recompute,
        reorder=request.reorder,
        detached=tuple(dict.fromkeys(step.template.names[i] for i in step.detached)),
        device_type=captured.device_type,
        costs=captured.costs,
        device_name=_table_name(request.device),
        branch_free=step.branch_free,
        outcomes=step.outcomes,
        torch_version=torch.__version__,
        _captured=constrained,
        _structure=Structure.of(model),
        _request=request,
    )


def request_again(plan: Plan) -> Request:
    """What a plan from a file was asked for, as far as the file says; without its ``loss_fn``.

    Raises
    ------
    PlanError
        When its times come from the user's own function, which no file holds.
    """
    if plan.costs.model not in ("roofline", "profile"):
        raise PlanError(
            f"the times of this plan from a file come from {plan.costs.model!r}, which is not in "
            "the file: call optimize() or max_batch() with cost_model="
        )
    return Request(
        budget_bytes=plan.budget_bytes,
        seed=plan.seed,
        never_recompute=plan.never_recompute,
        always_recompute=plan.always_recompute,
        reorder=plan.reorder,
        device=plan.device_name,
        cost_model=plan.costs.model,
        headroom=f"{plan.headroom_bytes}B" if plan.headroom_bytes else 0,
    )


def _table_name(device: str | Device | None) -> str | None:
    """The name by which another process finds a device that was asked for."""
    name = device.name if isinstance(device, Device) else device
    if name is None or name not in DEVICES:
        return None  # "cuda", too: the card at hand
    return name if device in (name, DEVICES[name]) else None


def _priced(optimizer: OptimizerStep, graph: CostGraph) -> OptimizerStep:
    """An optimizer without its calls, with the time that they were priced at."""
    step_ns = sum(op.cost_ns for op in graph.operators if op.phase == "optimizer")
    return replace(optimizer, calls=(), step_ns=step_ns)


def replan(
    plan: Plan, model: nn.Module, arguments: Mapping[str, Any], forward: Callable[..., Any]
) -> Plan:
    """A plan with the same budget and rules for another call.

    Raises
    ------
    PlanError
        When the plan came from a file and needs a ``loss_fn`` that the file cannot hold.
    """
    request = plan._request
    if request is None:
        if plan.loss.region.label == "loss_fn":
            raise PlanError(
                "a plan from a file cannot be made again for another shape: its loss_fn is not in "
                "the file; call optimize() with it"
            )
        request = request_again(plan)
    with showing_timing(request.progress) as timing:
        captured = capture_step(
            model,
            arguments,
            loss=request.loss_fn,
            optimizer=plan.optimizer if plan._captured is None else plan._captured.optimizer,
            forward=forward,
            target=target_of(model, tensors_of(arguments), request.device),
            cost_model=request.cost_model,
            progress=timing,
        )
    constrained = apply_policies(captured, request.never_recompute, request.always_recompute)
    return make_plan(model, arguments, captured, constrained, request)


def _solve(
    graph: CostGraph, budget: Budget, request: Request, hint: Schedule | None = None
) -> SolveResult:
    budget_bytes = budget.usable_bytes
    if hint is None and request.solver == "auto" and not fits_easily(graph, budget_bytes):
        hint = _least_within(graph, budget, request)
    search = solve_in_any_order if request.reorder else solve
    with showing(request.progress) as progress:
        result = search(
            graph,
            budget_bytes,
            solver=request.solver,
            time_limit_s=request.time_limit_s,
            seed=request.seed,
            hint=hint,
            progress=progress,
            gap=request.gap,
        )
    if result.schedule is not None:
        return result
    least = _least(graph, budget, request)
    if least.peak_bytes > budget_bytes:
        raise nothing_fits(graph, budget, least)
    raise PlanError(
        f"solver {request.solver!r} found no schedule within {request.time_limit_s} s, though one "
        f"for {least.peak_bytes} bytes exists; use solver='auto' or more time"
    )


def fits_easily(graph: CostGraph, budget_bytes: int) -> bool:
    """Whether keeping everything or a uniform schedule is within the budget."""
    if replay(graph, Schedule.keep_all(graph)).peak_bytes <= budget_bytes:
        return True
    return uniform_under_budget(graph, budget_bytes) is not None


def _least_within(graph: CostGraph, budget: Budget, request: Request) -> Schedule:
    least = _least(graph, budget, request)
    if least.peak_bytes > budget.usable_bytes:
        raise nothing_fits(graph, budget, least)
    return least.schedule


def _least(graph: CostGraph, budget: Budget, request: Request) -> LeastMemory:
    """In eager's order where that fits the budget, else in every order that may be used."""
    least = remembered_least_memory(graph, request.seed)
    if request.reorder and least.peak_bytes > budget.usable_bytes:
        return _least_memory_in_any_order(graph, request.seed)
    return least


# Both are remembered, so that the least budget an error names is found again when it is asked for.


@lru_cache(maxsize=8)
def remembered_least_memory(graph: CostGraph, seed: int) -> LeastMemory:
    return least_memory(graph, time_limit_s=LEAST_MEMORY_LIMIT_S, seed=seed)


@lru_cache(maxsize=8)
def _least_memory_in_any_order(graph: CostGraph, seed: int) -> LeastMemory:
    return least_memory_in_any_order(
        graph,
        start=remembered_least_memory(graph, seed),
        time_limit_s=LEAST_MEMORY_LIMIT_S,
        seed=seed,
    )
